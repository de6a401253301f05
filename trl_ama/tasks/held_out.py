"""Held-out pairs: what they may be, and their tasks by the names that the training pairs have."""

from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset

from ..common.errors import AMAError, nearest, short
from .pairs import TASK_COLUMN, with_task_labels


def check_eval_dataset(eval_dataset: Any) -> None:
    """Raise an `AMAError` unless held-out pairs are a dataset, a mapping of names to datasets, or `None`."""
    for part in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
        if not isinstance(part, (Dataset, IterableDataset)) and not (part is None and part is eval_dataset):
            raise AMAError(
                f"eval_dataset must be a datasets.Dataset or a mapping of names to them, found {type(part).__name__}. Leave it out if there "
                "are no held-out pairs."
            )


def label_eval(eval_dataset: Any, task_names: list[str], role: str = "eval_dataset") -> Any:
    """Call the tasks of the held-out pairs as those of the training pairs; datasets without tasks pass as they are.

    A dataset in memory gets their numbers. A stream gets their names, row by row, as its types need not be known and numbers
    would not tell what they stand for; a batch has the numbers.
    """
    if isinstance(eval_dataset, dict):
        return type(eval_dataset)({name: label_eval(part, task_names, role) for name, part in eval_dataset.items()})
    if isinstance(eval_dataset, Dataset) and TASK_COLUMN in eval_dataset.column_names:
        return with_task_labels(eval_dataset, task_names, role)
    if isinstance(eval_dataset, IterableDataset):
        feature = (eval_dataset.features or {}).get(TASK_COLUMN)
        if eval_dataset.features is None or feature is not None:
            theirs = list(feature.names) if isinstance(feature, ClassLabel) else None
            return eval_dataset.map(
                _named, with_indices=True, fn_kwargs={"theirs": theirs, "task_names": task_names, "role": role}
            )
    return eval_dataset


def _named(row: dict[str, Any], index: int, theirs: list[str] | None, task_names: list[str], role: str) -> dict:
    """The task of a row of a stream, by its name.

    Args:
        row (`dict`), index (`int`): The row and its number.
        theirs (`list[str]`, *optional*): What the stream's numbers stand for.
        task_names (`list[str]`): The training tasks.
        role (`str`): What the stream is, for messages.
    """
    if TASK_COLUMN not in row:
        return {}
    task = row[TASK_COLUMN]
    if task is None or (theirs is not None and task == -1):
        raise AMAError(f"Row {index} of {role} has an empty 'task'. Name the task of every row, or drop those rows.")
    name = theirs[task] if theirs is not None and isinstance(task, int) else str(task)
    return {TASK_COLUMN: task_names[task_number(name, task_names, f"Row {index} of {role}")]}


def task_number(name: str, task_names: list[str], where: str) -> int:
    """The number of a task.

    Raises:
        AMAError: If it is none of the training tasks.
    """
    if name not in task_names:
        raise AMAError(
            f"{where} has task {short(name)}, which is not among the training tasks {task_names}.{nearest(name, task_names)} Rename "
            "it, or drop its rows."
        )
    return task_names.index(name)


def eval_parts(eval_dataset: Any) -> dict[str, Dataset]:
    """The map-style datasets in `eval_dataset`, by their name for messages."""
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    return {f"eval_dataset {name}".strip(): part for name, part in parts.items() if isinstance(part, Dataset)}


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset. Of a stream that does not tell them, one row is read."""
    names = dataset.column_names
    return list(next(iter(dataset), {})) if names is None else list(names)
