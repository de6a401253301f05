"""The files of pairs on this machine: which ones a folder holds for a task, and whether they can be JSON at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from .errors import AMAError
from .task_config import TaskConfig


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_START = 65536  # bytes


def files_of(task: TaskConfig, folder: Path) -> tuple[str, dict[str, str]]:
    """The name of the loader, and split → path of a task's files in `tasks_dir`.

    Raises:
        AMAError: If there is no file to train on.
    """
    files, loader = {}, None
    for split in ("train", "test"):
        for path in sorted(folder.glob(f"{task.task}_{split}.*")):
            suffix = next((part for part in reversed(path.suffixes) if part in _FORMATS), None)
            if suffix is not None:
                files[split], loader = str(path), _FORMATS[suffix]
                break
    if "train" not in files:
        raise AMAError(
            f"tasks_dir '{folder}' has no file for task '{task.task}'; looked for '{task.task}_train' with one of "
            f"{list(_FORMATS)}, possibly compressed."
        )
    return loader, files


def check_json(task: TaskConfig, path: str, data_files: Any) -> None:
    """Raise an `AMAError` if a local file for the loader `json` begins with something that is neither a row nor a list of rows.

    Arrow's reader ends the whole process with a segmentation fault if that is `null` (seen with pyarrow 26).
    """
    if path != "json":
        return
    for name in _names(data_files):
        try:
            if not Path(name).is_file():
                continue
            with fsspec.open(name, "rb", compression="infer") as file:
                start = file.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()
        except Exception:  # whatever it is, the loader meets it too, and says so
            continue
        if start and start[:1] not in b"{[" and start[:1].isascii():
            line = start.split(b"\n")[0][:40].decode(errors="replace").strip()
            raise AMAError(
                f"Task '{task.task}': '{name}' begins with {line!r}, which is no row. Write a JSON object on every line, "
                'e.g. {"prompt": …, "chosen": …, "rejected": …}.'
            )


def _names(data_files: Any) -> Iterator[str]:
    if isinstance(data_files, dict):
        data_files = list(data_files.values())
    if isinstance(data_files, list):
        for entry in data_files:
            yield from _names(entry)
    elif isinstance(data_files, str):
        yield data_files
