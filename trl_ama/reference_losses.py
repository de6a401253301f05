"""What base and specialist achieve on every pair: checked against this run, and joined with its pairs.

Rows hold summed log-probs, not losses, so β and most loss types can change without computing anything again. They are
joined with a user's pairs by `pair_id`, never by position: `DPOTrainer` drops pairs whose prompt fills `max_length`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict

from .errors import AMAError
from .fingerprint import check_fingerprint, package_versions
from .loss_dataset import TaskLosses, damaged_file, read_note, read_task, tasks_in
from .loss_shards import check_unfinished
from .loss_sharing import ReferenceLosses
from .model_identity import model_identity
from .reference_columns import LOGP_COLUMNS, TOKEN_COLUMNS, has_columns
from .run_settings import RunSettings
from .task_loading import prompt_fits_into
from .tasks import PAIR_ID_COLUMN, TASK_COLUMN, add_pair_ids, pairs_identity, task_names_of, with_task_labels


logger = get_logger(__name__)

_named: set[str] = set()  # damages that were told


def reference_fingerprint(settings: RunSettings, task: str) -> dict[str, Any]:
    """Everything in this run that decides the log-probs of a task's pairs.

    Of ready reference losses the pairs do not count, because every pair is joined by its id, and the specialist only if the
    recipe names one.
    """
    args = settings.training_args
    fingerprint = {
        "task": task,
        "base_model": settings.base_identity,
        "tokenizer": settings.tokenizer_identity,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "dtype": args.model_init_kwargs["dtype"],
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "quantization": str(settings.quantization_config().to_diff_dict()) if settings.quantization_config() else None,
        "attn_implementation": args.model_init_kwargs.get("attn_implementation"),
    }
    if {fingerprint["dtype"], fingerprint["mixed_precision"]} != {"float32", "no"} or fingerprint["quantization"]:
        # In 16 bits the two paths round differently, by as much as a small excess; in 32 they agree
        fingerprint["prefix_sharing"] = args.prefix_sharing is not False
    if task in settings.external_specialists or settings.has_specialist_folder(task):
        fingerprint["specialist"] = model_identity(settings.specialist_source(task))
    if task not in settings.shared_tasks:
        held_out = settings.pairs_of(task, "test")
        fingerprint |= {
            "train_pairs": pairs_identity(settings.pairs_of(task, "train")),
            "test_pairs": None if held_out is None else pairs_identity(held_out),
            "data": settings.data_source(task),
        }
    return {**fingerprint, "versions": package_versions()}


def reference_losses_done(settings: RunSettings, task: str) -> bool:
    """Whether a task's reference losses are there.

    Raises:
        AMAError: If they, or a part of them, are there but something else made them; the message names the field and both
            values.
    """
    folder = settings.losses_folder(task)
    shared = task in settings.shared_tasks
    where = f"'{settings.pipeline_args.reference_losses}'" if shared else f"'{folder}'"
    note = read_note(folder, where)
    if note is None and shared:
        return False
    ours = reference_fingerprint(settings, task)
    if note is None:
        check_unfinished(shards_folder(settings, task), ours)
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


def shards_folder(settings: RunSettings, task: str) -> Path:
    """What is scored already of a task that is not finished; hidden, so that nothing takes it for a task."""
    return settings.losses_dir / f".{task}.shards"


def reference_losses_of(settings: RunSettings, tasks: list[str] | None = None) -> list[TaskLosses]:
    """The reference losses of the run's tasks, read and checked.

    Raises:
        AMAError: If a task has none, or they cannot be read or used.
    """
    found = sorted({*tasks_in(settings.losses_dir), *settings.shared_tasks})
    missing = [task for task in tasks or settings.task_names if task not in found]
    if missing:
        also = f" (nor have {missing[1:]})" if len(missing) > 1 else ""
        raise AMAError(
            f"Task '{missing[0]}' has no reference losses{also}; found {found}. Run `trl ama-losses --config …` first."
        )
    parts = []
    for task in tasks or settings.task_names:
        if task in settings.shared_tasks:
            parts.append(settings.shared_losses.parts[task])
            continue
        parts.append(_read_once(settings, task))
    return parts


def _read_once(settings: RunSettings, task: str) -> TaskLosses:
    """Read and check a task's files; again only if one of them is another, because every stage of a run asks for them."""
    folder = settings.losses_folder(task)
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    files = [(name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
    if settings.losses_read.get(task, (None, None))[0] != files:
        settings.losses_read[task] = (files, read_task(folder, task))
    return settings.losses_read[task][1]


def join_reference_losses(dataset: Dataset, losses: Dataset, dropped: dict[str, set[str]] | None = None) -> Dataset:
    """Add the log-prob columns to a dataset of pairs, by task and `pair_id`.

    Args:
        dataset (`Dataset`): Pairs with `task`, and `pair_id` or the texts to make it from. # N rows
        losses (`Dataset`): Reference losses with `task` names, `pair_id` and the columns of `LOGP_COLUMNS`.
        dropped (`dict[str, set[str]]`, *optional*): Pairs that are known to be left out, by task; they leave `dataset` too.

    Returns:
        `Dataset` with the columns added. # at most N rows

    Raises:
        AMAError: If a pair that is not known to be dropped has no reference losses, or they are not finite.
    """
    has_columns(losses, LOGP_COLUMNS, "The reference-loss dataset")
    names = task_names_of(dataset, "The dataset of pairs")
    dataset = add_pair_ids(with_task_labels(dataset, names, "The dataset of pairs"))
    names = dataset.features[TASK_COLUMN].names
    row_of = {key: row for row, key in enumerate(zip(losses[TASK_COLUMN][:], losses[PAIR_ID_COLUMN][:], strict=True))}
    keys = [(names[task], name) for task, name in zip(dataset[TASK_COLUMN], dataset[PAIR_ID_COLUMN], strict=True)]
    for task in names:
        lacking = [name for owner, name in keys if owner == task and (owner, name) not in row_of]
        lacking = [name for name in lacking if name not in (dropped or {}).get(task, ())]
        if lacking:
            count = sum(owner == task for owner, _ in keys)
            raise AMAError(
                f"The reference losses lack {len(lacking)} of the {count} pairs of task '{task}' (the first is "
                f"'{lacking[0]}'). Run `trl ama-losses --config …` on this data, or use the data they were made from."
            )
    kept = [row for row, key in enumerate(keys) if key in row_of]
    rows = np.array([row_of[keys[row]] for row in kept], dtype=np.int64)
    joined = dataset.select(kept).flatten_indices() if len(kept) < len(keys) else dataset
    for column in LOGP_COLUMNS:
        joined = joined.add_column(column, np.asarray(losses[column][:], dtype=np.float32)[rows])
    for column in TOKEN_COLUMNS:  # AMATrainer holds them against its own tokenisation
        if column in losses.column_names:
            joined = joined.add_column(column, np.asarray(losses[column][:], dtype=np.int32)[rows])
    return joined


def joined_data(settings: RunSettings) -> DatasetDict:
    """The run's pairs with their reference losses."""
    parts = reference_losses_of(settings)
    losses = ReferenceLosses(parts)
    dropped = {part.task: part.dropped for part in parts}
    _check_dropped(settings, dropped)
    for split, data in settings.data.items():
        if split not in losses:
            raise AMAError(
                f"The reference losses in '{settings.losses_dir}' have no {split} split, but this run has {len(data)} {split} "
                "pairs. Delete that folder and run `trl ama-losses --config …` again, or use the data they were made from."
            )
    return DatasetDict(
        {split: join_reference_losses(part, losses[split], dropped) for split, part in settings.data.items()}
    )


def _check_dropped(settings: RunSettings, dropped: dict[str, set[str]]) -> None:
    """Raise an `AMAError` if ready losses leave out pairs of the user's that `DPOTrainer` does not drop here."""
    args = settings.training_args
    cuts = args.max_length is not None and args.truncation_mode == "keep_start"
    fits = prompt_fits_into(settings.processor, args.max_length) if cuts else lambda row: True
    for task in settings.shared_tasks:
        for split in settings.data:
            pairs = settings.pairs_of(task, split)
            if pairs is None or not dropped[task]:
                continue
            left_out = np.flatnonzero([name in dropped[task] for name in pairs[PAIR_ID_COLUMN][:]])
            count = sum(map(fits, pairs.select(left_out)))
            if count:
                raise AMAError(
                    f"The reference losses in '{settings.pipeline_args.reference_losses}' leave out {count} {split} pairs of task "
                    f"'{task}' as too long for max_length ({args.max_length}), which they are not. Compute them yourself: leave the "
                    "task out of `reference_losses`."
                )
