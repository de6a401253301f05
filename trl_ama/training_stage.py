"""Training that is done once: skipped when finished under the same fingerprint, resumed when it was stopped."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer

from .fingerprint import check_fingerprint, read_json, write_json
from .processes import from_main
from .tracking import begin_runs, finish_runs
from .versions import VERSIONS, check_version


_STAGE_FILE = "stage.json"


class TrainingStage:
    """One folder with one trained model and a note of what made it.

    Args:
        folder (`Path`): Where the model and its checkpoints go.
        what (`str`): For messages, e.g. `"Specialist 'code'"`.
        fingerprint (`dict`): Everything that decides the result.
    """

    def __init__(self, folder: Path, what: str, fingerprint: dict[str, Any]):
        self.folder = folder
        self.what = what
        self.fingerprint = fingerprint

    def check(self) -> None:
        """Raise an `AMAError` if the folder holds something that other settings made."""
        note = self._note()
        if note is not None:
            check_fingerprint(
                self.fingerprint,
                note["fingerprint"],
                f"{self.what} in '{self.folder}' was",
                "Choose another output_dir, delete that folder, or set the old value.",
            )

    def _note(self) -> dict[str, Any] | None:
        note = read_json(self.folder / _STAGE_FILE)
        if note is not None:
            check_version(self.folder / _STAGE_FILE, note, f"delete '{self.folder}' and train it again")
        return note

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` noted; `None` if the training is not finished."""
        note = self._note()
        return note.get("result") if note is not None else None

    @property
    def state(self) -> str:
        """`"done"`, `"stopped at step N"` or `"to do"`."""
        if self.result is not None:
            return "done"
        checkpoint = self._last_checkpoint()
        return f"stopped at step {checkpoint.rsplit('-', 1)[-1]}" if checkpoint else "to do"

    def _last_checkpoint(self) -> str | None:
        if not self.folder.is_dir() or self._note() is None:
            return None
        return get_last_checkpoint(str(self.folder))

    def train(self, trainer: DPOTrainer) -> None:
        """Train from the start or from the last checkpoint, and save the model and the trainer's state."""
        checkpoint = from_main(self._last_checkpoint)
        trainer.accelerator.print(
            f"\n{self.what}: {'resuming from ' + checkpoint if checkpoint else 'training'}", flush=True
        )
        if trainer.args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)  # asked for no progress bars, so spare them the log lines too
        from_main(lambda: self._note(None))
        try:
            begin_runs(trainer, self.folder)
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model(str(self.folder), _internal_call=True)  # pushed later, with its card
            trainer.save_state()
        except BaseException:
            finish_runs(exit_code=1)
            raise

    def _note(self, result: dict[str, Any] | None) -> None:
        note = {"version": VERSIONS[_STAGE_FILE], "fingerprint": self.fingerprint, "result": result}
        write_json(self.folder / _STAGE_FILE, note)

    def finish(self, result: dict[str, Any]) -> None:
        """Note the result: from now on the stage is done, and so are its runs in trackers."""
        from_main(lambda: self._note(result))  # on no process earlier than all files of the stage are there
        finish_runs()
        figures = (
            f"{key.replace('_', ' ')} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float))
        )
        if PartialState().is_main_process:
            print(f"{self.what}: done, {', '.join(figures)}", flush=True)
