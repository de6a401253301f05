"""Messages that a column holds as the text of a JSON list, as CSV files and exports of databases do."""

import ast
import json
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value

from .errors import AMAError, short
from .tasks import EXTRA_COLUMNS, PAIR_COLUMNS


_ANSWERS = ("chosen", "rejected")
_PLAIN = {"role", "content"}


def messages_in(text: Any) -> list[dict[str, Any]] | None:
    """The messages that a text is the JSON of, or Python's own notation; `None` for any other text, JSON or not.

    A single message counts as a list of one.
    """
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    value = [value] if isinstance(value, dict) else value
    return value if isinstance(value, list) and value and all(map(_is_message, value)) else None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and bool({"content", "value", "tool_calls"} & set(value))


def refuse_json_text(dataset: Dataset, task: str, split: str, formats: bool = True) -> None:
    """Raise an `AMAError` if most answers are messages as JSON text: a trainer would take the JSON for the answer.

    Answers that are other JSON are texts like any other.

    Args:
        dataset (`Dataset`): With the columns `chosen` and `rejected`, if any.
        task, split (`str`): For the message.
        formats (`bool`): Whether the task can have a `format`.
    """
    for column in _ANSWERS:
        if column not in dataset.column_names or not _is_text(dataset.features[column]):
            return
        # Arrow looks at the first letter of all rows in no time, and most datasets have no such answer
        values = dataset.with_format("arrow")[column]
        if 2 * (pc.sum(pc.match_substring_regex(values, r"^\s*[\[{]")).as_py() or 0) <= len(dataset):
            return
    first, count = None, 0
    for number, row in enumerate(dataset.select_columns(list(_ANSWERS))):
        if all(messages_in(row[column]) is not None for column in _ANSWERS):
            first, count = number if first is None else first, count + 1
    if 2 * count > len(dataset):
        fix = (
            "Set `format: json_messages` on the task, which reads them."
            if formats
            else "Write the messages themselves, or name the files by the task's `path` and `data_files` with `format: json_messages`."
        )
        raise AMAError(
            f"Task '{task}': chosen and rejected are messages as JSON text in {count} of {len(dataset)} {split} rows (the first is row "
            f"{first}: {short(dataset[first]['chosen'], 80)}), and would be trained on as they stand. {fix}"
        )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def read_json_messages(dataset: Dataset, task: str, split: str) -> Dataset:
    """Parse the columns that hold messages as JSON text; those that hold messages already stay.

    Raises:
        AMAError: If an answer is neither, by row.
    """
    columns = [name for name in PAIR_COLUMNS if name in dataset.column_names]
    plain = dict.fromkeys(columns, True)
    texts = []
    for column in columns:
        if not _is_text(dataset.features[column]):
            continue
        texts.append(column)
        for number, row in enumerate(dataset.select_columns([column])):
            messages = messages_in(row[column])
            if messages is None and row[column]:
                raise AMAError(
                    f"Task '{task}', row {number} of the {split} pairs: {column} is {short(row[column], 80)}, which is no JSON list of "
                    "messages. Mend the row; if the prompt is a plain text and the answers hold it, leave it out (`columns: [chosen, rejected]`)."
                )
            plain[column] &= all(
                set(message) == _PLAIN and isinstance(message["content"], str) for message in messages or ()
            )

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        return {column: messages_in(row[column]) for column in texts}

    kept = [name for name in dataset.column_names if name in (*columns, *EXTRA_COLUMNS)]
    dataset = dataset.select_columns(kept)
    message = {True: {"role": Value("string"), "content": Value("string")}, False: Json()}
    # Of one kind in all columns, so that the answers can be compared with the prompt
    only_plain = all(plain[column] for column in texts)
    features = Features({**dataset.features, **{column: List(message[only_plain]) for column in texts}})
    return dataset.map(parse, features=features, desc=f"Reading {task}")
