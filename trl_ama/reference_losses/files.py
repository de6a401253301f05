"""The reference-loss dataset on disk and on the Hub: a folder per task with Parquet files and a note of what made them.

Whoever reads it trusts nothing: a stranger may have written it, or a download may have been cut off. So the note is held
against the files before a row is read, and the rows against each other before a number is used.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Value, concatenate_datasets

from ..common.errors import AMAError
from ..common.files import file_digest, read_json, sync, write_json
from ..common.run_folder import FINGERPRINT_FILE, rows_file
from ..common.versions import VERSIONS, is_known, is_newer
from ..tasks.config import check_task_names
from ..tasks.features import is_plain, unite_features
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS
from ..tasks.images import IMAGE_COLUMNS, embedded
from ..tasks.pairs import PAIR_ID_COLUMN
from .checks import check_file, read_rows, sha256, shown


NOTE_VERSION = VERSIONS[FINGERPRINT_FILE]
SPLITS = ("train", "test")
# Of a fingerprint: names of things, each with a hash or commit. The other fields are settings
_NAMES = ("task", "base_model", "tokenizer", "specialist", "train_pairs", "test_pairs", "data")
_LONGEST = 4000  # characters of a field; they are shown in messages and cards


@dataclass(frozen=True)
class TaskLosses:
    """One task's reference losses.

    Args:
        task (`str`): Name of the task.
        folder (`Path`): Where its files are.
        note (`dict`): What `fingerprint.json` holds: `fingerprint`, `texts`, `files`, `dropped` and `order`.
        splits (`dict[str, Dataset]`): `train` and, if there are held-out pairs, `test`.
    """

    task: str
    folder: Path
    note: dict[str, Any]
    splits: dict[str, Dataset]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decided the log-probs."""
        return self.note["fingerprint"]

    @property
    def dropped(self) -> set[str]:
        """Ids of the pairs that `DPOTrainer` drops, over all splits."""
        return {name for ids in self.note["dropped"].values() for name in ids}

    @property
    def has_text(self) -> bool:
        """Whether the rows hold the pairs' texts."""
        return all(column in self.splits["train"].column_names for column in PAIR_COLUMNS)


def save_task(
    folder: Path,
    task: str,
    tables: dict[str, Dataset],
    fingerprint: dict[str, Any],
    dropped: dict[str, list[str]],
    order: int = 0,
) -> None:
    """Save one task's splits; the folder appears whole or not at all.

    Args:
        folder (`Path`): The reference-loss dataset.
        task (`str`): Becomes a folder in it.
        tables (`dict[str, Dataset]`): The rows of each split; of rows with one `pair_id` the first is kept.
        fingerprint (`dict`): Everything that decided the log-probs.
        dropped (`dict[str, list[str]]`): Ids of the pairs of each split that `DPOTrainer` drops.
        order (`int`): Place of the task in the recipe.
    """
    temporary = folder / f".{task}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for split, table in tables.items():
        path = temporary / rows_file(split)
        embedded(_first_of_each_pair(table)).to_parquet(str(path))
        sync(path)
        files[path.name] = {"rows": pq.read_metadata(path).num_rows, "sha256": sha256(path)}
    note = {
        "version": NOTE_VERSION,
        "order": order,
        "fingerprint": fingerprint,
        "texts": _texts(tables["train"]),
        "files": files,
        "dropped": dropped,
    }
    write_json(temporary / FINGERPRINT_FILE, note)
    before = folder / f".{task}.before"
    shutil.rmtree(before, ignore_errors=True)
    if (folder / task).exists():
        os.replace(folder / task, before)  # never a half removed folder under the task's own name
    os.replace(temporary, folder / task)
    sync(folder)
    shutil.rmtree(before, ignore_errors=True)


def _texts(table: Dataset) -> dict[str, str]:
    """The columns of texts and their kinds, which all tasks of a config must share."""
    return {
        name: "images"
        if name in IMAGE_COLUMNS
        else "text"
        if isinstance(kind, Value)
        else "messages"
        if is_plain(kind)
        else "json"
        for name, kind in table.features.items()
        if name in (*PAIR_COLUMNS, *EXTRA_COLUMNS)
    }


def _first_of_each_pair(table: Dataset) -> Dataset:
    _, rows = np.unique(np.asarray(table[PAIR_ID_COLUMN]), return_index=True)
    return table if len(rows) == len(table) else table.select(np.sort(rows)).flatten_indices()


def without_text(losses: TaskLosses, folder: Path) -> None:
    """Save a task's losses into `folder` with ids and numbers only."""
    tables = {
        split: part.remove_columns([name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS) if name in part.column_names])
        for split, part in losses.splits.items()
    }
    save_task(folder, losses.task, tables, losses.fingerprint, losses.note["dropped"], losses.note["order"])


def tasks_in(folder: Path) -> list[str]:
    """The tasks that a reference-loss folder holds, in the order of the recipe that made them."""
    names = [
        path.parent.name for path in Path(folder).glob(f"*/{FINGERPRINT_FILE}") if not path.parent.name.startswith(".")
    ]
    order = {}
    for name in names:
        note = read_json(Path(folder) / name / FINGERPRINT_FILE)
        place = note.get("order") if isinstance(note, dict) else None
        order[name] = place if isinstance(place, int) else 0
    return sorted(names, key=lambda name: (order[name], name))


def read_note(folder: Path, where: str | None = None) -> dict[str, Any] | None:
    """What a task's `fingerprint.json` says; `None` if there is none.

    Raises:
        AMAError: If it is not such a note, or of another version.
    """
    note = read_json(folder / FINGERPRINT_FILE)
    if note is None:
        return None
    where = where or f"'{folder}'"
    version = note.get("version", 1) if isinstance(note, dict) else None
    if version is None or not is_known(FINGERPRINT_FILE, note):
        newer = version is not None and is_newer(FINGERPRINT_FILE, note)
        raise AMAError(
            f"The reference losses in {where} are of version {shown(repr(version))} ('{FINGERPRINT_FILE}'), this trl-ama reads version "
            f"{NOTE_VERSION}. {'Update trl-ama' if newer else 'Use the trl-ama that made them'}, or compute them again with `trl ama-losses --config …`."
        )
    if not _is_sound(note):
        raise AMAError(
            f"'{FINGERPRINT_FILE}' in {where} is not the note of reference losses: 'fingerprint', 'files', 'dropped' or 'order' is "
            "missing or of the wrong kind. Get an intact copy, or compute them again with `trl ama-losses --config …`."
        )
    return note


def _is_sound(note: dict[str, Any]) -> bool:
    """Whether a note has what it must, and nothing that cannot be compared, shown or written again."""
    if set(note) != {"version", "order", "fingerprint", "texts", "files", "dropped"}:
        return False
    files, dropped = note["files"], note["dropped"]
    return (
        _is_fingerprint(note["fingerprint"])
        and isinstance(note["texts"], dict)
        and set(note["texts"]) <= {*PAIR_COLUMNS, *EXTRA_COLUMNS}
        and all(
            kind in ("text", "messages", "json", "images") for kind in note["texts"].values() if isinstance(kind, str)
        )
        and all(isinstance(kind, str) for kind in note["texts"].values())
        and isinstance(files, dict)
        and {rows_file(SPLITS[0])} <= set(files) <= set(map(rows_file, SPLITS))
        and all(
            isinstance(entry, dict) and type(entry.get("rows")) is int and isinstance(entry.get("sha256"), str)
            for entry in files.values()
        )
        and isinstance(dropped, dict)
        and set(dropped) <= set(SPLITS)
        and all(isinstance(ids, list) and all(isinstance(name, str) for name in ids) for ids in dropped.values())
        and type(note["order"]) is int
        and _is_text(json.dumps([note["fingerprint"], dropped], ensure_ascii=False))
    )


def _is_fingerprint(fingerprint: Any) -> bool:
    if not isinstance(fingerprint, dict):
        return False
    versions = fingerprint.get("versions", {})
    return (
        isinstance(versions, dict)
        and all(isinstance(value, str) for value in versions.values())
        and all(isinstance(fingerprint.get(name), (str, type(None))) for name in _NAMES)
        and all(
            isinstance(value, (str, bool, int, float, type(None))) and len(str(value)) <= _LONGEST
            for name, value in fingerprint.items()
            if name != "versions"
        )
    )


def _is_text(text: str) -> bool:
    """JSON can hold halves of characters, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def damaged_file(folder: Path, note: dict[str, Any]) -> str | None:
    """The first file of a task that is not what its note says; `None` if all are."""
    for name, noted in note["files"].items():
        path = folder / name
        if not path.is_file() or file_digest(path) != noted["sha256"]:
            return name
    return None


def read_task(folder: Path, task: str, where: str | None = None) -> TaskLosses:
    """Read one task's reference losses and check them.

    Args:
        folder (`Path`): Folder of the task.
        task (`str`): Its name.
        where (`str`, *optional*): For messages, e.g. a Hub id.

    Raises:
        AMAError: If files are missing, damaged or not those that the note describes; or if rows have missing, doubled or
            wrong ids, another task, or log-probs that are missing, not finite or positive.
    """
    where = where or f"'{folder}'"
    check_task_names([task])
    note = read_note(folder, f"{where}, task '{task}'")
    if note is None:
        raise AMAError(
            f"There are no reference losses of task '{task}' in {where}. Run `trl ama-losses --config …` first."
        )
    owner = note["fingerprint"].get("task", task)
    if owner != task:
        raise AMAError(
            f"The reference losses of task '{task}' in {where} were made for task {shown(repr(owner))}, says their note. Get an "
            "intact copy, or compute them again with `trl ama-losses --config …`."
        )
    splits = {}
    for split in SPLITS:
        name = rows_file(split)
        if name in note["files"]:
            what = f"in '{name}' of task '{task}' in {where}"
            check_file(folder / name, note["files"][name], what)
            splits[split] = read_rows(folder / name, task, what)
    return TaskLosses(task, folder, note, splits)


def stack(parts: list[TaskLosses]) -> dict[str, Dataset]:
    """The rows of several tasks, by split, with the columns that all of them have.

    Raises:
        AMAError: If one task's texts are conversations and another's are not.
    """
    places = [(split, part) for split in SPLITS for part in parts if split in part.splits]
    united = unite_features([part.splits[split] for split, part in places], [part.task for _, part in places])
    stacked = {}
    for split in SPLITS:
        having = [(part, table) for (of, part), table in zip(places, united, strict=True) if of == split]
        rows = [table for _, table in having]
        if rows:
            shared = [name for name in rows[0].column_names if all(name in table.column_names for table in rows)]
            rows = [table.select_columns(shared) for table in rows]
            for (part, _), table in zip(having, rows, strict=True):
                if table.features != rows[0].features:
                    raise AMAError(
                        f"The reference losses of tasks '{having[0][0].task}' and '{part.task}' hold texts of different formats: "
                        f"{shown(rows[0].features)} and {shown(table.features)}. Load one of them alone, or compute both again."
                    )
            stacked[split] = concatenate_datasets(rows)
    return stacked
