"""Checkpoints that are whole: a list of their files with size and hash is written last, and looked at before one is used.

A checkpoint is a folder of many files that transformers, PEFT and torch write one after the other. `ama_files.json` in it says
that all of them are there and what they hold. Until then it says that the checkpoint is incomplete.
"""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..common.errors import AMAError
from ..common.files import check_seal, describe_files, first_damage, read_json, sealed, sync, write_json
from ..common.run_folder import STATE_FILE


MANIFEST = "ama_files.json"
_VERSION = 1
_STEP = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d{{1,18}})")
_NOT_TRUSTED = {"README.md", MANIFEST, "checkpoint-is-incomplete.txt"}
_INCOMPLETE = "it is incomplete: the run was stopped while it was written"
_HALF = "a part of its files is gone: the run was stopped while it was removed"
_GOING = ".removed"  # what a checkpoint on its way out is called: hidden, and so no checkpoint to anybody


def begin_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as incomplete, before its first file is written."""
    write_json(folder / MANIFEST, sealed({"version": _VERSION, "complete": False}))


def complete_checkpoint(folder: Path, lacks: str | None = None) -> None:
    """List the files of a checkpoint, all of which are on the disk then; the last thing that is written into it.

    Args:
        folder (`Path`): The checkpoint.
        lacks (`str`, *optional*): What it has not that a training needs to go on to the same numbers.
    """
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _NOT_TRUSTED and not path.name.startswith(f".{MANIFEST}")
    )
    for name in names:
        sync(folder / name)
    for path in {(folder / name).parent for name in names}:
        sync(path)
    files = describe_files(folder, names)
    write_json(folder / MANIFEST, sealed({"version": _VERSION, "complete": True, "lacks": lacks, "files": files}))
    sync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's list says; `None` if it has none, as those of TRL and of older versions.

    Raises:
        AMAError: If the list is damaged or of a newer version.
    """
    path = folder / MANIFEST
    note = read_json(path)
    if note is None:
        return None
    version = note.get("version") if isinstance(note, dict) else None
    if type(version) is int and version > _VERSION:
        raise AMAError(
            f"The checkpoint '{folder}' is of version {version}, this trl-ama reads version {_VERSION}. Resume with the "
            "trl-ama that wrote it."
        )
    check_seal(note if version == _VERSION else None, path)
    return note


def damage_of(folder: Path, by_size: bool = False) -> str | None:
    """Why a checkpoint cannot be used, as half a sentence; `None` if it is whole, or has no list of its files.

    Args:
        folder (`Path`): The checkpoint.
        by_size (`bool`): Whether sizes are enough, for an answer at once.

    Raises:
        AMAError: If it is of a newer version.
    """
    try:
        note = read_manifest(folder)
    except AMAError as error:
        if "of version" in str(error):
            raise
        return f"its list of files '{MANIFEST}' is damaged"
    if note is None:
        return None
    return first_damage(folder, note["files"], by_size) if note["complete"] else _INCOMPLETE


@dataclass
class Found:
    """The newest good checkpoint, and those newer ones that cannot be used, with the reason."""

    good: Path | None = None
    bad: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimizer steps of the good one; 0 without."""
        return step_of(self.good) if self.good is not None else 0


def step_of(checkpoint: Path) -> int:
    """Optimizer steps of a checkpoint, by its name."""
    return int(_STEP.fullmatch(checkpoint.name)[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _STEP.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def newest_good_checkpoint(
    folder: Path, *, best: bool = False, unlisted: bool = False, exact: bool = True, by_size: bool = False
) -> Found:
    """Look at the checkpoints in a folder from the newest to the oldest, until one can be used.

    Args:
        folder (`Path`): The output folder of a training.
        best (`bool`): Whether the best checkpoint so far, which a state names, has to be there and whole, too.
        unlisted (`bool`): Whether a checkpoint without a list of files may be used, as older versions wrote them.
        exact (`bool`): Whether it has to have everything that the same numbers need.
        by_size (`bool`): Whether sizes are enough, for an answer at once.
    """
    result = Found()
    for path in checkpoints_in(folder):
        reason = damage_of(path, by_size)
        note = read_manifest(path) if reason is None else None
        if reason is None and note is None and (not unlisted or not (path / STATE_FILE).is_file()):
            reason = _INCOMPLETE
        if reason is None and exact and note is not None and note["lacks"]:
            reason = f"it lacks {note['lacks']}, without which the numbers would be others"
        if reason is None and best:
            reason = _damage_of_best(path, by_size)
        if reason is None:
            result.good = path
            break
        result.bad.append((path, reason))
    return result


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint at the time of another, beside it; `None` if there was none.

    By what the state says of the folder, as the step with the best metric (`best_global_step`) need not have been saved.
    """
    named = (read_json(checkpoint / STATE_FILE) or {}).get("best_model_checkpoint")
    if not named:
        return None
    return checkpoint.with_name(PurePosixPath(named.replace("\\", "/")).name)  # the folder may have moved since


def _damage_of_best(checkpoint: Path, by_size: bool) -> str | None:
    best = best_of(checkpoint)
    if best is None or best == checkpoint:
        return None
    if not best.is_dir():
        return f"the best checkpoint at that time, '{best.name}', is gone"
    reason = damage_of(best, by_size)
    return reason and f"of the best checkpoint at that time, '{best.name}', {reason}"


def half_of(folder: Path) -> str | None:
    """Why a checkpoint is only a part of one, as half a sentence; `None` if all of its files are there, whatever they hold.

    One without a list of its files, as TRL writes them, is half if it lacks the state that the Trainer writes.
    """
    try:
        note = read_manifest(folder)
    except AMAError:
        return None  # damaged, or of a newer version: not for us to judge
    if note is None:
        return None if (folder / STATE_FILE).is_file() else _HALF
    if not note["complete"]:
        return _INCOMPLETE
    return None if all((folder / name).exists() for name in note["files"]) else _HALF


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, so that a process that is killed while it does leaves nothing that looks like one."""
    going = folder.with_name(f".{folder.name}{_GOING}")
    shutil.rmtree(going, ignore_errors=True)
    try:
        folder.rename(going)
    except OSError:  # a file of it is open, on Windows; or there is none
        going = folder
    shutil.rmtree(going, ignore_errors=True)


def remove_halves(folder: Path) -> list[tuple[Path, str]]:
    """Remove what is left of checkpoints that were not written, or not removed, to the end.

    Returns:
        `list[tuple[Path, str]]`: Those that looked like checkpoints, with the reason.
    """
    for path in folder.glob(f".{PREFIX_CHECKPOINT_DIR}-*{_GOING}"):
        shutil.rmtree(path, ignore_errors=True)
    halves = [(path, reason) for path in checkpoints_in(folder) if (reason := half_of(path)) is not None]
    for path, _ in halves:
        remove_checkpoint(path)
    return halves


def rotate(folder: Path, limit: int | None, best: str | None) -> list[tuple[Path, str]]:
    """Remove the oldest checkpoints beyond a limit, as transformers' `rotate_checkpoints` chooses them among whole ones.

    The last one and the best one stay. transformers counts a half-removed checkpoint as the newest of all, by its time.

    Args:
        folder (`Path`): The output folder of a training, whose last checkpoint is complete.
        limit (`int`, *optional*): How many may stay (`save_total_limit`); all without, or if it is 0 or less.
        best (`str`, *optional*): The best checkpoint.

    Returns:
        `list[tuple[Path, str]]`: Half checkpoints that were removed first, of [`remove_halves`].
    """
    halves = remove_halves(folder)
    if limit is None or limit <= 0:
        return halves
    there = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    kept = {*there[-1:], *([Path(best)] if best is not None else [])}
    surplus = len(there) - max(limit, len(kept))
    for path in [path for path in there if path not in kept][: max(surplus, 0)]:
        remove_checkpoint(path)
    return halves


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in a folder: they are of another training than the one that begins there."""
    for path in checkpoints_in(folder):
        remove_checkpoint(path)
    remove_halves(folder)


def could_not_write(error: Exception) -> bool:
    """Whether an error says that a file could not be written; torch and safetensors have their own for that."""
    if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(words in str(error) for words in ("inline_container.cc", "iostream error", "No space left"))
