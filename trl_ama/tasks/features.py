"""One type for each column of pairs over all tasks, such that every row says what it said in its task alone."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List, Value

from ..common.errors import AMAError, short
from .exact_json import exact_json
from .forms import PAIR_COLUMNS, TEMPLATE_COLUMNS, TEMPLATE_KWARGS, with_prompt, without_nulls
from .images import unite_images


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
    common = {
        column: _common(column, [_kind_of(parts[number], column) for number in having])
        for column in (*PAIR_COLUMNS, *TEMPLATE_COLUMNS)
    }
    common = {column: feature for column, feature in common.items() if feature is not None}
    for number in having:
        parts[number] = _with_features(parts[number], names[number], common)
    return parts


def _kind_of(part: Dataset, column: str) -> Any:
    kind = part.features.get(column)
    # A column of Json may hold anything
    return List(_JSON) if kind == _JSON and len(part) and isinstance(part[0][column], list) else kind


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
    if not all(isinstance(kind, (List, LargeList)) for kind in filled):
        return None
    same = len(set(map(repr, filled))) == 1
    return List(_JSON) if all(map(_fits_json, filled)) or not same else None


def _fits_json(kind: Any) -> bool:
    """Whether all values of a type have a JSON; times and bytes have none."""
    if isinstance(kind, dict):
        return all(map(_fits_json, kind.values()))
    if isinstance(kind, Value):
        return kind.dtype.startswith(("string", "large_string", "int", "uint", "float", "bool", "null"))
    return kind == _JSON or (isinstance(kind, (List, LargeList)) and _fits_json(kind.feature))


def is_plain(kind: Any) -> bool:
    """Whether a column's messages have a role, a text, and nothing else."""
    messages = getattr(kind, "feature", None)
    return isinstance(messages, dict) and {*messages} == {"role", "content"} and all(map(_is_text, messages.values()))


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _text_type(kinds: list[Value]) -> Value:
    return next((kind for kind in kinds if kind.dtype == "large_string"), kinds[0])


def with_prompts(part: Dataset, name: str) -> Dataset:
    """Pairs whose answers begin with the prompt, with the prompt told apart. `name` is the task's, for messages."""
    sides = ["chosen", "rejected"]
    kinds = {side: _common(side, [_kind_of(part, side)]) or part.features[side] for side in sides}
    kinds["prompt"] = kinds["chosen"]  # whose beginning it is

    def split(chosen: Any, rejected: Any) -> dict[str, Any]:
        pair = with_prompt({"chosen": chosen, "rejected": rejected})
        return {column: _encoded(pair[column], column, kind, name) for column, kind in kinds.items()}

    features = Features({**part.features, **kinds})
    return part.map(split, input_columns=sides, features=features, desc=f"Extracting the prompts of {name}")


def _with_features(part: Dataset, name: str, features: dict[str, Any]) -> Dataset:
    changed = {column: new for column, new in features.items() if repr(part.features.get(column)) != repr(new)}
    if not changed:
        return part

    present = [column for column in changed if column in part.features]

    def change(*values: Any) -> dict[str, Any]:
        row = dict(zip(present, values, strict=True))
        return {column: _encoded(row.get(column), column, new, name) for column, new in changed.items()}

    # With `input_columns` what is read stays as it was written; else `map` would write all of it again, and round numbers
    return part.map(
        change if present else lambda row: change(),
        input_columns=present or None,
        features=Features({**part.features, **changed}),
        desc=f"Uniting the columns of {name}",
    )


def _encoded(value: Any, column: str, feature: Any, name: str) -> Any:
    """A value as it is written into a column of that type."""
    if column == TEMPLATE_KWARGS:
        value = without_nulls(value or {})
    try:
        if value is not None and feature == _JSON:
            return exact_json(value)
        return [exact_json(message) for message in value] if value is not None and feature == List(_JSON) else value
    except ValueError:
        raise AMAError(
            f"Task '{name}' has {column} with a value that JSON cannot hold: {short(value)} Give all tasks the same keys and types "
            "of messages, or make that value a string."
        ) from None
