"""Who runs in an output folder holds it: two runs in one folder would write over each other.

A run holds `.locks/run.lock`. Jobs that make the specialists or losses of some tasks only hold the locks of these tasks, so
that several of them can share a folder. The operating system lets go of a dead process's locks by itself.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ..common.errors import AMAError, first_line
from ..common.files import PARTIAL, remove_partial, write_json
from ..common.run_folder import LOCKS, RUN_LOCK, RunFolder, task_lock
from ..recipe.text import public_arguments


logger = get_logger(__name__)

_PATIENCE = 2.0  # seconds for those who only look whether a lock is held
_LAST_BREATH = (
    15.0  # seconds for the helpers of a process that was killed: data loaders look for their parent every five
)
_PAUSE = 0.05
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextlib.contextmanager
def folder_held(folder: Path, tasks: list[str] | None = None) -> Iterator[None]:
    """Hold an output folder, or some tasks of it; the main process does, and all processes meet the same error.

    Args:
        folder (`Path`): The output folder.
        tasks (`list[str]`, *optional*): The tasks of a job that writes nothing else.

    Raises:
        AMAError: At once, if another process holds what this one needs, with its name.
    """
    locks, problem, new = contextlib.ExitStack(), None, []
    if PartialState().is_main_process:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            _take(folder, tasks, locks)
        except AMAError as error:
            locks.close()
            problem = str(error)
    with locks:
        [problem] = broadcast_object_list([problem])
        if problem is not None:
            raise AMAError(problem)
        try:
            yield
        finally:
            if new:
                _remove_unused(folder, tasks, new)


def _remove_unused(folder: Path, tasks: list[str] | None, new: list[Path]) -> None:
    """Leave nothing behind of a run that was refused before it wrote anything: the folders that the locks made go again."""
    run = RunFolder(folder)
    own = {path.name for name in _names(tasks) for path in (run.lock(name), run.lock_note(name))}
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCKS] and set(os.listdir(run.locks)) <= {*own, run.lock(RUN_LOCK).name}:
            shutil.rmtree(run.locks)
            for path in new:
                path.rmdir()


def _names(tasks: list[str] | None) -> list[str]:
    return [RUN_LOCK] if tasks is None else [task_lock(task) for task in sorted(tasks)]


def _take(folder: Path, tasks: list[str] | None, locks: contextlib.ExitStack) -> None:
    for name in _names(tasks):
        locks.enter_context(_Lock(folder, name).held())
    if tasks is None:
        # Ours first, then a look at the others': of two that come at the same time, at least one sees the other
        for path in RunFolder(folder).task_locks():
            with _Lock(folder, path.stem).held(noted=False):
                pass
        remove_partial(folder)  # nobody else writes here
    else:
        with _Lock(folder, RUN_LOCK).held(noted=False):
            pass
        for place in [path for path in folder.iterdir() if path.is_dir() and path.name != LOCKS]:
            for task in tasks:  # which nobody else touches; of the rest, others may be writing
                remove_partial(place / task)
                remove_partial(place / f".{task}{PARTIAL}")


class _Lock:
    """One lock, with a note beside it of who holds it."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = RunFolder(folder), name
        self.path, self.note = self.folder.lock(name), self.folder.lock_note(name)

    @contextlib.contextmanager
    def held(self, noted: bool = True) -> Iterator[None]:
        """Hold it. Without a note, as those do who only look, others wait a moment for it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._acquired()
            if noted:
                before = self._holder()
                if before is not None:
                    logger.info(f"The lock '{self.path}' was left by {_words(before)}, which is gone.")
                write_json(self.note, _ourselves())
        except OSError as error:
            raise AMAError(
                f"The output folder '{self.folder.path}' cannot be written to ({first_line(error)}). Make it writable, or choose "
                "another output_dir."
            ) from error
        try:
            yield
        finally:
            if noted:
                with contextlib.suppress(OSError):
                    self.note.unlink(missing_ok=True)
            lock.release()

    def _acquired(self) -> BaseFileLock:
        begun = time.monotonic()
        kind: type[BaseFileLock] = FileLock
        while True:
            lock = kind(str(self.path))
            try:
                lock.acquire(timeout=0)
                return lock
            except Timeout:
                holder = self._holder()
            except (NotImplementedError, OSError) as error:
                if kind is SoftFileLock or getattr(error, "errno", errno.ENOSYS) not in _NO_FLOCK:
                    raise
                kind = SoftFileLock  # a network filesystem without locks: a file that is there or not
                continue
            waits = _PATIENCE
            if holder is not None and _is_here(holder):
                if _is_alive(holder):
                    raise self._conflict(holder)
                waits = _LAST_BREATH
                if kind is SoftFileLock:
                    logger.info(f"The lock '{self.path}' was left by {_words(holder)}, which is gone.")
                    self._break()
            if time.monotonic() - begun > waits:
                raise self._conflict(holder)
            time.sleep(_PAUSE)

    def _break(self) -> None:
        """Remove the file that stands for a dead process's lock; not one that another process has just put there."""
        with contextlib.suppress(OSError):
            # The note is written once the lock is held
            if self.path.stat().st_mtime_ns <= self.note.stat().st_mtime_ns:
                self.path.unlink()

    def _holder(self) -> dict[str, Any] | None:
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            words = {key: str(note[key]) for key in ("host", "since", "command")}
            return {"pid": int(note["pid"]), "born": float(note["born"]), **words}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _conflict(self, holder: dict[str, Any] | None) -> AMAError:
        what = f"The folder '{self.folder.path}'"
        if self.name != RUN_LOCK:
            what = f"Task '{self.name.removeprefix(task_lock(''))}' in '{self.folder.path}'"
        who = "another process" if holder is None else _words(holder)
        far = ""
        if holder is not None and not _is_here(holder):
            far = f" If nothing runs on {holder['host']} any more, delete '{self.folder.locks}'."
        return AMAError(f"{what} is in use by {who}. Wait until it is done, or choose another output_dir.{far}")


def _ourselves() -> dict[str, Any]:
    arguments = public_arguments(sys.argv)
    script = Path(sys.argv[0]).stem.replace("_", "-") if arguments is not None else ""
    return {
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "since": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "command": f"trl {script} {arguments}".strip() if script else "a Python program",
    }


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"


def _is_here(holder: dict[str, Any]) -> bool:
    return holder["host"] == socket.gethostname()


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["born"]) < 2  # numbers of processes come again
    except psutil.Error:
        return False
