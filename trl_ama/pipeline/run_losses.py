"""What base and specialist achieve on every pair: checked against this run, and joined with its pairs."""

from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from datasets import DatasetDict

from ..common.errors import AMAError
from ..common.fingerprint import check_fingerprint
from ..recipe.fingerprint import reference_fingerprint
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.settings import RunSettings
from ..reference_losses.columns import join_reference_losses
from ..reference_losses.dataset import ReferenceLosses
from ..reference_losses.files import TaskLosses, damaged_file, read_note, read_task, tasks_in
from ..reference_losses.shards import check_unfinished
from ..tasks.loading import prompt_fits_into
from ..tasks.pairs import PAIR_ID_COLUMN


logger = get_logger(__name__)

_named: set[str] = set()  # damages that were told


def reference_losses_done(settings: RunSettings, task: str) -> bool:
    """Whether a task's reference losses are there.

    Raises:
        AMAError: If they, or a part of them, are there but something else made them; the message names the field and both
            values.
    """
    folder = settings.losses_folder(task)
    shared = task in settings.inputs.shared_tasks
    where = f"'{settings.recipe.pipeline_args.reference_losses}'" if shared else f"'{folder}'"
    note = read_note(folder, where)
    if note is None and shared:
        return False
    ours = reference_fingerprint(settings, task)
    if note is None:
        check_unfinished(settings.folder.shards(task), ours)
        return False
    check_fingerprint(
        ours,
        {field: note["fingerprint"].get(field) for field in ours},
        f"The reference losses of task '{task}' in {where} were",
        "Set the old value, or compute them yourself: leave the task out of `reference_losses`."
        if shared
        else "Set the old value, or delete that folder and run `trl ama-losses --config …` again.",
    )
    damaged = None if shared else damaged_file(folder, note)
    if damaged is not None:
        told = (
            f"The reference losses of task '{task}' in {where} are damaged: '{damaged}' is not what was written. They are computed "
            "again."
        )
        if told not in _named:
            logger.warning(told)
            _named.add(told)
    return damaged is None


def reference_losses_of(settings: RunSettings, tasks: list[str] | None = None) -> list[TaskLosses]:
    """The reference losses of the run's tasks, read and checked.

    Raises:
        AMAError: If a task has none, or they cannot be read or used.
    """
    inputs, tasks = settings.inputs, tasks or settings.recipe.task_names
    found = sorted({*tasks_in(settings.folder.losses), *inputs.shared_tasks})
    missing = [task for task in tasks if task not in found]
    if missing:
        also = f" (nor have {missing[1:]})" if len(missing) > 1 else ""
        raise AMAError(
            f"Task '{missing[0]}' has no reference losses{also}; found {found}. Run `trl ama-losses --config …` first."
        )
    return [
        inputs.shared_losses.parts[task]
        if task in inputs.shared_tasks
        else _read_once(settings.folder.losses_of(task), task, inputs.losses_read)
        for task in tasks
    ]


def _read_once(folder: Path, task: str, known: dict[str, tuple[list, TaskLosses]]) -> TaskLosses:
    """Read and check a task's files; again only if one of them is another, because every stage of a run asks for them."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    files = [(name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
    if known.get(task, (None, None))[0] != files:
        known[task] = (files, read_task(folder, task))
    return known[task][1]


def joined_data(settings: RunSettings) -> DatasetDict:
    """The run's pairs with their reference losses."""
    parts = reference_losses_of(settings)
    losses = ReferenceLosses(parts)
    dropped = {part.task: part.dropped for part in parts}
    _check_dropped(settings.recipe, settings.inputs, dropped)
    pairs = settings.inputs.data
    for split, data in pairs.items():
        if split not in losses:
            raise AMAError(
                f"The reference losses in '{settings.folder.losses}' have no {split} split, but this run has {len(data)} {split} "
                "pairs. Delete that folder and run `trl ama-losses --config …` again, or use the data they were made from."
            )
    return DatasetDict({split: join_reference_losses(part, losses[split], dropped) for split, part in pairs.items()})


def _check_dropped(recipe: Recipe, inputs: RunInputs, dropped: dict[str, set[str]]) -> None:
    """Raise an `AMAError` if ready losses leave out pairs of the user's that `DPOTrainer` does not drop here."""
    args = recipe.training_args
    cuts = args.max_length is not None and args.truncation_mode == "keep_start"
    fits = prompt_fits_into(inputs.processor, args.max_length) if cuts else lambda row: True
    for task in inputs.shared_tasks:
        for split in inputs.data:
            pairs = inputs.pairs_of(task, split)
            if pairs is None or not dropped[task]:
                continue
            left_out = np.flatnonzero([name in dropped[task] for name in pairs[PAIR_ID_COLUMN][:]])
            count = sum(map(fits, pairs.select(left_out)))
            if count:
                raise AMAError(
                    f"The reference losses in '{recipe.pipeline_args.reference_losses}' leave out {count} {split} pairs of task "
                    f"'{task}' as too long for max_length ({args.max_length}), which they are not. Compute them yourself: leave the "
                    "task out of `reference_losses`."
                )
