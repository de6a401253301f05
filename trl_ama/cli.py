"""The commands `ama`, `ama-specialists`, `ama-losses` and `ama-eval`, for `trl`, `trl-ama` and `python -m trl_ama`.

They do what TRL's `TrainingCommand` does, parse here and run the script under `accelerate launch`, with one addition:
whatever is wrong with the input is said in one sentence before anything is launched.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from trl_ama.common import interruption
from trl_ama.common.errors import AMAError
from trl_ama.scripts import COMMANDS


if TYPE_CHECKING:
    from trl.cli.commands.base import Command, CommandContext


def run_command(name: str, argv: list[str]) -> int:
    """
    Launch a script of `trl_ama/scripts` with accelerate, and return the exit code.

    Args:
        name (`str`):
            The command; `"ama-losses"` runs `trl_ama/scripts/ama_losses.py`.
        argv (`list[str]`):
            What follows its name.
    """
    from trl_ama.scripts.common import nothing_collected, report_errors, split_arguments
    from trl_ama.scripts.messages import tidy_warnings
    from trl_ama.scripts.recipe_check import check_early

    tidy_warnings(name)
    with report_errors(name):
        # What is wrong with a recipe should not have to wait for torch, which the parser imports
        check_early(name, argv)

        script = importlib.import_module(f"trl_ama.scripts.{name.replace('-', '_')}")
        if hasattr(script, "run_without_recipe"):  # nothing to parse or launch
            return script.run_without_recipe(argv)
        with nothing_collected():
            launch_args, script_args = split_arguments(script.make_parser(prog=f"trl {name}"), argv)
        if hasattr(script, "run_here"):  # nothing to launch
            return script.run_here(launch_args, script_args)
        return _launch(Path(script.__file__), launch_args, script_args)


def _launch(script: Path, launch_args: list[str], script_args: list[str]) -> int:
    """Run `script` under `accelerate launch` and return its exit code; the child has reported its own errors."""
    path = str(script.resolve())
    with _signals_passed_on(path), _noted_code() as noted_code:
        try:
            from trl.cli.accelerate_launcher import launch_training_script

            # TRL joins the name to its own scripts folder; joining an absolute path gives that path.
            launch_training_script(path, launch_args, script_args)
        except subprocess.CalledProcessError as error:
            return _exit_code(error.returncode)
        except ValueError as error:  # how accelerate rejects flags that contradict each other
            raise AMAError(f"accelerate launch refused its arguments {launch_args}: {error}") from error
        except Exception as error:
            # torch's elastic agent, which runs several processes, raises a ChildFailedError; not imported to catch it
            # because that import is slow and a single process never needs it.
            number = getattr(error, "sigval", None)
            if number is not None:
                # Its SignalException: it has passed the signal on, and does not say what came of it
                return noted_code() or 128 + number
            failures = getattr(error, "failures", None)
            if not failures:
                raise
            first = min(failures.values(), key=lambda failure: failure.timestamp)
            return _exit_code(first.exitcode)
    return 0


@contextlib.contextmanager
def _noted_code() -> Iterator[Callable[[], int | None]]:
    """While open, the launched processes note their exit code; gives a function that returns it, or `None` without one."""
    with contextlib.ExitStack() as stack:
        path = None
        with contextlib.suppress(OSError):  # no place for a temporary file is no reason not to run
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trl_ama_", ignore_cleanup_errors=True))
            path = os.environ[interruption.NOTE] = os.path.join(folder, "exit_code")

        def read() -> int | None:
            try:
                return int(Path(path).read_text()) if path else None
            except (OSError, ValueError):
                return None

        try:
            yield read
        finally:
            os.environ.pop(interruption.NOTE, None)


@contextlib.contextmanager
def _signals_passed_on(script: str) -> Iterator[None]:
    """While open, SIGTERM and Ctrl-C go to the process that runs `script`, which saves and leaves, and this one waits for its
    exit code. Before there is that process, they end this one.

    Several processes are launched by torch's elastic agent, which does that by itself and then replaces these handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import psutil

    def runs_script(child: psutil.Process) -> bool:
        try:
            return script in child.cmdline()
        except psutil.Error:  # it has just ended
            return True

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = [child for child in psutil.Process().children() if runs_script(child)]
        if not children and not _waits(frame):
            interruption.leave("nothing has begun", number=number)
        if number == signal.SIGINT and _is_told_anyway():
            return
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waits(frame: FrameType | None) -> bool:
    """Whether a process is being waited for. A signal to both may have ended it first: its exit code counts then."""
    while frame is not None:
        if frame.f_code.co_filename == subprocess.__file__ and "wait" in frame.f_code.co_name:
            return True
        frame = frame.f_back
    return False


def _is_told_anyway() -> bool:
    """Whether the launched process hears of Ctrl-C without us: from the terminal in whose foreground both are."""
    if sys.platform == "win32":  # from the console
        return True
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):  # no terminal
        return False


def _exit_code(returncode: int) -> int:
    """Map a process's return code to what a shell reports: 128 + n for a process ended by signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def get_commands() -> list["Command"]:
    """Return the commands that trl-ama adds to `trl`."""
    from trl.cli.commands.base import Command  # `trl-ama` does without, because importing `trl` takes half a second

    class AMACommand(Command):
        """A command of trl-ama in the command line of TRL."""

        def register(self, subparsers) -> None:
            subparsers.add_parser(self.name, help=self.help_text, add_help=False)

        def run(self, args: Namespace, context: "CommandContext") -> int:
            return run_command(self.name, context.argv_after(self.name))

    return [AMACommand(name, help_text) for name, help_text in COMMANDS.items()]


def main(argv: list[str] | None = None) -> int:
    """Run `trl-ama`: the same commands as `trl`, and `trl-ama --config ...` for `trl ama --config ...`."""
    parser = ArgumentParser(
        prog="trl-ama", description="AutoMixAlign for TRL. Without a command, flags go to `ama`.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(help="available commands", dest="command")
    for name, help_text in COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["ama", *argv]
    args, _ = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return run_command(args.command, argv[argv.index(args.command) + 1 :])


if __name__ == "__main__":
    raise SystemExit(main())
