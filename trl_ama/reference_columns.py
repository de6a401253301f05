"""The four log-prob columns that let a dataset carry its reference losses, and what may be wrong with them."""

from typing import Any

import numpy as np
from datasets import Dataset, Value

from .columns import numpy_column
from .errors import AMAError


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
