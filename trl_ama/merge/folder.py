"""The folder of a merged checkpoint: written whole or not at all, and never over anything else."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.errors import AMAError
from ..common.files import remove_abandoned


_ABANDONED = 24 * 3600  # seconds without a new file: longer than a large base takes to load
_MERGING = (
    ".merging"  # not as what a run writes, which goes when the next one begins: a merge holds no lock of the folder
)
NOTE_FILE = "ama_merge.json"  # says that a folder is a merge, and of what


@contextlib.contextmanager
def whole_or_not(output: Path, overwrite: bool, keep_off: Sequence[str] = ()) -> Iterator[Path]:
    """A folder beside `output` to write to, which takes its place when the context ends without an error.

    Args:
        output (`Path`): The folder to make.
        overwrite (`bool`): Whether it may replace what an earlier merge wrote there.
        keep_off (`Sequence[str]`): Folders that are read, and names that are none; `output` must be outside of them.

    Raises:
        AMAError: If `output` is in use, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    _check(output, overwrite, keep_off)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(output, _ABANDONED, _MERGING)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_MERGING, dir=output.parent))
        os.chmod(folder, 0o755)
    except OSError as error:
        raise AMAError(
            f"The folder '{output}' cannot be made ({error.strerror}). Give --output another place."
        ) from error
    try:
        yield folder
        for path in folder.rglob("*"):  # safetensors are written for their owner alone
            os.chmod(path, 0o755 if path.is_dir() else 0o644)
        _put_in_place(folder, output)
    except OSError as error:
        raise AMAError(
            f"The merged model cannot be written to '{output}' ({error.strerror or error}). What was there is untouched; make room, or give "
            "--output another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(output: Path, overwrite: bool, keep_off: Sequence[str]) -> None:
    real = output.resolve()
    for name in keep_off:
        if os.path.isdir(name) and (real == Path(name).resolve() or Path(name).resolve() in real.parents):
            raise AMAError(f"--output '{output}' is in '{name}', which is read here. Give it a folder of its own.")
    if not output.exists():
        return
    if not output.is_dir():
        raise AMAError(f"--output '{output}' is a file. Give it the name of a new folder.")
    if not any(output.iterdir()):
        return
    if not (output / NOTE_FILE).is_file():
        raise AMAError(f"--output '{output}' is not empty, and was not made by a merge. Give it a new folder.")
    if not overwrite:
        raise AMAError(
            f"--output '{output}' holds a merged model already. Pass --overwrite to replace it, or give another folder."
        )


def _put_in_place(folder: Path, output: Path) -> None:
    if not output.exists():
        os.rename(folder, output)
        return
    before = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    os.rename(output, before / output.name)
    try:
        os.rename(folder, output)
    except OSError:
        os.rename(before / output.name, output)
        raise
    finally:
        shutil.rmtree(before, ignore_errors=True)
