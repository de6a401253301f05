"""Makes the JSON Schema of a recipe out of the dataclasses that read it and the options of `accelerate launch`.

    python -m trl_ama.scripts.recipe_schema > recipe.schema.json

prints that of the installed libraries. The package holds that of the pinned ones (`recipe_schema.json`), which `recipe_check.py`
reads before anything heavy is imported and editors read for completion; `--write` makes it anew.
"""

import argparse
import dataclasses
import enum
import importlib
import json
import re
import typing
from pathlib import Path
from typing import Any

from trl_ama.common.limits import LIMITS
from trl_ama.scripts.common import make_parser, option_names
from trl_ama.scripts.recipe_check import PATH, installed_versions
from trl_ama.tasks.config import TaskConfig
from trl_ama.tasks.formats import FORMATS


OWN_ARGUMENTS = ("ama-check", "ama-plan", "ama-merge")  # the commands that take keys of their own from a recipe
_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_CONVERTED = {"int": "int", "float": "float", "string_to_bool": "bool"}  # argparse's name of a type → ours
_SECTION = re.compile(r"^ {8}(\w[\w, ]*?)(?: \(.*\))?:\n((?: {12}.*\n|\n)+)", re.MULTILINE)


def make_schema() -> dict[str, Any]:
    """The schema, for the libraries that are installed."""
    from accelerate.commands.launch import launch_command_parser

    parser = make_parser("ama")
    properties: dict[str, Any] = {}
    for cls in parser.dataclass_types:
        properties |= _properties(cls, parser)
    training = [name for name, entry in properties.items() if entry["x-from"] == "AMAConfig"]
    for name, entry in _by_hand().items():
        properties[name] |= entry
    also = {}
    for name, action in option_names(launch_command_parser()).items():
        if re.fullmatch(r"[a-z]\w+", name):
            properties.setdefault(name, _launch_option(action))
        else:
            also[name] = None
    properties["accelerate_config"] = {
        "description": "File of `accelerate config`, or the name of one that TRL has: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, "
        "zero2, zero3.",
        "type": "string",
        "x-from": "accelerate launch",
    }
    properties["env"] = {
        "description": "Environment variables of the run.",
        "type": "object",
        "x-from": "accelerate launch",
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of trl-ama",
        "description": "Made by `python -m trl_ama.scripts.recipe_schema` out of the dataclasses that read a recipe.",
        "x-made-from": installed_versions(),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": {f"^({'|'.join(also)})$": {}},  # other spellings, which need no completion
        "$defs": {
            "task": _task(),
            "specialist_args": {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: {"$ref": f"#/properties/{name}"} for name in training if name != "output_dir"},
            },
            **{command: {"properties": _own_properties(command)} for command in OWN_ARGUMENTS},
        },
    }


def _own_properties(command: str) -> dict[str, Any]:
    """The keys that one command takes beside those of all."""
    parser = importlib.import_module(f"trl_ama.scripts.{command.replace('-', '_')}").make_parser()
    return _properties(parser.dataclass_types[0], parser)


def _properties(cls: type, parser: argparse.ArgumentParser) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first, without its `--no_…`
    return {
        field.name: _property(cls, field.name, hints[field.name], actions[field.name])
        for field in dataclasses.fields(cls)
        if field.init
    }


def _property(cls: type, name: str, hint: Any, action: argparse.Action) -> dict[str, Any]:
    entry = {"description": _words(action.help), **_type(hint), **_range(name)}
    if action.nargs == "+" and "string" not in entry["type"]:  # the text of one entry will do
        kinds = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
        entry |= {"type": [*kinds, "string"], "x-annotated": kinds}
    if action.choices is not None:
        entry["enum"] = [*action.choices, *([None] if "null" in entry.get("type", ()) else [])]
    if action.default is not None:
        entry["default"] = getattr(action.default, "value", action.default)
    converted = _CONVERTED.get(getattr(action.type, "__name__", None))
    if converted is not None:
        entry["x-text"] = converted
    entry["x-from"] = cls.__name__
    if _is_others(cls, name):
        entry["x-inherited"] = True
    return {key: value for key, value in entry.items() if value not in ("", [])}


def _is_others(cls: type, name: str) -> bool:
    """Whether a field comes from a class of another library's."""
    owner = next(base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {}))
    return owner.__module__.partition(".")[0] != "trl_ama"


def _words(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").split())


def _type(hint: Any) -> dict[str, Any]:
    """`type` and `items` for an annotation; none for one that takes whatever there is, as `check_value` has it."""
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    kinds, items = [], {}
    for member in members:
        kind = typing.get_origin(member) or member
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            kind = str
        if kind not in _TYPES:
            return {}
        kinds.append(_TYPES[kind])
        if kind is list and typing.get_args(member):
            items = {"items": _type(typing.get_args(member)[0])}
    kinds = list(dict.fromkeys(kinds))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **items}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def _range(name: str) -> dict[str, Any]:
    """The ends of a number's range that holds whatever the other keys are."""
    found = {}
    for limit in LIMITS.get(name, ()):
        low, high = (end.strip() for end in limit.interval[1:-1].split(","))
        if limit.given:
            continue
        if low != "-inf":
            found["minimum" if limit.interval[0] == "[" else "exclusiveMinimum"] = json.loads(low)
        if re.fullmatch(r"[\d.]+", high):
            found["maximum" if limit.interval[-1] == "]" else "exclusiveMaximum"] = json.loads(high)
    return found


def _task() -> dict[str, Any]:
    """An entry of `tasks`."""
    hints, said = typing.get_type_hints(TaskConfig), {}
    for names, text in _SECTION.findall(TaskConfig.__doc__ + "\n"):
        said |= dict.fromkeys(names.split(", "), _words(text))
    properties = {}
    for field in dataclasses.fields(TaskConfig):
        entry = _type(hints[field.name] | None if field.name != "task" else str)
        properties[field.name] = {"description": said[field.name], **entry}
    properties["format"]["enum"] = [*FORMATS, None]
    properties["specialist_args"] = {
        "description": said["specialist_args"],
        "anyOf": [{"$ref": "#/$defs/specialist_args"}, {"type": "null"}],
    }
    return {"type": "object", "required": ["task"], "additionalProperties": False, "properties": properties}


def _launch_option(action: argparse.Action) -> dict[str, Any]:
    entry: dict[str, Any] = {"description": _words(action.help)}
    kind = "bool" if action.nargs == 0 else getattr(action.type, "__name__", None)
    if action.choices is not None:
        entry["enum"] = [*action.choices, None]
    elif kind in ("bool", "int", "float"):
        entry["type"] = [{"bool": "boolean", "int": "integer", "float": "number"}[kind], "null"]
    return {**entry, "x-from": "accelerate launch"}


def _by_hand() -> dict[str, dict[str, Any]]:
    """What the dataclasses see to themselves, where annotations and choices do not say it."""
    from trl_ama.dpo.losses import BATCH_LOSSES, PAIR_LOSSES
    from trl_ama.mixing import STRATEGIES

    strategies, losses = list(STRATEGIES), [*PAIR_LOSSES, *BATCH_LOSSES]
    number = {"type": "number", "exclusiveMinimum": 0}
    return {
        "tasks": {"type": "array", "items": {"$ref": "#/$defs/task"}},
        "mixing": {"anyOf": [{"enum": strategies}]},
        "mixing_lr": {"anyOf": [{"enum": ["auto", None]}, number]},
        "compare": {
            "items": {"type": "string", "enum": strategies},
            "anyOf": [{"enum": strategies}, {"type": "array"}],
        },
        "loss_type": {"items": {"type": "string", "enum": losses}, "anyOf": [{"enum": losses}, {"type": "array"}]},
        "prefix_sharing": {"type": ["string", "boolean"], "anyOf": [{"enum": ["auto", True, False, "true", "false"]}]},
        "skip_clipped": {"type": ["string", "boolean"], "anyOf": [{"enum": ["auto", True, False, "true", "false"]}]},
        "specialist_args": {"anyOf": [{"$ref": "#/$defs/specialist_args"}, {"type": ["string", "null"]}]},
        "fsdp": {"type": ["string", "array", "boolean", "null"]},
    }


def as_text(schema: dict[str, Any]) -> str:
    """The schema as the file holds it: a key of the recipe on each line."""
    return _text(schema, "") + "\n"


def _text(value: Any, margin: str) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or "description" in value and "$schema" not in value or len(line) < 80:
        return line
    inner = f"{margin}  "
    entries = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_text(entry, inner)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{margin}}}"


def main(argv: list[str] | None = None) -> None:
    """Print the schema, or write it into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into the package")
    writes = parser.parse_args(argv).write
    text = as_text(make_schema())
    if writes:
        Path(PATH).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
