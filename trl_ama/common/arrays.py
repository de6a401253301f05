"""Columns of a dataset as arrays, without a Python object for each row.

`dataset[column]` is lazy and hands out row after row, so that `np.asarray` of it takes minutes for millions of rows, and
`dataset[column][:]` makes a list of them all. Arrow has the same numbers in one piece, or in a few.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, concatenate_datasets


def numpy_column(dataset: Dataset, column: str) -> np.ndarray:
    """A column of numbers or of a `ClassLabel`; what is missing is NaN. # (N,)"""
    return _in_order(dataset, dataset.data.column(column).to_numpy())


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The length of each row's list in a column of lists. # (N,)"""
    return _in_order(dataset, pc.list_value_length(dataset.data.column(column)).to_numpy())


def encoded_column(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """A column as codes, −1 where it is missing, and the names that they stand for, not all of which need occur. # (N,)"""
    codes, names = _stored_codes(dataset, column)
    return _in_order(dataset, codes), names


def with_columns(dataset: Dataset, columns: Mapping[str, np.ndarray | list]) -> Dataset:
    """Add columns of numbers or texts, all at once: `add_column` copies what is known of a dataset for each. # (N,) each"""
    if not columns or not len(dataset):  # of which `concatenate_datasets` would leave them out
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        return dataset
    info = dataset.info.copy()
    info.features = None  # to be those of both
    return concatenate_datasets([dataset, Dataset.from_dict(dict(columns))], info=info, split=dataset.split, axis=1)


def with_class_labels(dataset: Dataset, column: str, names: list[str]) -> Dataset:
    """Encode a column, all of whose values are in `names`, as ClassLabel over them.

    `cast_column` rewrites every column of every row, and `add_column` does so after a `select` or `shuffle`.
    """
    codes, theirs = _stored_codes(dataset, column)
    ours = np.array([names.index(name) if name in names else -1 for name in theirs] + [-1], dtype=np.int64)
    # All stored rows, also those that a selection leaves out: then its row numbers go on holding
    stored = Dataset(dataset.data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint)
    label = ClassLabel(names=names)
    stored = stored.rename_column(column, f"{column}, as it was").add_column(column, ours[codes], feature=label)
    stored = stored.select_columns(dataset.column_names)
    labelled = Dataset(
        stored.data,
        info=stored.info,
        split=stored.split,
        indices_table=dataset._indices,
        fingerprint=stored._fingerprint,
    )
    return labelled.with_format(**dataset.format)


def _stored_codes(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    values, feature = dataset.data.column(column), dataset.features[column]
    if isinstance(feature, ClassLabel):
        return values.fill_null(-1).to_numpy(), list(feature.names)
    encoded = values.dictionary_encode().unify_dictionaries()
    if encoded.num_chunks == 0:
        return np.zeros(0, dtype=np.int32), []
    codes = pa.chunked_array([chunk.indices for chunk in encoded.chunks]).fill_null(-1).to_numpy()
    return codes, [str(value) for value in encoded.chunk(0).dictionary.to_pylist()]


def _in_order(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Stored values as the dataset's rows: `select`, `shuffle` and `filter` leave the table alone and note row numbers."""
    rows = dataset._indices
    return values if rows is None else values[rows.column(0).to_numpy()]
