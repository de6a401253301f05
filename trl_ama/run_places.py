"""Where everything of a run is: its folders, and where what the recipe names ready is read from."""

from pathlib import Path
from typing import TYPE_CHECKING

from .training_stage import result_in


if TYPE_CHECKING:
    from .ama_config import AMAConfig
    from .loss_sharing import ReferenceLosses


class RunPlaces:
    """The folders of a run; a part of `RunSettings`, which has the attributes that are only declared here."""

    training_args: "AMAConfig"
    external_specialists: dict[str, str]  # task → folder or Hub id
    shared_losses: "ReferenceLosses | None"
    shared_tasks: list[str]

    @property
    def output_dir(self) -> Path:
        """Where everything of this run is written."""
        return Path(self.training_args.output_dir)

    def specialist_dir(self, task: str) -> Path:
        """The folder of a trained specialist."""
        return self.output_dir / "specialists" / task

    def needs_specialist(self, task: str) -> bool:
        """Whether a task's specialist is trained here: the recipe names none, and its reference losses are not ready."""
        return task not in self.external_specialists and task not in self.shared_tasks

    def has_specialist_folder(self, task: str) -> bool:
        """Whether a specialist was trained here, to its end, and its files are what was written."""
        return result_in(self.specialist_dir(task)) is not None

    def specialist_source(self, task: str) -> str:
        """Where a task's specialist is read from: the user's, or the one trained here."""
        return self.external_specialists.get(task, str(self.specialist_dir(task)))

    @property
    def losses_dir(self) -> Path:
        """The reference-loss dataset: a folder per task."""
        return self.output_dir / "reference_losses"

    def losses_folder(self, task: str) -> Path:
        """Where a task's reference losses are: the ready ones, or those computed here."""
        return self.shared_losses.parts[task].folder if task in self.shared_tasks else self.losses_dir / task

    def generalist_dir(self, strategy: str) -> Path:
        """The folder of a trained generalist."""
        return self.output_dir / "generalists" / strategy
