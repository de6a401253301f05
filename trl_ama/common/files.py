"""Files that are trusted later: written whole or not at all, and known again by their size and hash."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import AMAError


_SEAL = "sha256"  # of everything else in a sealed JSON file, but its version, which is checked first
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


PARTIAL = ".partial"  # how everything ends that is being written, and not yet under its name; it begins with a dot


def remove_partial(folder: Path) -> None:
    """Remove what a killed process was writing, in a folder in which nobody writes now; checkpoints are left alone.

    Args:
        folder (`Path`): It is removed itself if it was being written. It need not be there.
    """
    if folder.name.startswith(".") and folder.name.endswith(PARTIAL):
        _remove(folder)
    for place, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if name.startswith(".") and name.endswith(PARTIAL)]
        folders[:] = [name for name in folders if name not in left and not name.startswith("checkpoint-")]
        for name in left:
            _remove(Path(place, name))


def remove_abandoned(path: Path, seconds: float, ending: str = PARTIAL) -> None:
    """Remove what killed processes were writing to take the place of a file or folder, untouched for so long."""
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            if other.name.startswith(f".{path.name}.") and other.name.endswith(ending):
                if time.time() - other.stat().st_mtime > seconds:
                    _remove(other)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on the disk, under its name, when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk; a filesystem that cannot do that is left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _FULL or error.errno == errno.EIO:
            raise
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; computed again only if its size or time has changed."""
    stat = path.stat()
    return _file_digest(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, modified: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name → size in bytes and SHA-256, for `first_damage`."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in names}


def first_damage(folder: Path, files: dict[str, dict[str, Any]], by_size: bool = False) -> str | None:
    """What is wrong with the first file that is not what `describe_files` saw, as half a sentence; `None` if all are.

    Args:
        folder (`Path`): Where they are.
        files (`dict`): What `describe_files` returned.
        by_size (`bool`): Whether their sizes are enough, for an answer at once.

    Raises:
        AMAError: If a file is there and cannot be read.
    """
    for name, noted in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != noted["size"]:
                return f"its file '{name}' has {size} bytes and was written with {noted['size']}"
            if not by_size and file_digest(path) != noted["sha256"]:
                return f"its file '{name}' is not what was written"
        except (FileNotFoundError, NotADirectoryError):
            return f"its file '{name}' is missing"
        except OSError as error:
            # Of a network filesystem, perhaps, and for now: what is damaged is removed, so this is not taken for it
            raise unreadable(path, error) from error
    return None


def unreadable(path: Path, error: OSError) -> AMAError:
    """The error for a file that is there and cannot be read, of which nobody knows whether it is good."""
    return AMAError(f"'{path}' cannot be read ({error.strerror}). Mend that, and run the same command again to go on.")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a hash of itself, so that a change of any digit shows when it is read."""
    return {**content, _SEAL: _hash_of(content)}


def check_seal(content: Any, path: Path) -> None:
    """Raise an `AMAError` unless a JSON object is what `sealed` returned."""
    if not isinstance(content, dict) or content.get(_SEAL) != _hash_of(content):
        raise AMAError(
            f"'{path}' is damaged (its content is not what was written). Delete it, and its stage is done again."
        )


def _hash_of(content: dict[str, Any]) -> str:
    content = {key: value for key, value in content.items() if key not in (_SEAL, "version")}
    content = json.loads(json.dumps(content))  # as it will be read
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk, or a quota of one, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all; it is on the disk when this returns."""
    write_file(Path(path), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any | None:
    """Read JSON; `None` if there is no such file.

    Raises:
        AMAError: If the file is there but is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise AMAError(f"'{path}' is damaged ({error}). Delete it, and its stage is done again.") from error
