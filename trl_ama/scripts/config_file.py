"""The file that `--config` names: reads it, and says where in it something is wrong."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from trl_ama.common.errors import AMAError, nearest
from trl_ama.common.yaml_files import load_with_lines
from trl_ama.tasks.config import NO_STREAMING


# Keys of a config file that are neither a field of our dataclasses nor an option of `accelerate launch`.
RESERVED_KEYS = ("env", "accelerate_config")


class Config(NamedTuple):
    """A config file: its path, its content and the line of each key, for messages."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """Where a key stands, as the beginning of a sentence."""
        return f"The config file {self.path}" + (f", line {self.lines[key]}:" if key in self.lines else ":")


def join_values(argv: list[str]) -> list[str]:
    """Rewrite `--config=x` as `--config x`, for the two flags that TRL looks for by their exact name."""
    result = []
    for item in argv:
        flag, equals, value = item.partition("=")
        result += [flag, value] if equals and flag in ("--config", "--accelerate_config") else [item]
    return result


def read_config(argv: list[str]) -> Config | None:
    """Read the file that `--config` names, or return `None` without one."""
    argv = join_values(argv)
    if "--config" not in argv:
        return None
    index = argv.index("--config") + 1
    if index == len(argv):
        raise AMAError("--config needs the path of a YAML file, and none follows it.")
    path = argv[index]
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        values, lines = load_with_lines(text, f"The config file {path}")
    except AMAError:
        raise
    except OSError as error:
        raise AMAError(
            f"The config file {path} cannot be read ({error.strerror}); give --config the path of a YAML file."
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # also numbers of thousands of digits, days like 2025-13-45
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise AMAError(f"The config file {path}{where} is not valid YAML: {problem}.") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise AMAError(
            f"The config file {path}, line 1, must hold a YAML mapping (`key: value` lines), but holds {found}."
        )
    lines.setdefault("env", lines.get("<<", 1))
    if not isinstance(values.get("env", {}), dict):
        raise AMAError(
            f"The config file {path}, line {lines['env']}: `env` must be a mapping of environment variables to "
            f"values, but is {values['env']!r}."
        )
    for name, value in values.get("env", {}).items():
        if not re.fullmatch(r"[^=\0]+", str(name)) or "\0" in str(value):
            raise AMAError(
                f"The config file {path}, line {lines['env']}: `env` has {str(name)!r}, which cannot be an environment variable with the "
                f"value {str(value)!r:.80}. Mend or remove it."
            )
    return Config(path, {str(key): value for key, value in values.items()}, lines)


def hint(name: str, known: Iterable[str]) -> str:
    """What to say of a name that nobody knows: which it is like, or why there is none like it."""
    return f" {NO_STREAMING}" if name == "streaming" else nearest(name, list(known))


def check_names(config: Config, known: Iterable[str]) -> None:
    """Raise an `AMAError` for the first key of `config` that is not among the known ones."""
    known = set(known)
    for key in config.values:
        if key not in known:
            where = f", line {config.lines[key]}," if key in config.lines else ""
            raise AMAError(
                f"The config file {config.path}{where} has the key '{key}', which neither the command nor `accelerate "
                f"launch` knows.{hint(key, sorted(known))}"
            )


def check_choice(config: Config, key: str, choices: Iterable[str] | None) -> None:
    """Raise an `AMAError` if a key's value is text that is not among its choices; without any, all passes.

    `argparse` looks at what the command line gives, and not at defaults, which the file's values become.
    """
    value = config.values[key]
    if choices is not None and isinstance(value, str) and value not in choices:
        raise AMAError(
            f"{config.place(key)} '{key}' must be one of {list(choices)}, got {value!r}.{nearest(value, list(choices))}"
        )
