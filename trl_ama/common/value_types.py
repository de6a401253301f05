"""Whether a recipe's values have the types of the fields that they are for.

TRL's parser converts what is text and takes anything else as it is, so a list in place of a number would come to light in the
middle of a run, as somebody else's traceback. Nothing here imports more than the standard library.
"""

import dataclasses
import enum
import functools
import numbers
import re
import types
import typing
from typing import Any

from .errors import AMAError, short


# Fields that take more than they are annotated with, and see to it themselves
_LOOSE = {"tasks", "template_date", "prefix_sharing", "skip_clipped", "fsdp", "loss_type"}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
_SHOWN = 80  # characters of a value in a message


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def check_value(cls: type, name: str, value: Any, where: str, parses_text: bool) -> None:
    """Raise an `AMAError` if a value cannot be that of a dataclass's field.

    Args:
        cls (`type`): The dataclass; names that it does not have pass.
        name (`str`): The field.
        value (`Any`): As YAML gives it.
        where (`str`): Begins the message, e.g. `"The config file x.yaml, line 3:"`.
        parses_text (`bool`): Whether text will be converted, as the command line does.
    """
    hint = _hints(cls).get(name)
    if hint is not None:
        check_hint(hint, name, value, where, parses_text)


def check_hint(hint: Any, name: str, value: Any, where: str, parses_text: bool) -> None:
    """[`check_value`] of a field that is annotated with `hint`."""
    if name in _LOOSE or (parses_text and isinstance(value, str)) or _matches(value, hint):
        return
    wanted = list(dict.fromkeys(_NAMES[kind] for kind in _kinds(hint) if kind in _NAMES))
    fix = ""
    if isinstance(value, str) and _is_number(value):
        fix = (
            " YAML takes 1e-4 for text: write 1.0e-4."
            if re.fullmatch(r"-?\d+e.*", value, re.I)
            else " Leave the quotes out."
        )
    elif value is None:
        fix = " Leave the key out for the default."
    elif wanted == [_NAMES[str]] and isinstance(value, (int, float)):
        fix = " Put it in quotes."
    raise AMAError(f"{where} '{name}' must be {' or '.join(wanted)}, got {short(value, _SHOWN)}.{fix}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _kinds(hint: Any) -> list[type]:
    return [typing.get_origin(member) or member for member in _members(hint)]


def _matches(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        kind = typing.get_origin(member) or member
        if kind in (bool, str, dict):
            fits = isinstance(value, kind)
        elif kind is int:
            fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        elif kind is float:
            fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        elif kind is list:
            (entry,) = typing.get_args(member) or (Any,)
            fits = isinstance(value, list) and all(_matches(one, entry) for one in value)
        elif kind is type(None):
            fits = value is None
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            fits = isinstance(value, (str, kind))
        else:  # a class of another library's, Any, Literal
            fits = True
        if fits:
            return True
    return False
