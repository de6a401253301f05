"""The four log-prob columns that let a dataset carry its reference losses, and what may be wrong with them."""

from typing import Any

import numpy as np
from datasets import Dataset, Value
from trl import DPOTrainer

from .columns import numpy_column
from .errors import AMAError
from .policies import trained_policy
from .scoring import score_pairs, score_reference_and_specialist
from .tasks import TASK_COLUMN


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


def add_logp_columns(
    trainer: DPOTrainer, dataset: Dataset, task_names: list[str], specialists: dict, split: str
) -> Dataset:
    """Add the columns of `LOGP_COLUMNS` that are missing, each pair scored by the reference and its task's specialist.

    Args:
        trainer (`DPOTrainer`): Holds the base model.
        dataset (`Dataset`): Prepared pairs with `task` numbers. # N rows
        task_names (`list[str]`): Names of those numbers.
        specialists (`dict`): Task name to adapter path, Hub id or model.
        split (`str`): For the progress bars.
    """
    given = REFERENCE_COLUMNS[0] in dataset.column_names
    missing = SPECIALIST_COLUMNS if given else LOGP_COLUMNS
    columns = {column: np.zeros(len(dataset), dtype=np.float32) for column in missing}
    tasks = numpy_column(dataset, TASK_COLUMN)
    for index, task in enumerate(task_names):
        rows = np.flatnonzero(tasks == index)
        if len(rows) == 0:
            continue
        who, pairs, text = (
            f"the specialist of task '{task}'",
            dataset.select(rows),
            f"Reference losses, {task}, {split}",
        )
        if given:
            with trained_policy(trainer, who, specialists[task]) as model:
                scores = {
                    f"specialist_{key}": values for key, values in score_pairs(trainer, model, pairs, text).items()
                }
        else:
            scores = score_reference_and_specialist(trainer, who, specialists[task], pairs, text)
        for column, values in columns.items():
            values[rows] = scores[column]
    for column, values in columns.items():
        dataset = dataset.add_column(column, values)
    return dataset
