"""What the scripts share: the parser, the checks of flags and config file, and errors of one sentence."""

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl_ama.common import interruption
from trl_ama.common.errors import AMAError
from trl_ama.common.limits import LimitError, check_limits
from trl_ama.common.value_types import check_value
from trl_ama.common.yaml_files import check_yaml_file
from trl_ama.scripts.config_file import (
    RESERVED_KEYS,
    Config,
    check_choice,
    check_names,
    hint,
    join_values,
    read_config,
)
from trl_ama.scripts.messages import tidy_warnings
from trl_ama.scripts.recipe_check import check_early


def make_parser(
    command: str, subparsers: argparse._SubParsersAction | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """Build the parser of `command`; all commands read the same four dataclasses, so one YAML file serves them all."""
    from trl import ModelConfig, TrlParser

    from trl_ama.dpo.config import AMAConfig
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.scripts import COMMANDS
    from trl_ama.tasks.config import TaskMixtureConfig

    dataclass_types = (PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser(command, help=COMMANDS[command], dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


def no_device_parser(
    dataclass_types: tuple[type, ...], prog: str | None = None, forced: Callable[[tuple[Any, ...]], None] | None = None
) -> argparse.ArgumentParser:
    """Build the parser of a command that runs no model: it reads recipes for a GPU also on a machine that has none.

    Args:
        dataclass_types: What it parses into.
        prog (`str`, *optional*): The command's name, for messages.
        forced (`Callable`, *optional*): Is given the dataclasses if the recipe is for a GPU, which this machine lacks.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def parse_args_and_config(self, args=None, **kwargs):
            from torch import cuda

            args = list(sys.argv[1:] if args is None else args)
            config = read_config(args)
            given = any(arg.partition("=")[0] == "--use_cpu" for arg in args)
            given = given or bool(config is not None and config.values.get("use_cpu"))
            if given or cuda.is_available():
                return super().parse_args_and_config(args, **kwargs)
            # Where bf16 and its like would be refused
            parsed = super().parse_args_and_config([*args, "--use_cpu"], **kwargs)
            if forced is not None:
                forced(parsed)
            return parsed

    return Parser(dataclass_types, prog=prog)


@contextmanager
def report_errors(command: str) -> Iterator[None]:
    """Turn an `AMAError` into one line on stderr and exit code 2, as argparse does for a wrong flag; Ctrl-C into code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"trl {command}: stopped", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except AMAError as error:
        # Every process meets the same error. The first one speaks; the others wait, and are ended by the launcher
        # when it is gone, so that they are only heard if the first process has not failed.
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(5)
        print(f"trl {command}: error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def one_line(error: Exception) -> str:
    """Return the message of `error` on one line."""
    return " ".join(str(error).split())


def option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of `parser` by their names without leading dashes."""
    return {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if action.dest != "help"
    }


def known_keys(parser: argparse.ArgumentParser, launch_parser: argparse.ArgumentParser) -> set[str]:
    """The keys that a config file may have."""
    # TRL matches a key to an option's destination, `accelerate launch` gets it as a flag.
    known = {action.dest for action in parser._actions if action.dest != "help"}
    return known.union(option_names(launch_parser), RESERVED_KEYS)


def check_keys(config: Config | None, parser: argparse.ArgumentParser, launch_parser: argparse.ArgumentParser) -> None:
    """Raise an `AMAError` for the first key of `config` that nobody knows, or whose value is of a wrong type."""
    if config is None:
        return
    check_names(config, known_keys(parser, launch_parser))
    choices = {action.dest: action.choices for action in parser._actions if action.choices is not None}
    for key, value in config.values.items():
        for cls in getattr(parser, "dataclass_types", ()):
            check_value(cls, key, value, config.place(key), parses_text=True)
        check_choice(config, key, choices.get(key))


def check_flags(flags: list[str], parser: argparse.ArgumentParser, launch_parser: argparse.ArgumentParser) -> None:
    """Raise an `AMAError` unless `accelerate launch` takes all of `flags`, those that `parser` did not know."""
    # Options come first and the script follows, so a word that no option takes would be run as the script.
    script = "<script>"
    parsed, unknown = launch_parser.parse_known_args([*flags, script])
    unknown = [flag for flag in unknown if flag.startswith("-") and not re.fullmatch(r"-[\d.]+(e[+-]?\d+)?", flag)]
    if unknown:
        name = unknown[0].partition("=")[0]
        known = ["config", *RESERVED_KEYS[1:], *option_names(parser), *option_names(launch_parser)]
        guess = hint(name.lstrip("-"), known).replace("'", "'--", 1)
        raise AMAError(f"The flag '{name}' is known neither to the command nor to `accelerate launch`.{guess}")
    if parsed.training_script != script:
        raise AMAError(f"The value '{parsed.training_script}' follows no flag that takes it; put its flag before it.")
    if parsed.config_file is not None:
        check_yaml_file(parsed.config_file, f"The Accelerate config {parsed.config_file}")


def parse_dataclasses(parser: Any, argv: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """Parse `argv` and its config file; return the dataclasses and the flags that `parser` does not know."""
    try:
        *dataclasses, _, remaining = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        for values in map(vars, dataclasses):  # ours have looked at theirs already
            check_limits(values, "Of the arguments,")
    except LimitError as error:
        raise error.told_of(_place_of(error.key, argv) or str(error).partition(" '")[0]) from error
    except AMAError:
        raise
    except (
        Exception
    ) as error:  # from a dataclass's `__post_init__`: others' checks, of any kind; wrong flags end in argparse
        said = (
            one_line(error)
            if isinstance(error, (ValueError, TypeError))
            else f"{type(error).__name__}: {one_line(error)}"
        )
        raise AMAError(f"These arguments do not go together, or one cannot be used: {said}") from error
    return tuple(dataclasses), remaining


def _place_of(key: str, argv: list[str]) -> str | None:
    """Where a value was given, as the beginning of a sentence; `None` if it was not, so that it is a default."""
    if any(arg.partition("=")[0] == f"--{key}" for arg in argv):
        return "On the command line,"
    config = read_config(argv)
    return None if config is None or key not in config.values else config.place(key)


def split_arguments(parser: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """
    Check `argv` and split it into the arguments of `accelerate launch` and those of the script.

    Handles `-h` (prints the help of `parser` and exits) and sets the variables of the config file's `env`.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    argv = join_values(argv)
    config = read_config(argv)
    launch_parser = launch_command_parser()
    check_keys(config, parser, launch_parser)
    consumed = {action.dest for action in parser._actions}
    _, flags = parse_dataclasses(parser, argv)

    launch_args = list(flags)
    if config is not None:
        launch_args = _config_launch_arguments(config, consumed, option_names(launch_parser), flags) + launch_args
    try:
        launch_args = resolve_accelerate_config_argument(launch_args)
    except ValueError as error:
        raise AMAError(one_line(error)) from error
    check_flags(launch_args, parser, launch_parser)
    return launch_args, _without(argv, flags)


def _config_launch_arguments(
    config: Config, consumed: set[str], launch_options: dict[str, argparse.Action], flags: list[str]
) -> list[str]:
    """Return the keys of `config` that are for `accelerate launch`, as flags."""
    arguments: list[str] = []
    for key, value in config.values.items():
        if key == "env" or key in consumed or value is None:
            continue
        if key == "accelerate_config" and "--accelerate_config" in flags:
            continue  # as everywhere, the command line wins; TRL resolves only one of the two
        action = launch_options.get(key)
        if action is not None and action.nargs == 0:  # a switch: `multi_gpu: true` is `--multi_gpu`, without a value
            arguments += [f"--{key}"] if value else []
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def _without(argv: list[str], removed: list[str]) -> list[str]:
    """Return `argv` without `removed`, which argparse left over from it in the same order."""
    kept, rest = [], list(removed)
    for item in argv:
        if rest and item == rest[0]:
            rest.pop(0)
        else:
            kept.append(item)
    return kept


def parse_arguments(parser: Any, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Parse a script's own arguments, with the checks of the command: a script may be launched without it."""
    from accelerate.commands.launch import launch_command_parser

    argv = join_values(sys.argv[1:] if argv is None else argv)
    launch_parser = launch_command_parser()
    check_keys(read_config(argv), parser, launch_parser)
    dataclasses, flags = parse_dataclasses(parser, argv)
    if flags:
        check_flags(flags, parser, launch_parser)
        raise AMAError(
            f"The flags {flags} are for `accelerate launch`: put them before the script, or run `trl ama`, which takes "
            "both kinds in any order."
        )
    return dataclasses


def run_script(command: str, parser_fn: Callable[[], Any], main_fn: Callable[..., None]) -> None:
    """Run a script as a program: parse the command line, call `main_fn`, and report errors in one line.

    A signal is handled from the start: what imports libraries for seconds has nothing to lose, and says so with the same code.
    """
    tidy_warnings(command)
    with interruption.caught(), report_errors(command):
        check_early(command, sys.argv[1:])
        with nothing_collected():
            arguments = parse_arguments(parser_fn())
        main_fn(*arguments)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """While libraries are imported: what they make stays, and looking for garbage in it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_stages(stages: tuple[str, ...], *arguments: Any) -> None:
    """Run stages of the pipeline, which is imported for it.

    Args:
        stages (`tuple[str, ...]`): Their names.
        arguments: As [`run_pipeline`] takes them.
    """
    with nothing_collected():
        from trl_ama.pipeline.run import run_pipeline

    run_pipeline(*arguments, stages=stages)
