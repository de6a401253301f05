"""Training that is done once: skipped when finished under the same fingerprint, resumed when it was stopped."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import PrinterCallback, Trainer

from ..common.errors import AMAError, first_line
from ..common.files import check_seal, describe_files, first_damage, read_json, sealed, sync, write_json
from ..common.fingerprint import check_fingerprint
from ..common.processes import from_main
from ..common.run_folder import STAGE_FILE
from ..common.versions import VERSIONS, check_version
from .checkpoints import (
    Found,
    complete_checkpoint,
    could_not_write,
    newest_good_checkpoint,
    read_manifest,
    remove_checkpoint,
    remove_checkpoints,
)
from .tracking import begin_runs, finish_runs


logger = get_logger(__name__)

_OLD_KEYS = {"fingerprint", "result"}  # of notes before they had a seal and a list of files
# Files of the final model that may change later: cards, and what nobody reads as numbers
_NOT_TRUSTED = {STAGE_FILE, "README.md", "training_args.bin"}
_named: set[str] = set()  # damages that were told


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The note of a stage; `None` if there is none.

    Raises:
        AMAError: If it is damaged, or of a newer version.
    """
    path = folder / STAGE_FILE
    note = read_json(path)
    if note is None:
        return None
    check_version(path, note, f"delete '{folder}' and train it again")
    if set(note) - {"version"} != _OLD_KEYS:
        check_seal(note, path)
    return note


def result_in(folder: Path) -> dict[str, Any] | None:
    """What a finished stage in a folder noted; `None` if it is not finished, or a file of its model is damaged.

    Raises:
        AMAError: If its note is damaged.
    """
    note = read_stage(folder)
    if note is None or note["result"] is None:
        return None
    damage = first_damage(folder, note.get("files") or {})
    if damage is not None:
        told = f"The model in '{folder}' is damaged: {damage}. It is made again."
        if told not in _named:
            logger.warning(told)
            _named.add(told)
        return None
    return note["result"]


class TrainingStage:
    """One folder with one trained model and a note of what made it.

    Args:
        folder (`Path`): Where the model and its checkpoints go.
        what (`str`): For messages, e.g. `"Specialist 'code'"`.
        fingerprint (`dict`): Everything that decides the result.
        reuse (`str`, *optional*): How to keep what other settings made, a sentence for the message that refuses it.
    """

    def __init__(self, folder: Path, what: str, fingerprint: dict[str, Any], reuse: str = ""):
        self.folder = folder
        self.what = what
        self.fingerprint = fingerprint
        self.reuse = reuse

    def check(self) -> None:
        """Raise an `AMAError` if the folder holds something that other settings made."""
        note = read_stage(self.folder)
        if note is not None:
            check_fingerprint(
                self.fingerprint,
                note["fingerprint"],
                f"{self.what} in '{self.folder}' was",
                f"Choose another output_dir, delete that folder, or set the old value. {self.reuse}".rstrip(),
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` noted; `None` if the training is not finished, or its model is damaged."""
        return result_in(self.folder)

    @property
    def state(self) -> str:
        """`"done"`, `"stopped at step N"` or `"to do"`."""
        if self.result is not None:
            return "done"
        # Their contents are looked at when they are used
        step = self._newest_good(best=False, by_size=True).step
        return f"stopped at step {step}" if step else "to do"

    def _newest_good(self, best: bool, by_size: bool = False) -> Found:
        note = read_stage(self.folder)
        if note is None:
            return Found()
        return newest_good_checkpoint(self.folder, best=best, unlisted="files" not in note, by_size=by_size)

    def _begin(self, best: bool) -> str | None:
        """Find the checkpoint to go on from, and put what cannot be used out of the way; on the main process."""
        found = self._newest_good(best)
        for path, reason in found.bad:
            logger.warning(
                f"{self.what}: the checkpoint '{path}' is not used and is removed: {reason}. "
                + (f"'{found.good.name}' is used." if found.good is not None else "Training begins again.")
            )
            remove_checkpoint(path)
        if found.good is None:
            remove_checkpoints(self.folder)
        elif read_manifest(found.good) is None:
            complete_checkpoint(found.good)  # of an older version: from here on it is known
        self._note(None, {})
        return str(found.good) if found.good is not None else None

    def _note(self, result: dict[str, Any] | None, files: dict[str, dict[str, Any]]) -> None:
        note = {"version": VERSIONS[STAGE_FILE], "fingerprint": self.fingerprint, "result": result, "files": files}
        write_json(self.folder / STAGE_FILE, sealed(note))

    def train(self, trainer: Trainer) -> None:
        """Train from the start or from the newest good checkpoint, and save the model and the trainer's state."""
        checkpoint = from_main(lambda: self._begin(trainer.args.load_best_model_at_end))
        trainer.accelerator.print(
            f"\n{self.what}: {'resuming from ' + checkpoint if checkpoint else 'training'}", flush=True
        )
        if trainer.args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)  # asked for no progress bars, so spare them the log lines too
        trainer.stage_name = self.what[0].lower() + self.what[1:]
        try:
            begin_runs(trainer, self.folder)
            trainer.train(resume_from_checkpoint=checkpoint)
            self._save(trainer)
        except BaseException:
            finish_runs(exit_code=1)
            raise

    def _save(self, trainer: Trainer) -> None:
        try:
            trainer.save_model(str(self.folder), _internal_call=True)  # pushed later, with its card
            trainer.save_state()
        except Exception as error:
            if not could_not_write(error):
                raise
            raise AMAError(
                f"{self.what} is trained, but could not be saved in '{self.folder}' ({first_line(error)}). Make room on the disk and "
                "run again, which goes on from the last checkpoint."
            ) from error

    def _note_finished(self, result: dict[str, Any]) -> None:
        paths = [path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        names = sorted(path.name for path in paths if path.name not in _NOT_TRUSTED and path.suffix != ".png")
        for name in names:
            sync(self.folder / name)
        self._note(result, describe_files(self.folder, names))

    def finish(self, result: dict[str, Any]) -> None:
        """Note the result and the files of the model: from now on the stage is done, and so are its runs in trackers."""
        from_main(lambda: self._note_finished(result))  # on no process earlier than all files of the stage are there
        finish_runs()
        figures = (
            f"{key.replace('_', ' ')} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float))
        )
        if PartialState().is_main_process:
            print(f"{self.what}: done, {', '.join(figures)}", flush=True)
