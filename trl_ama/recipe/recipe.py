"""What a recipe says: the parsed arguments, checked, and what each stage makes of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, get_quantization_config

from ..common.errors import AMAError, nearest, sentence
from ..common.limits import LimitError, check_limits
from ..common.run_folder import RunFolder
from ..common.value_types import check_value
from ..dpo.config import AMAConfig
from ..tasks.config import TaskConfig, TaskMixtureConfig
from .arguments import PipelineArguments


@dataclass
class Recipe:
    """The parsed arguments of a run, and what follows from them alone.

    Raises:
        AMAError: If they do not fit together.
    """

    pipeline_args: PipelineArguments
    training_args: AMAConfig
    model_args: ModelConfig
    task_args: TaskMixtureConfig

    def __post_init__(self):
        if not self.model_args.model_name_or_path:
            raise AMAError(
                "There is no base model. Set `model_name_or_path` in the recipe, or pass --model_name_or_path."
            )
        check_limits(vars(self.model_args), "Of the model's arguments,")
        training = self.given_args = self.training_args
        # As in `trl dpo`: the model's arguments, and what the recipe sets explicitly on top
        self.training_args = self.with_arguments(
            model_init_kwargs={
                "revision": self.model_args.model_revision,
                "trust_remote_code": training.trust_remote_code,
                "attn_implementation": self.model_args.attn_implementation,
                "dtype": self.model_args.dtype or "float32",
                **(training.model_init_kwargs or {}),
            },
            specialists=None,  # the pipeline joins their log-probs instead
        )
        self.external_specialists: dict[str, str] = {
            **(training.specialists or {}),
            **{task.task: task.specialist for task in self.task_args.tasks if task.specialist},
        }
        if not self.asks_for_tasks:
            self._check_names()

    def _check_names(self) -> None:
        for task, source in self.external_specialists.items():
            if not isinstance(source, str):
                raise AMAError(f"The specialist of task '{task}' must be a folder or a Hub id, got {source!r:.80}.")
        names = self.task_names
        unknown = [task for task in self.external_specialists if task not in names]
        if unknown:
            raise AMAError(
                f"There is a specialist for '{unknown[0]}', but the recipe's tasks are {names}.{nearest(unknown[0], names)}"
            )
        unknown = [task for task in self.pipeline_args.only_tasks if task not in names]
        if unknown:
            raise AMAError(
                f"only_tasks names '{unknown[0]}', but the recipe's tasks are {names}.{nearest(str(unknown[0]), names)}"
            )

    # ---- Tasks ----

    @property
    def asks_for_tasks(self) -> bool:
        """Whether it leaves its tasks to ready reference losses, which have to be loaded to know them."""
        return not self.task_args.tasks and bool(self.pipeline_args.reference_losses)

    def with_tasks(self, names: list[str]) -> "Recipe":
        """The same recipe with these tasks, whose pairs come from ready reference losses."""
        task_args = dataclasses.replace(self.task_args, tasks=[TaskConfig(name) for name in names])
        return Recipe(self.pipeline_args, self.given_args, self.model_args, task_args)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the recipe's order."""
        return [task.task for task in self.task_args.tasks]

    @property
    def chosen_tasks(self) -> list[str]:
        """The tasks whose specialists and reference losses this run makes: all, or the recipe's `only_tasks`."""
        chosen = self.pipeline_args.only_tasks
        return [task for task in self.task_names if not chosen or task in chosen]

    def task(self, name: str) -> TaskConfig:
        """What the recipe says of one task."""
        return next(task for task in self.task_args.tasks if task.task == name)

    # ---- Training arguments ----

    def with_arguments(self, **changes: Any) -> AMAConfig:
        """The training arguments with some changed, checked and converted as when they are parsed.

        Raises:
            AMAError: If a name is not a training argument (the nearest is suggested), or values contradict each other.
        """
        known = [field.name for field in dataclasses.fields(AMAConfig) if field.init]
        for name in changes:
            if name not in known:
                raise AMAError(f"Unknown training argument '{name}' in specialist_args.{nearest(name, known)}")
        try:
            return dataclasses.replace(self.training_args, **changes)
        except AMAError:
            raise
        except Exception as error:  # others' checks, which raise what they like
            raise AMAError(f"These training arguments do not go together: {' '.join(str(error).split())}") from error

    def specialist_arguments(self, task: TaskConfig) -> AMAConfig:
        """Training arguments of one task's specialist: the recipe's without evaluation during training, then its own."""
        args = self.training_args
        folder = RunFolder(args.output_dir).specialist(task.task)
        own = {**self.pipeline_args.specialist_args, **task.specialist_args}
        if "output_dir" in own:
            raise AMAError(
                f"specialist_args of task '{task.task}' sets output_dir, but specialists go to '{folder}'. Leave it out."
            )
        for name, value in own.items():
            if not isinstance(name, str):
                raise AMAError(
                    f"Unknown training argument {name!r} in specialist_args of task '{task.task}'. Leave it out."
                )
            check_value(AMAConfig, name, value, f"Of the specialist_args of task '{task.task}',", parses_text=False)
        changes = {
            "output_dir": str(folder),
            "push_to_hub": False,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "save_strategy": "no" if args.save_strategy == SaveStrategy.BEST else args.save_strategy,
            **own,
        }
        try:
            return self.with_arguments(**changes)
        except LimitError as error:  # also of the recipe's value of a key, under what is set here
            of = "Of" if error.key in own else "With"
            raise error.told_of(f"{of} the specialist_args of task '{task.task}',") from None

    def scoring_arguments(self, has_images: bool) -> AMAConfig:
        """Arguments of a trainer that only scores pairs: nothing is trained, saved, evaluated, logged or pushed.

        Args:
            has_images (`bool`): Whether pairs have images.
        """
        return self.with_arguments(
            push_to_hub=False,
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
            metric_for_best_model=None,
            # Which keeps DPOTrainer from loading a second model, where it can be kept from it
            precompute_ref_log_probs=not has_images,
            sync_ref_model=False,
        )

    # ---- Models ----

    @property
    def strategies(self) -> list[str]:
        """The generalists to train: the recipe's `mixing` first, then those it is compared with."""
        return list(dict.fromkeys([self.training_args.mixing, *self.pipeline_args.compare]))

    @property
    def model_name(self) -> str:
        """The base model as the user names it."""
        return self.model_args.model_name_or_path

    @property
    def uses_peft(self) -> bool:
        """Whether adapters are trained, rather than all weights."""
        return bool(self.model_args.use_peft)

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The quantisation of the base model, if any.

        Raises:
            AMAError: If its settings contradict each other.
        """
        try:
            return get_quantization_config(self.model_args)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise AMAError(
                f"These settings of the quantisation do not go together: {sentence(error)} (dtype is '{self.model_args.dtype}'). "
                "With load_in_4bit, set dtype to bfloat16, float16 or float32."
            ) from error
