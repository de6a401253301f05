"""A run before it runs: what its recipe says, where its files are, and what it reads."""

from pathlib import Path

from trl import ModelConfig

from ..common.run_folder import RunFolder
from ..dpo.config import AMAConfig
from ..tasks.config import TaskMixtureConfig
from .arguments import PipelineArguments
from .inputs import RunInputs
from .recipe import Recipe


class RunSettings:
    """A parsed recipe, as the stages of the pipeline take it.

    Args:
        pipeline_args, training_args, model_args, task_args: The parsed arguments.

    Attributes:
        recipe ([`Recipe`]): What it says.
        folder ([`RunFolder`]): Where everything of its run is.
        inputs ([`RunInputs`]): The tokenizer, the pairs and what else it reads, loaded when they are asked for.

    Raises:
        AMAError: If the arguments do not fit together.
    """

    def __init__(
        self,
        pipeline_args: PipelineArguments,
        training_args: AMAConfig,
        model_args: ModelConfig,
        task_args: TaskMixtureConfig,
    ):
        self.recipe = Recipe(pipeline_args, training_args, model_args, task_args)
        self.inputs = RunInputs(self.recipe)
        if self.recipe.asks_for_tasks:
            self.recipe = self.inputs.recipe = self.recipe.with_tasks(self.inputs.shared_losses.tasks)
        self.folder = RunFolder(training_args.output_dir)

    def specialist_source(self, task: str) -> str:
        """Where a task's specialist is read from: the user's, or the one trained here."""
        return self.recipe.external_specialists.get(task, str(self.folder.specialist(task)))

    def losses_folder(self, task: str) -> Path:
        """Where a task's reference losses are: the ready ones, or those computed here."""
        inputs = self.inputs
        return inputs.shared_losses.parts[task].folder if task in inputs.shared_tasks else self.folder.losses_of(task)
