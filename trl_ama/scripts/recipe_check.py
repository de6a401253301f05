"""Says what is wrong with a recipe before torch is imported, which takes seconds.

In the words of the checks that follow, in their order, and only what they will say for sure: where that hangs on a flag of the
command line, or on another version of a library than `recipe_schema.json` was made from, it is left to them.
"""

import contextlib
import functools
import json
import typing
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trl_ama.common.errors import AMAError, sentence
from trl_ama.common.limits import LimitError, check_limits
from trl_ama.common.value_types import check_hint
from trl_ama.scripts.config_file import Config, check_choice, check_names, join_values, read_config


PATH = Path(__file__).resolve().parent.parent / "recipe_schema.json"
MADE_FROM = ("trl", "transformers", "accelerate")
_RUN = ("ama", "ama-specialists", "ama-losses", "ama-eval")  # the commands that read all pairs
_KINDS = {
    "boolean": bool,
    "integer": int,
    "number": float,
    "string": str,
    "array": list,
    "object": dict,
    "null": type(None),
}
_TRUTHS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def check_early(command: str, argv: list[str]) -> None:
    """Raise the `AMAError` in which a command will end, if its recipe tells without torch.

    Args:
        command (`str`): Its name, e.g. `"ama-losses"`.
        argv (`list[str]`): Its arguments.
    """
    config = read_config(argv)
    if config is not None and command != "ama-report":
        _EarlyCheck(command, join_values(argv), config).run()


@functools.cache
def read_schema() -> dict[str, Any]:
    """The schema that the package holds."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def hint_of(entry: Mapping[str, Any]) -> Any:
    """The annotation for a property of the schema, as far as [`check_hint`] looks at it."""
    names = entry.get("x-annotated", entry.get("type", []))
    members = []
    for name in [names] if isinstance(names, str) else names:
        kind = _KINDS[name]
        members.append(list[hint_of(entry["items"])] if kind is list and "items" in entry else kind)
    return typing.Union[tuple(members)] if members else Any  # noqa: UP007


@functools.cache
def installed_versions() -> dict[str, str]:
    """The versions of the libraries whose keys a recipe may have; without one that is not installed."""
    found = {}
    for name in MADE_FROM:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_for_these_versions(schema: Mapping[str, Any]) -> bool:
    """Whether a schema was made from the libraries that are installed."""
    return installed_versions() == schema["x-made-from"]


class _EarlyCheck:
    def __init__(self, command: str, argv: list[str], config: Config):
        self.command, self.argv, self.config = command, argv, config
        schema = read_schema()
        own = schema["$defs"].get(command, {}).get("properties", {})
        self.entries = own | schema["properties"] | own  # in the order in which the command's parser has them
        (others,) = schema["patternProperties"]
        self.known = {*self.entries, *others.removeprefix("^(").removesuffix(")$").split("|")}
        self.is_current = is_for_these_versions(schema)
        self.flags = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("-")}

    def run(self) -> None:
        if self.is_current:
            check_names(self.config, self.known)
        elif not self.known.issuperset(self.config.values):
            return
        for key in self.config.values:
            if self._is_judged(key):
                entry = self.entries[key]
                if entry["x-from"] != "accelerate launch":
                    check_hint(hint_of(entry), key, self.config.values[key], self.config.place(key), parses_text=True)
                    choices = [one for one in entry.get("enum", ()) if one is not None]
                    check_choice(self.config, key, choices or None)
        if any("help".startswith(flag) for flag in self.flags if flag):
            return
        self.values = {
            key: self._converted(key, self.config.values[key])
            for key in self.entries
            if key in self.config.values and self._is_judged(key) and not self._is_overridden(key)
        }
        self._check_arguments()

    def _is_judged(self, key: str) -> bool:
        """Whether the schema knows for sure what a key may be."""
        return key in self.entries and (self.is_current or "x-inherited" not in self.entries[key])

    def _is_overridden(self, key: str) -> bool:
        """Whether a flag may take the place of the recipe's value: by its name, or by the beginning of one."""
        names = (key, f"no_{key}")
        return any(
            flag in names or flag not in self.entries and any(name.startswith(flag) for name in names)
            for flag in self.flags
            if flag
        )

    def _converted(self, key: str, value: Any) -> Any:
        """A value as `argparse` converts it: text alone."""
        entry = self.entries[key]
        kind = entry.get("x-text")
        if kind is None or not isinstance(value, str):
            return value
        if kind == "bool":
            if value.lower() in _TRUTHS:
                return _TRUTHS[value.lower()]
            problem = f"Truthy value expected: got {value} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
        else:
            # Of lists, `argparse` converts each entry
            if "null" in entry["type"] and "array" not in entry["type"] and value.lower() in ("none", "null"):
                return None
            try:
                return {"int": int, "float": float}[kind](value)
            except ValueError:
                problem = f"invalid {kind} value: {value!r}"
        flag = f"--{key}/--{key.replace('_', '-')}" if "_" in key else f"--{key}"
        raise AMAError(f"argument {flag}: {problem}")

    def _check_arguments(self) -> None:
        """What the dataclasses say, one after the other, and then the pipeline."""
        from trl_ama.mixing import check_strategy_name
        from trl_ama.recipe.arguments import PipelineArguments
        from trl_ama.tasks.config import TaskMixtureConfig

        try:
            self._made(PipelineArguments)
            if self.is_current:
                self._check_limits("AMAConfig", "Of AMAConfig,")
            if "mixing" in self.values:
                check_strategy_name(self.values["mixing"])
            tasks = self._made(TaskMixtureConfig)
            if self.is_current:
                self._check_limits("ModelConfig", "Of the arguments,")
        except LimitError as error:
            raise error.told_of(self.config.place(error.key)) if error.key in self.values else error from None
        relevant = ("model_name_or_path", "tasks", "tasks_dir", "reference_losses", "only_tasks", "specialists")
        if tasks is not None and not any(map(self._is_overridden, relevant)):
            self._check_tasks(tasks)

    def _made(self, cls: type) -> Any:
        """One of our dataclasses, of what the recipe says; `None` if it cannot be made for a reason that is not ours."""
        names = {key for key, entry in self.entries.items() if entry["x-from"] == cls.__name__}
        try:
            return cls(**{key: value for key, value in self.values.items() if key in names})
        except AMAError:
            raise
        except Exception:  # whatever it is, the command meets it too
            return None

    def _check_limits(self, group: str, where: str) -> None:
        check_limits(
            {
                key: self.values.get(key, entry.get("default"))
                for key, entry in self.entries.items()
                # AMAConfig reads `mixing_lr` itself
                if entry["x-from"] == group and key != "mixing_lr" and not self._is_overridden(key)
            },
            where,
        )

    def _check_tasks(self, tasks: Any) -> None:
        """Whether there are tasks, and the files that they name."""
        from trl_ama.tasks.no_tasks import no_tasks

        given = self.config.values
        if self.command not in (*_RUN, "ama-check") or not given.get("model_name_or_path"):
            return
        if not tasks.tasks:
            if not any(given.get(key) for key in ("reference_losses", "only_tasks", "specialists")):
                raise no_tasks(tasks)
            return
        if self.command == "ama-check":  # which reports what it cannot read
            return
        from trl_ama.tasks.local_files import cannot_load, exact_source, files_of, missing_file

        for task in tasks.tasks:
            if tasks.tasks_dir is not None:
                files_of(task, Path(tasks.tasks_dir))
            elif task.path is not None:
                source = {key: getattr(task, key) for key in ("path", "name", "data_dir", "data_files", "revision")}
                exact_source(task, {key: value for key, value in source.items() if value is not None})
                path = missing_file(task)
                if path is not None:
                    where = task.data_files
                    raise cannot_load(task, task.split, where, sentence(OSError(f"Unable to find '{path}'")))
