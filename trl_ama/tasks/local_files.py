"""The files of pairs on this machine: which ones a folder holds for a task, their exact paths, and whether they are text at all."""

import codecs
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from ..common.errors import AMAError
from .config import TaskConfig


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"}
_START = 65536  # bytes
_OTHER_TEXTS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as that of UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def files_of(task: TaskConfig, folder: Path) -> dict[str, tuple[str, str]]:
    """Split → name of the loader and path, of a task's files in `tasks_dir`.

    Raises:
        AMAError: If there is no file to train on, or more than one for a split.
    """
    files: dict[str, tuple[str, str]] = {}
    for split in ("train", "test"):
        for path in sorted(folder.glob(f"{task.task}_{split}.*")):
            suffix = _suffix(path)
            if suffix is None:
                continue
            if split in files:
                raise AMAError(
                    f"tasks_dir '{folder}' has two files for the {split} pairs of task '{task.task}': '{Path(files[split][1]).name}' and "
                    f"'{path.name}'. Leave one, or put all pairs into it."
                )
            files[split] = _FORMATS[suffix], str(path)
    if "train" not in files:
        raise AMAError(
            f"tasks_dir '{folder}' has no file for task '{task.task}'; looked for '{task.task}_train' with one of "
            f"{list(_FORMATS)}, possibly compressed."
        )
    return files


def _suffix(path: Path) -> str | None:
    """The ending that says how to read a file, or `None`: one that is neither data nor compressed data is no file of pairs."""
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def exact_source(task: TaskConfig, source: dict[str, Any]) -> dict[str, Any]:
    """What to give `load_dataset`, for which every path is a pattern, so that a path that exists stands for itself.

    Without it `set [2]/pairs.jsonl` is read from the folder `set 2`. What does not exist may be a pattern, but below the folders
    that do.

    Args:
        task ([`TaskConfig`]): For messages.
        source (`dict`): Arguments of `load_dataset`.

    Raises:
        AMAError: If there is no way to name the folder.
    """
    path, files, folder = source["path"], source.get("data_files"), source.get("data_dir")
    if os.path.isfile(path):
        raise AMAError(
            f"Task '{task.task}': path '{path}' is a file. Write `path: {_FORMATS.get(_suffix(Path(path)) or '', 'json')}` and "
            f"`data_files: {path}`."
        )
    if os.path.isdir(path):
        root = os.path.realpath(os.path.join(path, folder or ""))
        if files is not None:
            source = {**source, "data_files": _map_paths(files, lambda name: _exact(root, name))}
        if not glob.has_magic(root):
            return source
        if files is not None:
            return {**source, "path": _loader(task, root, files), "data_dir": None}
        if source.get("name") is not None:
            raise AMAError(
                f"Task '{task.task}': the folder '{root}' has one of the characters * ? [ ] in its name, and `name` asks for one of its "
                "configurations, which `datasets` cannot find there. Rename the folder, or name the files with `data_files`."
            )
        return {**source, "path": _loader(task, root, None), "data_dir": glob.escape(root)}
    if path not in ("json", "csv", "parquet"):
        return source
    root = os.path.realpath(os.path.expanduser(folder or ""))
    if files is not None:
        return {**source, "data_files": _map_paths(files, lambda name: _exact(root, name))}
    return {**source, "data_dir": glob.escape(root)} if glob.has_magic(root) else source


def missing_file(task: TaskConfig) -> str | None:
    """The first of a task's local files that is not there; `None` if all are, or that is for the loader to say.

    Args:
        task ([`TaskConfig`]): With a `path`, and read without `tasks_dir`.
    """
    if task.path not in ("json", "csv", "parquet") or os.sep != "/":  # elsewhere the loader writes paths its own way
        return None
    root = os.path.realpath(os.path.expanduser(task.data_dir or ""))
    for name in _names(task.data_files):
        path = os.path.join(root, name)
        if "://" in name or "::" in name or glob.has_magic(path) or os.path.isdir(path):
            return None
        if not os.path.lexists(path):
            return path
    return None


def cannot_load(task: TaskConfig, split: str, where: Any, said: str) -> AMAError:
    """The error for a task whose rows cannot be read.

    Args:
        task ([`TaskConfig`]): The task.
        split (`str`): As the recipe names it.
        where (`Any`): Its `data_files`, or its `path`.
        said (`str`): What the loader says of it, as whole sentences.
    """
    return AMAError(
        f"Task '{task.task}' cannot be loaded: split '{split}' of {where!r}: {said} Check `path`, `data_files` and "
        "`split` of the task, or point it at local files with --tasks_dir."
    )


def _map_paths(files: Any, change: Any) -> Any:
    if isinstance(files, dict):
        return {split: _map_paths(entry, change) for split, entry in files.items()}
    if isinstance(files, list):
        return [_map_paths(entry, change) for entry in files]
    return change(files) if isinstance(files, str) else files


def _exact(root: str, name: str) -> str:
    """`name`, relative to `root`, as a pattern that means the file or folder of that name as far as there is one."""
    if "://" in name or "::" in name or not glob.has_magic(os.path.join(root, name)):
        return name
    done = Path(os.path.join(root, name)).anchor
    parts = Path(os.path.join(root, name)).parts[1:]
    for number, part in enumerate(parts):
        if not os.path.lexists(os.path.join(done, part)):
            return os.path.join(glob.escape(done), *parts[number:])
        done = os.path.join(done, part)
    return glob.escape(done)


def _loader(task: TaskConfig, folder: str, files: Any) -> str:
    """The loader for the files of a folder; they have to be of one kind."""
    names = _names(files) if files is not None else map(str, Path(folder).rglob("*"))
    kinds = {_FORMATS[suffix] for name in names if (suffix := _suffix(Path(name))) is not None}
    if len(kinds) != 1:
        found = "no files of pairs" if not kinds else f"files of several kinds {sorted(kinds)}"
        raise AMAError(
            f"Task '{task.task}': the folder '{folder}', which has one of the characters * ? [ ] in its name, holds {found}. Name the "
            "files: `path: json` (or csv, parquet) with `data_files`."
        )
    return kinds.pop()


def check_text(task: TaskConfig, source: dict[str, Any]) -> None:
    """Raise an `AMAError` if a local file for the loader `json` or `csv` is not UTF-8, or holds neither a row nor a list of rows.

    Arrow's reader ends the whole process with a segmentation fault if JSON begins with `null` (seen with pyarrow 26).
    """
    path = source["path"]
    if path not in ("json", "csv"):
        return
    for name in _names(source.get("data_files")):
        name = os.path.join(os.path.expanduser(source.get("data_dir") or ""), name)
        try:
            if not Path(name).is_file():
                continue
            with fsspec.open(name, "rb", compression="infer") as file:
                start = file.read(_START)
        except Exception:  # whatever it is, the loader meets it too, and says so
            continue
        coding = next((name for mark, name in _OTHER_TEXTS.items() if start.startswith(mark)), None)
        if coding is not None:
            raise AMAError(f"Task '{task.task}': '{name}' is written in {coding}. Save it as UTF-8.")
        start = start.removeprefix(codecs.BOM_UTF8).lstrip()
        if path == "json" and start and start[:1] not in b"{[" and start[:1].isascii():
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
