"""The four log-prob columns that let a dataset carry its reference losses: what may be wrong with them, and how pairs get them.

They hold summed log-probs, not losses, so β and most loss types can change without computing anything again. They are joined
with a user's pairs by `pair_id`, never by position: `DPOTrainer` drops pairs whose prompt fills `max_length`.
"""

from typing import Any

import numpy as np
from datasets import Dataset, Value

from ..common.arrays import numpy_column, with_columns
from ..common.errors import AMAError
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN, add_pair_ids, task_names_of, with_task_labels


REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
SPECIALIST_COLUMNS = ("specialist_chosen_logps", "specialist_rejected_logps")
LOGP_COLUMNS = REFERENCE_COLUMNS + SPECIALIST_COLUMNS
TOKEN_COLUMNS = ("chosen_tokens", "rejected_tokens")  # how many tokens they were summed over


def has_columns(dataset: Dataset | Any, columns: tuple[str, ...], role: str) -> bool:
    """Whether the dataset has all of `columns`. Of streams only their names are looked at.

    Raises:
        AMAError: If it has only some of them, or they hold values that are missing or not finite.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if len(missing) == len(columns):
        return False
    if missing:
        raise AMAError(
            f"{role} has {[column for column in columns if column not in missing]} but lacks {missing}. Give all of them, "
            "or none."
        )
    if not isinstance(dataset, Dataset):
        return True
    for column in columns:
        kind = dataset.features[column]
        if not (isinstance(kind, Value) and kind.dtype.startswith(("float", "int", "uint"))):
            found = kind.dtype if isinstance(kind, Value) else type(kind).__name__
            raise AMAError(
                f"Column '{column}' of {role} is of type {found}, and must hold numbers. Compute it with `trl ama-losses`."
            )
        values = numpy_column(dataset, column).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise AMAError(
                f"Column '{column}' of {role} is missing or not finite in {len(bad)} of {len(values)} pairs (the first in "
                f"row {bad[0]}: {values[bad[0]]}). Compute the reference losses again with `trl ama-losses`, or drop those "
                "pairs."
            )
    return True


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
    added = {column: np.asarray(losses[column][:], dtype=np.float32)[rows] for column in LOGP_COLUMNS}
    for column in TOKEN_COLUMNS:  # AMATrainer holds them against its own tokenisation
        if column in losses.column_names:
            added[column] = np.asarray(losses[column][:], dtype=np.int32)[rows]
    return with_columns(joined, added)
