"""k preference datasets -> one dataset with a `task` column, and the checks that it must pass."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from ..common.arrays import encoded_column, with_class_labels
from ..common.errors import AMAError, nearest, short
from ..common.fingerprint import digest
from .config import check_task_names
from .features import unite_features
from .forms import PAIR_COLUMNS, TEMPLATE_COLUMNS, pair_id_of
from .images import has_images, seen_images


TASK_COLUMN = "task"
PAIR_ID_COLUMN = "pair_id"


def task_names_of(dataset: Dataset, role: str = "train_dataset") -> list[str]:
    """The names of a dataset's tasks, in ClassLabel order or else sorted.

    Raises:
        AMAError: If there is no `task` column, a name is unusable, or a ClassLabel name has no rows.
    """
    if TASK_COLUMN not in (dataset.column_names or []):
        raise AMAError(
            f"{role} has no 'task' column; found {dataset.column_names}. Add one that names each pair's task, e.g. "
            "dataset.add_column('task', ['helpful'] * len(dataset))."
        )
    is_label = isinstance(dataset.features[TASK_COLUMN], ClassLabel)
    if not is_label and not isinstance(dataset.features[TASK_COLUMN], Value):
        raise AMAError(
            f"The 'task' column of {role} holds {type(dataset.features[TASK_COLUMN]).__name__}s. Give every row one name of a task."
        )
    codes, names = encoded_column(dataset, TASK_COLUMN)
    if (codes < 0).any():
        raise AMAError(f"{role} has rows whose 'task' is empty. Name the task of every row, or drop those rows.")
    counts = np.bincount(codes, minlength=len(names))
    present = [name for name, count in zip(names, counts, strict=True) if count]
    empty = [name for name in names if name not in present]
    if empty and is_label and role == "train_dataset":
        raise AMAError(
            f"Task '{empty[0]}' has no rows in {role}; tasks with rows are {present}. Remove it from the ClassLabel names, "
            "or add its pairs."
        )
    names = present if is_label else sorted(present)
    check_task_names(names)
    return names


def with_task_labels(dataset: Dataset, names: list[str], role: str = "train_dataset") -> Dataset:
    """Encode the `task` column as ClassLabel over `names`, so that it holds task numbers in one order everywhere.

    Raises:
        AMAError: If the dataset has a task that is not in `names`.
    """
    unknown = [name for name in task_names_of(dataset, role) if name not in names]
    if unknown:
        raise AMAError(
            f"{role} has task '{unknown[0]}', which is not among the training tasks {names}.{nearest(unknown[0], names)} "
            "Rename it, or drop its rows."
        )
    feature = dataset.features[TASK_COLUMN]
    if isinstance(feature, ClassLabel) and list(feature.names) == names:
        return dataset
    return with_class_labels(dataset, TASK_COLUMN, names)


def add_pair_ids(dataset: Dataset, where: str = "The dataset of pairs") -> Dataset:
    """Add the `pair_id` column, from `prompt` (if any), `chosen`, `rejected` and what else decides what the model is given.

    Raises:
        AMAError: If an image cannot be read. `where` says whose it is.
    """
    if PAIR_ID_COLUMN in dataset.column_names:
        return dataset
    columns = [name for name in (*PAIR_COLUMNS, *TEMPLATE_COLUMNS) if name in dataset.column_names]
    if has_images(dataset):
        rows = zip(dataset.select_columns(columns), seen_images(dataset, where), strict=True)
        return dataset.add_column(PAIR_ID_COLUMN, [pair_id_of(row, seen) for row, seen in rows])

    def name(*values: Any) -> dict[str, str]:
        return {PAIR_ID_COLUMN: pair_id_of(dict(zip(columns, values, strict=True)))}

    # With `input_columns` they are not written again, which rounds numbers in columns of Json
    return dataset.map(name, input_columns=columns, desc="Naming the pairs")


def check_same_form(parts: dict[str, Dataset]) -> None:
    """Raise an `AMAError` if the pairs of some tasks are plain text and those of others messages."""
    kinds = {name: part.features["chosen"] for name, part in parts.items() if "chosen" in part.features}
    plain = [name for name, kind in kinds.items() if isinstance(kind, Value)]
    messages = [name for name in kinds if name not in plain]
    if plain and messages:
        raise AMAError(
            f"The pairs of task '{plain[0]}' are plain text, and those of task '{messages[0]}' are messages. Set "
            f"`format: single_turn` on '{plain[0]}', which makes messages of a question and its answers."
        )


def _type_of(features: Features, column: str) -> str:
    return f"of type {short(features[column], 100)}" if column in features else "missing"


def concatenate_tasks(parts: dict[str, Dataset], names: list[str] | None = None) -> Dataset:
    """Concatenate the tasks' pairs and add the `task` column, a ClassLabel over `names`.

    Columns that only some tasks have, or that differ in type, become one as far as no row changes ([`unite_features`]).

    Args:
        parts (`dict`): Task → its pairs, of one or more tasks.
        names (`list[str]`, *optional*): All tasks, in the order of their numbers; those of `parts` by default.

    Raises:
        AMAError: If some are plain text and others messages, or the parts' columns cannot be made the same.
    """
    names = list(parts) if names is None else names
    check_task_names(names)
    check_same_form(parts)
    parts = dict(zip(parts, unite_features(list(parts.values()), list(parts)), strict=True))
    first = next(iter(parts))
    label = ClassLabel(names=names)
    labelled = []
    for name, part in parts.items():
        if part.features != parts[first].features:
            ours, theirs = part.features, parts[first].features
            column = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
            raise AMAError(
                f"Column '{column}' of task '{name}' is {_type_of(ours, column)}, that of task '{first}' is "
                f"{_type_of(theirs, column)}. Bring all tasks into one format, e.g. with `columns`."
            )
        numbers = np.full(len(part), names.index(name))
        labelled.append(part.add_column(TASK_COLUMN, numbers, feature=label))
    return concatenate_datasets(labelled)


_pairs_seen: dict[str, str] = {}


def pairs_identity(dataset: Dataset) -> str:
    """Hash of the pairs of a dataset, in order."""
    key = dataset._fingerprint  # datasets' own name for these rows; hashing a large task once is enough
    if key not in _pairs_seen:
        _pairs_seen[key] = digest(*dataset[PAIR_ID_COLUMN])
    return _pairs_seen[key]
