"""What base and specialist achieve on every pair, as a dataset: a folder per task with Parquet files and a fingerprint.

Rows hold summed log-probs, not losses, so β and most loss types can change without computing anything again. They are
joined with a user's pairs by `pair_id`, never by position: `DPOTrainer` drops pairs whose prompt fills `max_length`.
"""

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from .errors import AMAError, first_line
from .fingerprint import (
    check_fingerprint,
    model_identity,
    package_versions,
    pairs_identity,
    read_json,
    tokenizer_identity,
    write_json,
)
from .reference_columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS, has_columns
from .run_settings import RunSettings
from .scoring import ScoringTrainer, reference_policy, score_pairs, trained_policy
from .tasks import PAIR_ID_COLUMN, TASK_COLUMN


_FINGERPRINT_FILE = "fingerprint.json"
_TEXT_COLUMNS = ("prompt", "chosen", "rejected")
_TOKEN_COLUMNS = ("chosen_tokens", "rejected_tokens")


def reference_fingerprint(settings: RunSettings, task: str) -> dict[str, Any]:
    """Everything that decides the log-probs of a task's pairs."""
    args = settings.training_args
    held_out = settings.pairs_of(task, "test")
    return {
        "task": task,
        "base_model": settings.base_identity,
        "specialist": model_identity(settings.specialist_source(task)),
        "tokenizer": tokenizer_identity(settings.tokenizer),
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "dtype": args.model_init_kwargs["dtype"],
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "quantization": str(settings.quantization_config().to_diff_dict()) if settings.quantization_config() else None,
        "attn_implementation": args.model_init_kwargs.get("attn_implementation"),
        "train_pairs": pairs_identity(settings.pairs_of(task, "train")),
        "test_pairs": None if held_out is None else pairs_identity(held_out),
        "versions": package_versions(),
    }


def reference_losses_done(settings: RunSettings, task: str) -> bool:
    """Whether a task's reference losses are there.

    Raises:
        AMAError: If they are there but something else made them; the message names the field and both values.
    """
    note = read_json(settings.losses_dir / task / _FINGERPRINT_FILE)
    if note is None:
        return False
    check_fingerprint(
        reference_fingerprint(settings, task),
        note["fingerprint"],
        f"The reference losses of task '{task}' in '{settings.losses_dir / task}' were",
        "Set the old value, or delete that folder and run `trl ama-losses --config …` again.",
    )
    return True


def compute_reference_losses(settings: RunSettings) -> DatasetDict:
    """Score every pair with the base and its task's specialist, and save each task when it is complete.

    One base model is in memory; specialists are adapters switched on it. Tasks that are there already are not scored
    again.

    Returns:
        `DatasetDict` with `train` and, if there are held-out pairs, `test`.

    Raises:
        AMAError: If a specialist is missing or of another base model, or losses that are there were made by other settings.
    """
    remaining = [task for task in settings.task_names if not reference_losses_done(settings, task)]
    if remaining:
        numbers = [settings.task_names.index(task) for task in remaining]
        parts = {
            split: part.filter(lambda batch: [task in numbers for task in batch[TASK_COLUMN]], batched=True)
            for split, part in settings.data.items()
        }
        parts = {split: part for split, part in parts.items() if len(part)}
        trainer = ScoringTrainer(
            model=settings.model_name,
            args=settings.scoring_arguments(),
            train_dataset=parts["train"],
            eval_dataset=parts.get("test"),
            quantization_config=settings.quantization_config(),
            peft_config=settings.peft_config(),
        )
        prepared = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
        for task in remaining:
            _score_task(settings, trainer, task, {split: prepared[split] for split in parts})
        del trainer
        gc.collect()
    return load_reference_losses(settings.losses_dir, settings.task_names)


def _score_task(settings: RunSettings, trainer: ScoringTrainer, task: str, prepared: dict[str, Dataset]) -> None:
    number = settings.task_names.index(task)
    splits = {
        split: part.select(np.flatnonzero(np.asarray(part[TASK_COLUMN]) == number)) for split, part in prepared.items()
    }
    splits = {split: part for split, part in splits.items() if len(part)}
    columns: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    for policy, names in (("base", REFERENCE_COLUMNS), (task, SPECIALIST_COLUMNS)):
        context = (
            reference_policy(trainer)
            if policy == "base"
            else trained_policy(trainer, f"the specialist of task '{task}'", settings.specialist_source(task))
        )
        with context as model:
            for split, part in splits.items():
                scores = score_pairs(
                    trainer, model, part, f"{task}, {split}: {'base' if policy == 'base' else 'specialist'}"
                )
                columns[split] |= dict(zip(names, (scores["chosen_logps"], scores["rejected_logps"]), strict=True))
                columns[split] |= {name: scores[name] for name in _TOKEN_COLUMNS}
    tables = {}
    for split, part in splits.items():
        kept = [TASK_COLUMN, PAIR_ID_COLUMN, *(_TEXT_COLUMNS if settings.pipeline_args.include_text else ())]
        table = part.select_columns(kept).flatten_indices()
        for name in (*LOGP_COLUMNS, *_TOKEN_COLUMNS):
            table = table.add_column(name, columns[split][name])
        tables[split] = table.map(
            lambda batch: {TASK_COLUMN: [task] * len(batch[TASK_COLUMN])},
            batched=True,
            features=_named_task_features(table),
        )
        has_columns(tables[split], LOGP_COLUMNS, f"The scored pairs of task '{task}' ({split})")
    given = {split: settings.pairs_of(task, split) for split in settings.data}
    kept = {split: set(part[PAIR_ID_COLUMN]) for split, part in splits.items()}
    dropped = {
        split: sorted(set(part[PAIR_ID_COLUMN]) - kept.get(split, set()))
        for split, part in given.items()
        if part is not None
    }
    if trainer.accelerator.is_main_process:
        save_reference_losses(settings.losses_dir, task, tables, reference_fingerprint(settings, task), dropped)
    trainer.accelerator.wait_for_everyone()


def _named_task_features(table: Dataset):
    from datasets import Features, Value

    return Features({**table.features, TASK_COLUMN: Value("string")})


def save_reference_losses(
    folder: Path, task: str, tables: dict[str, Dataset], fingerprint: dict[str, Any], dropped: dict[str, list[str]]
) -> None:
    """Save one task's splits; the folder appears whole or not at all.

    Args:
        folder (`Path`): The reference-loss dataset.
        task (`str`): Becomes a folder in it.
        tables (`dict[str, Dataset]`): The rows of each split.
        fingerprint (`dict`): See [`reference_fingerprint`].
        dropped (`dict[str, list[str]]`): Ids of the pairs of each split that `DPOTrainer` drops.
    """
    temporary = folder / f".{task}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for split, table in tables.items():
        table.to_parquet(str(temporary / f"{split}.parquet"))
    write_json(temporary / _FINGERPRINT_FILE, {"version": 1, "fingerprint": fingerprint, "dropped": dropped})
    shutil.rmtree(folder / task, ignore_errors=True)
    temporary.rename(folder / task)


def load_reference_losses(folder: str | Path, tasks: list[str]) -> DatasetDict:
    """Load the reference losses of `tasks`.

    Raises:
        AMAError: If a task has none, or a file cannot be read.
    """
    folder = Path(folder)
    found = sorted(path.parent.name for path in folder.glob(f"*/{_FINGERPRINT_FILE}"))
    for task in tasks:
        if task not in found:
            raise AMAError(
                f"Task '{task}' has no reference losses; found {found}. Run `trl ama-losses --config …` first."
            )
    files = {split: [str(folder / task / f"{split}.parquet") for task in tasks] for split in ("train", "test")}
    files = {split: [path for path in paths if Path(path).is_file()] for split, paths in files.items()}
    try:
        return load_dataset("parquet", data_files={split: paths for split, paths in files.items() if paths})
    except Exception as error:  # pyarrow and datasets raise many kinds; all mean a damaged file
        raise AMAError(
            f"The reference losses in '{folder}' cannot be read: {first_line(error)} Delete the damaged task's folder and run "
            "`trl ama-losses --config …` again."
        ) from error


def dropped_pairs(folder: str | Path, tasks: list[str]) -> dict[str, set[str]]:
    """Ids of each task's pairs that `DPOTrainer` drops, over all splits."""
    notes = {task: read_json(Path(folder) / task / _FINGERPRINT_FILE) or {} for task in tasks}
    return {task: {name for ids in note.get("dropped", {}).values() for name in ids} for task, note in notes.items()}


def join_reference_losses(dataset: Dataset, losses: Dataset, dropped: dict[str, set[str]] | None = None) -> Dataset:
    """Add the log-prob columns to a dataset of pairs, by task and `pair_id`.

    Args:
        dataset (`Dataset`): Pairs with `task` (ClassLabel) and `pair_id`. # N rows
        losses (`Dataset`): Reference losses with `task` names, `pair_id` and the columns of `LOGP_COLUMNS`.
        dropped (`dict[str, set[str]]`, *optional*): Pairs that are known to be left out, by task; they leave `dataset` too.

    Returns:
        `Dataset` with the columns added. # at most N rows

    Raises:
        AMAError: If a pair that is not known to be dropped has no reference losses, or they are not finite.
    """
    has_columns(losses, LOGP_COLUMNS, "The reference-loss dataset")
    row_of = {key: row for row, key in enumerate(zip(losses[TASK_COLUMN], losses[PAIR_ID_COLUMN], strict=True))}
    names = dataset.features[TASK_COLUMN].names
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
        joined = joined.add_column(column, np.asarray(losses[column], dtype=np.float32)[rows])
    return joined


def joined_data(settings: RunSettings) -> DatasetDict:
    """The run's pairs with their reference losses."""
    losses = load_reference_losses(settings.losses_dir, settings.task_names)
    dropped = dropped_pairs(settings.losses_dir, settings.task_names)
    for split, part in settings.data.items():
        if split not in losses:
            raise AMAError(
                f"The reference losses in '{settings.losses_dir}' have no {split} split, but this run has {len(part)} {split} "
                "pairs. Delete that folder and run `trl ama-losses --config …` again, or use the data they were made from."
            )
    return DatasetDict(
        {split: join_reference_losses(part, losses[split], dropped) for split, part in settings.data.items()}
    )
