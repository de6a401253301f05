"""One type for each column of pairs over all tasks, such that every row says what it said in its task alone."""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List, Value

from .errors import AMAError, short
from .pair_forms import PAIR_COLUMNS, TEMPLATE_COLUMNS, without_nulls
from .pair_images import unite_images
from .template_kwargs import TEMPLATE_KWARGS


_JSON = Json()


def unite_features(parts: Sequence[Dataset], names: Sequence[str]) -> list[Dataset]:
    """The tasks' pairs with the same columns of the same types, as far as that can be had without changing a row.

    To a chat template a key that is null is not one that is missing, so messages with other keys do not become one struct
    with the keys of all. What is more than `role` and a text becomes Json, which keeps of every message the keys that it
    has. A task's tokens must not depend on what the other tasks are.

    Args:
        parts (`Sequence[Dataset]`): Pairs with explicit prompts; those without texts are left alone.
        names (`Sequence[str]`): Of their tasks, for messages.

    Returns:
        `list[Dataset]`, those that need no change as they were.

    Raises:
        AMAError: If Json cannot hold a value.
    """
    parts = unite_images(parts)
    having = [number for number, part in enumerate(parts) if "chosen" in part.features]
    for column in (*PAIR_COLUMNS, *TEMPLATE_COLUMNS):
        common = _common(column, [parts[number].features.get(column) for number in having])
        for number in having if common is not None else ():
            parts[number] = _with_feature(parts[number], names[number], column, common)
    return parts


def _common(column: str, kinds: list[Any]) -> Any:
    """The type for a column that has these, `None` where there is no such column; `None` if nothing has to change."""
    filled = [kind for kind in kinds if kind is not None and kind != Value("null")]
    if not filled:
        return Value("null") if len(set(map(repr, kinds))) > 1 else None
    if column == TEMPLATE_KWARGS:
        return _JSON
    if all(map(_is_text, filled)):
        return _text_type(filled)
    if column in TEMPLATE_COLUMNS:
        return _JSON
    if all(map(is_plain, filled)) and len({tuple(kind.feature) for kind in filled}) == 1:
        texts = _text_type([text for kind in filled for text in kind.feature.values()])
        return List(dict.fromkeys(filled[0].feature, texts))
    return List(_JSON) if all(isinstance(kind, (List, LargeList)) for kind in filled) else None


def is_plain(kind: Any) -> bool:
    """Whether a column's messages have a role, a text, and nothing else."""
    messages = getattr(kind, "feature", None)
    return isinstance(messages, dict) and {*messages} == {"role", "content"} and all(map(_is_text, messages.values()))


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _text_type(kinds: list[Value]) -> Value:
    return next((kind for kind in kinds if kind.dtype == "large_string"), kinds[0])


def _with_feature(part: Dataset, name: str, column: str, feature: Any) -> Dataset:
    ours = part.features.get(column)
    if repr(ours) == repr(feature):
        return part

    # What a function of `map` does not return is not decoded and encoded, which would round Json's numbers
    def change(row: dict[str, Any]) -> dict[str, Any]:
        value = row.get(column)
        if column == TEMPLATE_KWARGS:
            value = {} if value is None else without_nulls(value)
        if value is None or isinstance(feature, Value):
            return {column: value}
        where = f"Task '{name}' has {column}"
        if isinstance(feature, List):
            return {column: [_spelled_out(message, where) for message in value]}
        return {column: _spelled_out(value, where)}

    features = Features({**part.features, column: feature})
    return part.map(change, features=features, desc=f"Reading the {column} of {name}")


def _spelled_out(value: Any, where: str) -> str:
    """The JSON that `datasets` reads as exactly this value.

    Raises:
        AMAError: If there is none.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        if repr(_JSON.decode_example(text)) != repr(value):
            text = _dump(value)
        if repr(_JSON.decode_example(text)) == repr(value):
            return text
    except (TypeError, ValueError):
        pass
    raise AMAError(
        f"{where} with a value that JSON cannot hold: {short(value)} Give all tasks the same keys and types of messages, or make "
        "that value a string."
    )


def _dump(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {_dump(entry)}" for key, entry in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    if isinstance(value, float):
        return next((text for text in _spellings(value) if _JSON.decode_example(text) == value), repr(value))
    return json.dumps(value, ensure_ascii=False)


def _spellings(number: float) -> Iterator[str]:
    """Ways to write a number. The decoder of `datasets` rounds: it reads 0.3 as 0.30000000000000004, and 30e-2 as 0.3."""
    exact = Decimal(repr(number))
    sign, digits, exponent = exact.as_tuple()
    whole = Decimal((sign, digits, 0))
    for zeros in range(18 - len(digits)):
        yield f"{whole.scaleb(zeros):f}e{exponent - zeros}"
    for places in range(1, len(digits)):
        for zeros in range(6):
            yield f"{whole.scaleb(-places):f}{'0' * zeros}e{exponent + places}"
