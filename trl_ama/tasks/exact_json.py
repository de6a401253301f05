"""JSON that the Json columns of `datasets` read as exactly the value it was made of."""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from datasets import Json


_decoded = Json().decode_example


def exact_json(value: Any) -> str:
    """The JSON that `datasets` reads as exactly this value.

    Its own encoder cuts numbers to ten places, and its decoder rounds: it reads 0.3 as 0.30000000000000004, and 30e-2 as 0.3.

    Raises:
        ValueError: If there is none.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        if repr(_decoded(text)) != repr(value):
            text = _dump(value)
        if repr(_decoded(text)) == repr(value):
            return text
    except TypeError:
        pass
    raise ValueError(f"no JSON is {value!r:.80}")


def _dump(value: Any) -> str:
    if isinstance(value, dict):
        entries = (f"{json.dumps(key, ensure_ascii=False)}: {_dump(entry)}" for key, entry in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    if isinstance(value, float):
        return next((text for text in _spellings(value) if _decoded(text) == value), repr(value))
    return json.dumps(value, ensure_ascii=False)


def _spellings(number: float) -> Iterator[str]:
    """Ways to write a number, of which the decoder rounds only some."""
    exact = Decimal(repr(number))
    sign, digits, exponent = exact.as_tuple()
    whole = Decimal((sign, digits, 0))
    for zeros in range(18 - len(digits)):
        yield f"{whole.scaleb(zeros):f}e{exponent - zeros}"
    for places in range(1, len(digits)):
        for zeros in range(6):
            yield f"{whole.scaleb(-places):f}{'0' * zeros}e{exponent + places}"
