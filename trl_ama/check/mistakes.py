"""Mistakes of form in single preference pairs: roles, forms, prompts within answers, special tokens as text."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ..tasks.forms import PAIR_COLUMNS, says_something, without_nulls
from ..tasks.json_messages import messages_in


# Keys of a message that hold what it says
_SAID = ("reasoning_content", "reasoning", "thinking", "content", "tool_calls", "function_call")
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_TRANSCRIPT = re.compile(r"(?m)^(Human|Assistant|User|### (Instruction|Response)): ?|\[/?INST\]")
_LONG_ENOUGH = 20  # characters: many an answer begins with the "Hi" or the word that was asked about


def text_of(side: Any) -> str:
    """The text of a prompt or an answer: of a conversation, that of all its messages."""
    if isinstance(side, str):
        return side
    if isinstance(side, list):
        return "\n".join(_content(message) for message in side)
    return "" if side is None else str(side)


def _content(message: Any) -> str:
    if not isinstance(message, dict):
        return message if isinstance(message, str) else json.dumps(message, ensure_ascii=False, default=str)
    return "\n".join(
        said if isinstance(said, str) else json.dumps(without_nulls(said), ensure_ascii=False, default=str)
        for said in map(message.get, _SAID)
        if said
    )


def _texts(side: Any) -> list[Any]:
    return [side] if isinstance(side, str) else [message.get("content") for message in side]


def _is_messages(side: Any) -> bool:
    return isinstance(side, list) and all(isinstance(message, dict) and "role" in message for message in side)


def mistakes_of(row: dict[str, Any], special_tokens: Sequence[str]) -> list[str]:
    """The kinds of mistakes that a pair has; [`trl_ama.check.verdict`] says what they mean.

    Args:
        row (`dict`): `prompt`, `chosen` and `rejected`, each a string or a list of messages.
        special_tokens (`Sequence[str]`): The tokenizer's, but for those that are ordinary words.
    """
    if all(isinstance(row[column], str) for column in PAIR_COLUMNS):
        found = _mistakes_of_text(row)
    elif all(_is_messages(row[column]) for column in PAIR_COLUMNS):
        found = _mistakes_of_messages(row)
    else:
        return ["mixed_forms"]
    if not text_of(row["prompt"]).strip():
        found.append("empty_prompt")
    if not all(says_something(row[side]) for side in ("chosen", "rejected")):
        found.append("empty_answer")
    if any(messages_in(text) is not None for column in PAIR_COLUMNS for text in _texts(row[column])):
        found.append("json_text")
    if _has_special_token(row, special_tokens):
        found.append("special_token")
    return found


def _mistakes_of_text(row: dict[str, str]) -> list[str]:
    found = []
    prompt = row["prompt"].strip()
    if len(prompt) >= _LONG_ENOUGH and row["chosen"].lstrip().startswith(prompt):
        found.append("prompt_in_answer")
    if any(_TRANSCRIPT.search(row[column]) for column in PAIR_COLUMNS):
        found.append("transcript")
    return found


def _mistakes_of_messages(row: dict[str, list]) -> list[str]:
    found = []
    answers = [row[side] for side in ("chosen", "rejected")]
    if any(answer and answer[-1]["role"] != "assistant" for answer in answers):
        found.append("last_not_assistant")
    if row["prompt"] and row["prompt"][-1]["role"] == "assistant":
        found.append("prompt_ends_with_assistant")
    if any(message["role"] not in _ROLES for column in PAIR_COLUMNS for message in row[column]):
        found.append("unknown_role")
    said = [_content(message) for message in row["prompt"]]
    chosen = [_content(message) for message in row["chosen"]]
    last = said[-1].strip() if said else ""
    whole = bool(said) and len(chosen) > len(said) and chosen[: len(said)] == said
    if whole or (len(last) >= _LONG_ENOUGH and any(text.lstrip().startswith(last) for text in chosen)):
        found.append("prompt_in_answer")
    return found


def _has_special_token(row: dict[str, Any], special_tokens: Sequence[str]) -> bool:
    for column in PAIR_COLUMNS:
        text = text_of(row[column])
        if column != "prompt" and isinstance(row[column], str):
            # DPOTrainer ends a plain answer with the token anyway, and knows if it is there
            text = next((text.removesuffix(token) for token in special_tokens if text.endswith(token)), text)
        if any(token in text for token in special_tokens):
            return True
    return False
