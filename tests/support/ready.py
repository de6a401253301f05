"""A process that has imported everything and computed nothing, forked off this one before its first test: jobs are forked off it.

For what trains, forks itself, or runs a command of ours, whose imports take seconds. By then this process has threads, of
autograd as of the server, whose locks a fork of it could wait for. Libraries have read the environment: what a job changes of it
counts for what reads it later, and for the processes that the job starts.
"""

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


_connection = None


def make_ready() -> None:
    """Fork the process off. Called when all tests are imported and none has run."""
    global _connection
    if _connection is not None or not hasattr(os, "fork"):
        return
    _connection, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child:
        theirs.close()
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)  # so that it is no child of this process: tests look at those, and send them signals
    _connection.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(EOFError):
            while True:
                theirs.send(_answer(theirs, *theirs.recv()))
    finally:
        os._exit(0)


def _answer(connection, request: str, *details: Any) -> int | None:
    if request == "start":
        pid = os.fork()
        if not pid:
            connection.close()
            _run(*details)
        return pid
    [pid] = details
    done, status = os.waitpid(pid, os.WNOHANG if request == "poll" else 0)
    return os.waitstatus_to_exitcode(status) if done else None


def _run(function: Callable, arguments: tuple, environ: dict[str, str], folder: str, seconds: int) -> None:
    """In the job's process: call the function and end."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        gc.enable()
        os.environ.clear()
        os.environ.update(environ)
        _print_to(folder)
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nothing of what ends the tests happens here


def _print_to(folder: str) -> None:
    """What pytest catches of this process is no longer where it prints."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
        setattr(
            sys, name, io.TextIOWrapper(open(number, "wb", closefd=False, buffering=0), "utf-8", write_through=True)
        )  # noqa: SIM115
    for reference in logging._handlerList:
        handler = reference()
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    warnings.showwarning = warnings._showwarning_orig


class Job:
    """A function that runs in a process of its own.

    Args:
        function (`Callable`): Of a module, as it is sent by its name.
        arguments: Its arguments, which can be pickled.
        folder (`Path`): For what it prints: files `stdout` and `stderr`.
        environ (`dict[str, str]`, *optional*): Its environment; that of this process by default.
        seconds (`int`): After which it is ended by SIGALRM.
    """

    def __init__(self, function: Callable, *arguments: Any, folder: Path, environ=None, seconds: int = 300):
        assert _connection is not None, "no process was made ready"
        environ = dict(os.environ) if environ is None else environ
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._code = folder, None
        self.pid = self._ask("start", function, arguments, environ, str(folder), seconds)

    def _ask(self, *request: Any) -> int | None:
        _connection.send(request)
        return _connection.recv()

    def poll(self) -> int | None:
        """What `subprocess` calls the return code; `None` for a job that goes on."""
        if self._code is None:
            self._code = self._ask("poll", self.pid)
        return self._code

    def wait(self) -> int:
        """The return code, when it has ended."""
        if self._code is None:
            self._code = self._ask("wait", self.pid)
        return self._code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self._folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """The same of errors."""
        return (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")


def run_module(name: str, arguments: list[str]) -> None:
    """A job: `python -m`."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def leave_with(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """A job: the command line of a script, which returns its exit code."""
    sys.exit(main(arguments))
