"""Refuses rows that are no preference pairs, by task and row, before code that expects pairs meets them."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from ..common.errors import AMAError
from .forms import PAIR_COLUMNS, TEMPLATE_COLUMNS, with_prompt


_SHAREGPT = {"from", "value"}
_TEXT, _MESSAGES = "plain text", "messages"


def check_rows(dataset: Dataset, task: str, split: str) -> None:
    """Raise an `AMAError` for the first row that is no pair of its file's kind: all plain text, or all messages.

    Answers may be empty or missing, which is another question.

    Args:
        dataset (`Dataset`): `chosen`, `rejected` and, if the task has explicit prompts, `prompt`.
        task, split (`str`): For the message.
    """
    columns = [name for name in PAIR_COLUMNS if name in dataset.column_names]
    if "prompt" in columns:
        _check_prompts(dataset, task, split)
    row, first_kind = 0, None
    extra = [name for name in TEMPLATE_COLUMNS if name in dataset.column_names]
    for batch in dataset.select_columns([*columns, *extra]).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            where = f"Task '{task}', row {row} of the {split} pairs"
            pair = dict(zip(batch, values, strict=True))
            _check_tools(pair.get("tools"), where)
            kind = check_pair({name: pair[name] for name in columns}, where)
            if None not in (kind, first_kind) and kind != first_kind:
                raise AMAError(
                    f"{where} is {kind}, but the rows before it are {first_kind}. Bring all rows into one form: all strings, or all "
                    "lists of {role, content}."
                )
            first_kind, row = first_kind or kind, row + 1


def _check_prompts(dataset: Dataset, task: str, split: str) -> None:
    """A reader makes one column of what some rows have: say how many do, instead of blaming the first that does not."""
    lacking = np.flatnonzero(dataset.with_format("arrow")["prompt"].is_null().to_numpy(zero_copy_only=False))
    if 0 < len(lacking) < len(dataset):
        having = np.setdiff1d(np.arange(len(dataset)), lacking)
        raise AMAError(
            f"Task '{task}', {split} pairs: of {len(dataset)} rows {len(having)} with a prompt (the first is row {having[0]}) and "
            f"{len(lacking)} without (the first is row {lacking[0]}). Drop those without one or, if the answers hold "
            "the prompt, leave the column out of all (`columns: [chosen, rejected]`): it is then what both begin with."
        )


def check_pair(pair: dict[str, Any], where: str) -> str | None:
    """The kind of one pair, plain text or messages; `None` if there is nothing in it.

    Raises:
        AMAError: If it is neither, or both. `where` says which one it is.
    """
    if "prompt" in pair and pair["prompt"] is None:
        raise AMAError(
            f"{where} has no prompt. Drop such rows, or leave the column out of all (`columns: [chosen, rejected]`) if the answers "
            "hold the prompt: it is then what both begin with."
        )
    for column, value in pair.items():
        problem = _no_text(value)
        if value is not None and problem is not None:
            raise AMAError(f"{where}: {column} is {problem}")
    kinds = {
        column: _TEXT if isinstance(value, str) else _MESSAGES for column, value in pair.items() if value is not None
    }
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{column} is {kind}" for column, kind in kinds.items())
        whole = kinds.get("prompt") == _TEXT and kinds.get("chosen") == kinds.get("rejected") == _MESSAGES
        hint = (
            " If the answers are whole conversations, which hold the prompt, leave it out (`columns: [chosen, rejected]`)."
            if whole
            else ""
        )
        raise AMAError(
            f"{where} mixes two forms: {found}. Give all three as strings, or all three as lists of {{role, content}}.{hint}"
        )
    if all(pair.get(column) for column in ("chosen", "rejected")):
        _check_start(pair, where)
    return next(iter(kinds.values()), None)


def _check_start(pair: dict[str, Any], where: str) -> None:
    """Raise an `AMAError` if there is nothing to answer, where `DPOTrainer` takes what is none, or fails."""
    if pair.get("prompt") == []:
        raise AMAError(
            f"{where} has a prompt without messages. Give it one, e.g. {{role: user, content: …}}, or drop it."
        )
    if "prompt" in pair:
        return
    split = with_prompt(pair)
    if split["prompt"] == []:
        raise AMAError(
            f"{where} has no prompt: chosen and rejected share no first message (of {_short(pair['chosen'][0])} and "
            f"{_short(pair['rejected'][0])}). Add a column 'prompt', or begin both with the same messages, keys and all."
        )
    if pair["chosen"][0] != pair["rejected"][0] and pair["chosen"][-1] == " ":
        # `extract_prompt` looks for a space before the place where they part, and takes the last character for it
        raise AMAError(
            f"{where} has no prompt: chosen and rejected differ from the first character on, and DPOTrainer would cut them "
            "elsewhere. Add a column 'prompt', or strip the space that chosen ends with."
        )


def _check_tools(tools: Any, where: str) -> None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise AMAError(
                f"{where}: tools is {_short(tools)}, which is no JSON. Give a list of tools, the JSON of one, or null."
            ) from None
    if not isinstance(tools, (list, type(None))):
        raise AMAError(
            f"{where}: tools is {_short(tools)}, of type {type(tools).__name__}. Give a list of tools, the JSON of one, or null."
        )
    for tool in tools or ():
        if not isinstance(tool, dict):
            raise AMAError(
                f"{where}: tools is a list that holds {_short(tool)}, of type {type(tool).__name__}. Give each tool as a mapping, or "
                "the whole list as JSON."
            )


def _no_text(value: Any) -> str | None:
    """What a value is and how to mend it, if it is neither a string nor a list of messages."""
    fix = "Give it as a string, or as a list of {role, content}."
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"{_short(value)}, of type {type(value).__name__}. {fix}"
    for message in value:
        if not isinstance(message, dict):
            return f"a list that holds {_short(message)}, of type {type(message).__name__}. {fix}"
        # A column of mappings has the keys of all rows, null where a row has none
        keys = sorted(key for key, entry in message.items() if entry is not None)
        if _SHAREGPT <= set(keys):
            return (
                f"a list of messages with the keys {keys}. Rename 'from' to 'role' and 'value' to 'content', and ShareGPT's roles "
                "'human' and 'gpt' to 'user' and 'assistant'."
            )
        calls = message.get("tool_calls") or message.get("function_call")
        if not isinstance(message.get("role"), str) or not ("content" in message or calls):
            return f"a list of messages with the keys {keys}; 'role' and 'content' are needed. {fix}"
        content = message.get("content")  # a text, a list of parts, or nothing beside a call of tools
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (parts or isinstance(content, (str, type(None)))):
            hint = (
                " In a file with texts and lists of parts as contents `datasets` reads every text as JSON, if it can: give all as parts."
                if isinstance(content, (bool, int, float, dict, list))
                else ""
            )
            return (
                f"a list of messages with the content {_short(content)}, of type {type(content).__name__}. {fix}{hint}"
            )
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def first_failure(prepare: Callable[[Dataset], Any], pairs: Dataset, error: Exception) -> tuple[int, Exception]:
    """The number of the first pair that fails, and its error: by halves, as each call takes its time."""
    start, end = 0, len(pairs)
    while end - start > 1:
        middle = (start + end) // 2
        try:
            prepare(pairs.select(range(start, middle)))
            start = middle
        except Exception as found:
            end, error = middle, found
    return start, error
