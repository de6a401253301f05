"""What a preference pair says, in whatever form a dataset gives it: with or without a prompt, as texts or messages."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from trl import extract_prompt

from .images import IMAGE_COLUMNS, IMAGES, image_identity, images_of


PAIR_COLUMNS = ("prompt", "chosen", "rejected")
TEMPLATE_KWARGS = "chat_template_kwargs"
TEMPLATE_COLUMNS = ("tools", TEMPLATE_KWARGS)
# What DPOTrainer's tokenisation reads beside them. They travel with a pair, count in its id and are saved with its texts
EXTRA_COLUMNS = (*TEMPLATE_COLUMNS, *IMAGE_COLUMNS)
_NOT_SAID = ("role", "content", "name", "tool_call_id")  # of a message; any other key may say something


def with_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair with an explicit prompt: its own, or what both answers begin with, as `DPOTrainer` takes it.

    Args:
        pair (`dict`): `chosen`, `rejected` and perhaps `prompt`.

    Returns:
        `dict` with `prompt`, `chosen` and `rejected`.
    """
    chosen, rejected = pair["chosen"], pair["rejected"]
    if pair.get("prompt") is not None:
        return {column: pair[column] for column in PAIR_COLUMNS}
    if not chosen or not rejected:
        return {"prompt": chosen and chosen[:0], "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str):
        return extract_prompt({"chosen": chosen, "rejected": rejected})
    # The columns of both sides may have been given different keys, null where a message has none
    shared = len(extract_prompt({"chosen": without_nulls(chosen), "rejected": without_nulls(rejected)})["prompt"])
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def says_something(side: str | list[dict[str, Any]] | None) -> bool:
    """Whether an answer is one: a text that is not blank, or a last message with such a text, a call, or anything else."""
    if isinstance(side, list):
        return bool(side) and _says_something(side[-1])
    return bool(side and side.strip())


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, str):
        said = bool(content.strip())
    else:
        said = any(map(_is_filled, content or ()))
    return said or any(bool(without_nulls(value)) for key, value in message.items() if key not in _NOT_SAID)


def _is_filled(part: Any) -> bool:
    """Whether a part of a content is more than a blank text."""
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        return True
    return isinstance(part.get("text"), str) and bool(part["text"].strip())


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null: a column of mappings has the keys of all rows, null where a row has none."""
    if isinstance(value, dict):
        kept = {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
        return {key: entry for key, entry in kept.items() if entry != {}}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def pair_id(prompt: Any, chosen: Any, rejected: Any, **extra: Any) -> str:
    """A pair's name: a hash of its text, before any chat template, and of what is to be seen on its images. The same pair has
    the same id everywhere.

    Args:
        prompt: Text or messages; `None` if the answers hold it.
        chosen, rejected: Texts or messages.
        extra: What else the model is given (`EXTRA_COLUMNS`), as the same texts with other tools or images are another pair.
    """
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return _pair_id(row, extra, [image_identity(image) for image in images_of(extra)])


def pair_id_of(row: dict[str, Any], seen: Sequence[str] | None = None) -> str:
    """[`pair_id`] of a dataset's row, which may lack a `prompt`; with [`image_identity`] of its images, if that is known."""
    seen = [image_identity(image) for image in images_of(row)] if seen is None else list(seen)
    return _pair_id(row, {name: row.get(name) for name in TEMPLATE_COLUMNS}, seen)


def _pair_id(row: dict[str, Any], extra: dict[str, Any], images: list[str]) -> str:
    pair = with_prompt({column: row.get(column) for column in PAIR_COLUMNS})
    parts = [_canonical(pair[column]) for column in PAIR_COLUMNS]
    extra = without_nulls({name: extra[name] for name in TEMPLATE_COLUMNS if extra.get(name)})
    if images:
        extra[IMAGES] = images
    if extra:
        parts.append(extra)
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _canonical(side: Any) -> Any:
    """Messages as every dataset that holds them gives them: no keys that other messages have, and always a content."""
    if not isinstance(side, list):
        return side
    return [{"content": None, **without_nulls(message)} if isinstance(message, dict) else message for message in side]
