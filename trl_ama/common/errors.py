"""The one exception that trl-ama raises for bad input.

Every message is one sentence that names both sides of the problem and one that names the fix, so the command line can
print it alone, without a traceback.
"""

import difflib
import reprlib
from typing import Any


class AMAError(ValueError):
    """Bad input: the message says what was expected, what was found and how to mend it."""


def nearest(name: str, candidates: list[str]) -> str:
    """Return `" Did you mean 'x'?"` for the candidate most like `name`, or `""` when none is close."""
    match = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def short(value: Any, most: int = 200) -> str:
    """`repr` of what a user gave, cut: aliases in YAML can stand for billions of entries."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 4, most, most
    try:
        text = brief.repr(value)
    except ValueError:  # Python writes out no such number
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}…"


def first_line(error: Exception) -> str:
    """The first line of another library's error, for a message of one sentence; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sentence(error: Exception) -> str:
    """[`first_line`] as a whole sentence, for a message that goes on after it."""
    line = first_line(error).rstrip(" :;,")
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."
