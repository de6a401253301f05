"""The formats of published preference datasets that a recipe can name, turned into TRL's."""

import re
from typing import Any

from datasets import Dataset, Value

from .errors import AMAError, nearest
from .task_config import TaskConfig
from .tasks import EXTRA_COLUMNS, PAIR_COLUMNS


_TURN = re.compile(r"\n\n(Human|Assistant):\s?")


def own_format(dataset: Dataset, task: TaskConfig, split: str = "train") -> Dataset:
    """Apply a task's `columns` and `format`; files of `tasks_dir` are in TRL's format already. `split` is for messages.

    Raises:
        AMAError: If a column that they name is not there, the format is unknown, or a row has no string where it needs one.
    """
    if isinstance(task.columns, dict):
        lacking = [theirs for theirs in task.columns.values() if theirs not in dataset.column_names]
        if lacking:
            raise _no_column(task, lacking[0], dataset)
        renamed = {theirs: ours for ours, theirs in task.columns.items() if theirs != ours}
        dataset = dataset.select_columns(list(task.columns.values())).rename_columns(renamed)
    elif task.columns is not None:
        lacking = [column for column in task.columns if column not in dataset.column_names]
        if lacking:
            raise _no_column(task, lacking[0], dataset)
        dataset = dataset.select_columns(task.columns)
    if task.format is None:
        return dataset
    if task.format not in _FORMATS:
        raise AMAError(
            f"Task '{task.task}' has format '{task.format}'; known are {sorted(_FORMATS)}. Leave it out for TRL's own."
        )
    needed, convert = _FORMATS[task.format]
    for column in needed:
        if column not in dataset.column_names:
            names = ", ".join(f"{name}: …" for name in needed)
            raise AMAError(
                f"Format '{task.format}' of task '{task.task}' needs '{column}'; found {dataset.column_names}. Say which of them it is "
                f"with `columns: {{{names}}}`."
            )
    _check_strings(dataset, task, needed, split)
    if task.format == "hh_rlhf":  # the published files hold a few broken rows
        dataset = dataset.filter(_is_whole_transcript, desc=f"Dropping broken transcripts of {task.task}")
    return dataset.map(convert, remove_columns=dataset.column_names, desc=f"Reading {task.task}")


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


def _is_whole_transcript(row: dict[str, str]) -> bool:
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    same_prompt = chosen[:-1] == rejected[:-1] and len(chosen) > 1
    return same_prompt and all(
        turns[-1]["role"] == "assistant" and turns[-1]["content"] for turns in (chosen, rejected)
    )


def _from_transcript(row: dict[str, str]) -> dict[str, Any]:
    """One Anthropic/hh-rlhf row: the transcripts differ in their last assistant turn only."""
    chosen, rejected = (_turns(row[key]) for key in ("chosen", "rejected"))
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(transcript: str) -> list[dict[str, str]]:
    parts = _TURN.split(transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_single_turn(row: dict[str, str]) -> dict[str, Any]:
    """Plain strings: one question, two answers."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


# Format → the columns it needs and how a row of it becomes a conversation
_FORMATS = {
    "hh_rlhf": (("chosen", "rejected"), _from_transcript),
    "single_turn": (PAIR_COLUMNS, _from_single_turn),
}
