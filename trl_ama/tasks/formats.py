"""The formats of published preference datasets that a recipe can name, turned into TRL's."""

import warnings
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, Value

from ..common.errors import AMAError, nearest
from .account import RowAccount
from .config import TaskConfig
from .forms import EXTRA_COLUMNS, PAIR_COLUMNS
from .json_messages import read_json_messages, refuse_json_text
from .transcripts import read_transcripts


# Columns by which others (LLaMA-Factory, ms-swift, axolotl) give a part of the model's input
_OF_THE_INPUT = ("system", "system_prompt", "history", "functions", "documents", "instruction", "input", "query")

# Format → the columns it needs
FORMATS = {
    "hh_rlhf": ("chosen", "rejected"),
    "single_turn": PAIR_COLUMNS,
    "json_messages": ("chosen", "rejected"),
}


def warn_of_unread(columns: Iterable[str], task: str) -> None:
    """Tell of columns whose names say that a model should see them, and that nothing reads.

    Args:
        columns (`Iterable[str]`): Names of columns that do not become a part of the pairs.
        task (`str`): For the message.
    """
    for column in sorted({*columns} & {*_OF_THE_INPUT}):
        warnings.warn(
            f"Task '{task}' has a column '{column}', which DPOTrainer does not read: the model will not see it. Write it into "
            "the messages, or leave it out with `columns: [prompt, chosen, rejected]`.",
            UserWarning,
            stacklevel=3,
        )


def own_format(dataset: Dataset, task: TaskConfig, split: str, account: RowAccount) -> Dataset:
    """Apply a task's `columns` and `format`; files of `tasks_dir` are in TRL's format already.

    Args:
        dataset (`Dataset`): The rows as they were read.
        task ([`TaskConfig`]): The task.
        split (`str`): For messages.
        account ([`RowAccount`]): Is told of rows that are no pairs.

    Raises:
        AMAError: If a column that they name is not there, the format is unknown, a row has no string where it needs one, or no row
            is a pair.
    """
    if isinstance(task.columns, dict):
        lacking = [theirs for theirs in task.columns.values() if theirs not in dataset.column_names]
        if lacking:
            raise _no_column(task, lacking[0], dataset)
        warn_of_unread(set(dataset.column_names) - set(task.columns.values()), task.task)
        renamed = {theirs: ours for ours, theirs in task.columns.items() if theirs != ours}
        dataset = dataset.select_columns(list(task.columns.values())).rename_columns(renamed)
    elif task.columns is not None:
        lacking = [column for column in task.columns if column not in dataset.column_names]
        if lacking:
            raise _no_column(task, lacking[0], dataset)
        dataset = dataset.select_columns(task.columns)
    elif task.format is not None:
        warn_of_unread(dataset.column_names, task.task)
    if task.format in (None, "single_turn"):
        refuse_json_text(dataset, task.task, split)
    if task.format is None:
        return dataset
    if task.format not in FORMATS:
        raise AMAError(
            f"Task '{task.task}' has format '{task.format}'; known are {sorted(FORMATS)}. Leave it out for TRL's own."
        )
    needed = FORMATS[task.format]
    for column in needed:
        if column not in dataset.column_names:
            names = ", ".join(f"{name}: …" for name in needed)
            raise AMAError(
                f"Format '{task.format}' of task '{task.task}' needs '{column}'; found {dataset.column_names}. Say which of them it is "
                f"with `columns: {{{names}}}`."
            )
    if task.format == "json_messages":
        return read_json_messages(dataset, task.task, split)
    _check_strings(dataset, task, needed, split)
    if task.format == "hh_rlhf":
        return _from_transcripts(dataset, task, split, account)
    return _converted(dataset, task, _from_single_turn)


def _no_column(task: TaskConfig, name: str, dataset: Dataset) -> AMAError:
    swapped = isinstance(task.columns, dict) and set(task.columns.values()) <= {*PAIR_COLUMNS, *EXTRA_COLUMNS}
    hint = (
        " `columns` has TRL's name first and the dataset's own second, e.g. {prompt: question}."
        if swapped and not set(task.columns) <= {*PAIR_COLUMNS, *EXTRA_COLUMNS}
        else nearest(name, dataset.column_names)
    )
    return AMAError(
        f"Task '{task.task}' has no column '{name}'; found {dataset.column_names}.{hint} Mend its `columns`."
    )


def _check_strings(dataset: Dataset, task: TaskConfig, columns: tuple[str, ...], split: str) -> None:
    for column in columns:
        if dataset.features[column] == Value("string") and not dataset.data.column(column).null_count:
            continue
        for row, value in enumerate(dataset.select_columns([column])):
            if not isinstance(value[column], str):
                lacking = f"nothing (of {dataset.data.column(column).null_count} of {len(dataset)} rows)"
                found = lacking if value[column] is None else f"of type {type(value[column]).__name__}"
                raise AMAError(
                    f"Task '{task.task}', row {row} of the {split} pairs: {column} is {found}, and format '{task.format}' takes "
                    "strings. Drop such rows; for messages, leave `format` out."
                )


def _from_transcripts(dataset: Dataset, task: TaskConfig, split: str, account: RowAccount) -> Dataset:
    """The published files hold a few broken rows: they are left out, and counted by what is wrong with them."""
    total, kept = len(dataset), []
    columns = [name for name in PAIR_COLUMNS if name in dataset.column_names]
    for number, row in enumerate(dataset.select_columns(columns)):
        found = read_transcripts(row)
        if found.problem is None:
            kept.append(number)
        else:
            account.drop(found.problem, 1)
        if found.note is not None:
            account.note(found.note, 1)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in account.dropped.items())
        raise AMAError(
            f"Task '{task.task}': none of the {total} {split} rows is a pair of transcripts as format 'hh_rlhf' takes them: {reasons}. "
            "Name the right ones with `columns: {chosen: …, rejected: …}`, or leave `format` out."
        )
    if len(kept) < total:
        dataset = dataset.select(kept)
    return _converted(dataset, task, lambda row: read_transcripts(row).pair)


def _converted(dataset: Dataset, task: TaskConfig, convert: Any) -> Dataset:
    """Every row as `convert` makes it; what else the chat template is given stays."""
    replaced = [name for name in dataset.column_names if name not in EXTRA_COLUMNS]
    return dataset.map(convert, remove_columns=replaced, desc=f"Reading {task.task}")


def _from_single_turn(row: dict[str, str]) -> dict[str, Any]:
    """Plain strings: one question, two answers."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
