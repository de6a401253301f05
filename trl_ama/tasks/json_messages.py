"""Messages that a column holds as the text of a JSON list, as CSV files and exports of databases do."""

import ast
import json
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value

from ..common.errors import AMAError, short
from .forms import EXTRA_COLUMNS, PAIR_COLUMNS


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
    """Raise an `AMAError` if most prompts, or both answers of most rows, are messages as JSON text: a trainer would take the JSON
    for what is said.

    Texts that are other JSON are texts like any other.

    Args:
        dataset (`Dataset`): The rows of a task.
        task, split (`str`): For the message.
        formats (`bool`): Whether the task can have a `format`.
    """
    for columns in (_ANSWERS, ("prompt",)):
        if not all(column in dataset.column_names and _is_text(dataset.features[column]) for column in columns):
            continue
        # Arrow looks at the first letter of all rows in no time, and most datasets have no such text
        values = dataset.with_format("arrow")[columns[0]]
        if 2 * (pc.sum(pc.match_substring_regex(values, r"^\s*[\[{]")).as_py() or 0) <= len(dataset):
            continue
        rows = enumerate(dataset.select_columns(list(columns)))
        found = [number for number, row in rows if all(messages_in(row[column]) for column in columns)]
        if 2 * len(found) > len(dataset):
            fix = (
                "Set `format: json_messages` on the task, which reads them."
                if formats
                else "Write the messages themselves, or name the files by the task's `path` and `data_files` with `format: json_messages`."
            )
            raise AMAError(
                f"Task '{task}': {' and '.join(columns)} {'are' if len(columns) > 1 else 'is'} messages as JSON text in {len(found)} of "
                f"{len(dataset)} {split} rows (the first is row {found[0]}: {short(dataset[found[0]][columns[0]], 80)}), and would be "
                f"trained on as {'they stand' if len(columns) > 1 else 'it stands'}. {fix}"
            )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def read_json_messages(dataset: Dataset, task: str, split: str) -> Dataset:
    """Parse the columns that hold messages as JSON text. Those that hold messages already stay, and one of nothing but plain text
    becomes the user's or the assistant's message.

    Raises:
        AMAError: If a column holds both, by row.
    """
    texts = [name for name in PAIR_COLUMNS if name in dataset.column_names and _is_text(dataset.features[name])]
    said = {column: _plain_role(dataset, column, task, split) for column in texts}

    def read(column: str, text: str | None) -> list[dict[str, Any]] | None:
        role = said[column]
        return messages_in(text) if role is None or not text else [{"role": role, "content": text}]

    everything = [
        message for row in dataset.select_columns(texts) for name in texts for message in read(name, row[name]) or ()
    ]
    only_plain = all(set(entry) == _PLAIN and isinstance(entry["content"], str) for entry in everything)
    # Of one kind in all columns, so that the answers can be compared with the prompt
    message = {"role": Value("string"), "content": Value("string")} if only_plain else Json()
    features = Features({**dataset.features, **{column: List(message) for column in texts}})
    kept = [name for name in dataset.column_names if name in (*PAIR_COLUMNS, *EXTRA_COLUMNS)]
    return dataset.select_columns(kept).map(
        lambda row: {column: read(column, row[column]) for column in texts},
        features=Features({name: features[name] for name in kept}),
        desc=f"Reading {task}",
    )


def _plain_role(dataset: Dataset, column: str, task: str, split: str) -> str | None:
    """Whose message a column of plain text is; `None` if all of it are messages as JSON."""
    plain, parsed = [], []
    for number, row in enumerate(dataset.select_columns([column])):
        if row[column]:
            (plain if messages_in(row[column]) is None else parsed).append(number)
    if plain and parsed:
        raise AMAError(
            f"Task '{task}', row {plain[0]} of the {split} pairs: {column} is {short(dataset[plain[0]][column], 80)}, which is no JSON "
            f"list of messages as in {len(parsed)} other rows. Mend the row."
        )
    if not plain:
        return None
    if column != "prompt":
        return "assistant"
    answers = messages_in(dataset[plain[0]]["chosen"]) or []
    if any(message.get("role") == "user" for message in answers):
        raise AMAError(
            f"Task '{task}': prompt is plain text, and chosen and rejected are whole conversations as JSON. Leave the prompt out "
            "(`columns: [chosen, rejected]`): it is then what both begin with."
        )
    return "user"
