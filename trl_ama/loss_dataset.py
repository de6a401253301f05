"""The reference-loss dataset on disk and on the Hub: a folder per task with Parquet files and a note of what made them.

Whoever reads it trusts nothing: a stranger may have written it, or a download may have been cut off. So the note is held
against the files before a row is read, and the rows against each other before a number is used.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, concatenate_datasets, load_dataset

from .errors import AMAError, first_line
from .fingerprint import read_json, write_json
from .reference_columns import LOGP_COLUMNS, TOKEN_COLUMNS, has_columns
from .tasks import EXTRA_COLUMNS, PAIR_COLUMNS, PAIR_ID_COLUMN, TASK_COLUMN, check_task_names, pair_id


NOTE_FILE = "fingerprint.json"
NOTE_VERSION = 2
SPLITS = ("train", "test")
_TYPES = {
    TASK_COLUMN: ("string", "large_string"),
    PAIR_ID_COLUMN: ("string", "large_string"),
    **dict.fromkeys(LOGP_COLUMNS, ("float32", "float64")),
    **dict.fromkeys(TOKEN_COLUMNS, ("int32", "int64")),
}
# Anything else (Image, Audio, …) may open files that a row names
_PLAIN_FEATURES = ("Value", "List", "LargeList", "Sequence", "Json")
_POSITIVE_LOGP = 1e-3  # nats; log-probs of a sure token round to a little above zero


@dataclass(frozen=True)
class TaskLosses:
    """One task's reference losses.

    Args:
        task (`str`): Name of the task.
        folder (`Path`): Where its files are.
        note (`dict`): What `fingerprint.json` holds: `fingerprint`, `files`, `dropped` and `order`.
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
        path = temporary / f"{split}.parquet"
        _first_of_each_pair(table).to_parquet(str(path))
        files[path.name] = {"rows": pq.read_metadata(path).num_rows, "sha256": _sha256(path)}
    note = {"version": NOTE_VERSION, "order": order, "fingerprint": fingerprint, "files": files, "dropped": dropped}
    write_json(temporary / NOTE_FILE, note)
    shutil.rmtree(folder / task, ignore_errors=True)
    temporary.rename(folder / task)


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tasks_in(folder: Path) -> list[str]:
    """The tasks that a reference-loss folder holds, in the order of the recipe that made them."""
    names = [path.parent.name for path in Path(folder).glob(f"*/{NOTE_FILE}") if not path.parent.name.startswith(".")]
    order = {}
    for name in names:
        note = read_json(Path(folder) / name / NOTE_FILE)
        place = note.get("order") if isinstance(note, dict) else None
        order[name] = place if isinstance(place, int) else 0
    return sorted(names, key=lambda name: (order[name], name))


def read_note(folder: Path, where: str | None = None) -> dict[str, Any] | None:
    """What a task's `fingerprint.json` says; `None` if there is none.

    Raises:
        AMAError: If it is not such a note, or of another version.
    """
    note = read_json(folder / NOTE_FILE)
    if note is None:
        return None
    where = where or f"'{folder}'"
    version = note.get("version") if isinstance(note, dict) else None
    if version != NOTE_VERSION:
        raise AMAError(
            f"The reference losses in {where} are of version {version!r}, this trl-ama reads version {NOTE_VERSION}. Compute "
            "them again with `trl ama-losses --config …`, or use the trl-ama that made them."
        )
    sound = (
        isinstance(note.get("fingerprint"), dict)
        and isinstance(note.get("files"), dict)
        and f"{SPLITS[0]}.parquet" in note["files"]
        and set(note["files"]) <= {f"{split}.parquet" for split in SPLITS}
        and all(
            isinstance(entry, dict) and isinstance(entry.get("rows"), int) and isinstance(entry.get("sha256"), str)
            for entry in note["files"].values()
        )
        and isinstance(note.get("dropped"), dict)
        and all(
            isinstance(ids, list) and all(isinstance(name, str) for name in ids) for ids in note["dropped"].values()
        )
        and isinstance(note.get("order"), int)
    )
    if not sound:
        raise AMAError(
            f"'{NOTE_FILE}' in {where} is not the note of reference losses: 'fingerprint', 'files', 'dropped' or 'order' is "
            "missing or of the wrong kind. Get an intact copy, or compute them again with `trl ama-losses --config …`."
        )
    return note


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
    note = read_note(folder, where)
    if note is None:
        raise AMAError(
            f"There are no reference losses of task '{task}' in {where}. Run `trl ama-losses --config …` first."
        )
    splits = {}
    for split in SPLITS:
        name = f"{split}.parquet"
        if name in note["files"]:
            what = f"in '{name}' of task '{task}' in {where}"
            _check_file(folder / name, note["files"][name], what)
            splits[split] = _read_rows(folder / name, what)
            check_rows(splits[split], task, what)
    return TaskLosses(task, folder, note, splits)


_AGAIN = "Get an intact copy, or delete the task's folder and compute it again with `trl ama-losses --config …`."


def _check_file(path: Path, noted: dict[str, Any], what: str) -> None:
    """Hold a Parquet file's footer and hash against the note, before a row of it is read."""
    if not path.is_file():
        raise AMAError(f"There are no reference losses {what}, though the note beside them lists that file. {_AGAIN}")
    try:
        schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        features = Features.from_arrow_schema(schema)
    except Exception as error:  # pyarrow and datasets raise many kinds; all mean a damaged file
        raise AMAError(f"The reference losses {what} cannot be read: {first_line(error)} {_AGAIN}") from error
    if rows != noted["rows"]:
        raise AMAError(
            f"The reference losses {what} have {rows} rows, the note beside them says {noted['rows']}. {_AGAIN}"
        )
    for column, types in _TYPES.items():
        if column not in features:
            raise AMAError(
                f"The reference losses {what} have no column '{column}'; found {sorted(features)}. {_AGAIN}"
            )
        kind = getattr(features[column], "dtype", type(features[column]).__name__)
        if kind not in types:
            raise AMAError(
                f"Column '{column}' of the reference losses {what} is {kind}, it must be {types[0]}. {_AGAIN}"
            )
    unknown = sorted(set(features) - {*_TYPES, *PAIR_COLUMNS, *EXTRA_COLUMNS})
    if unknown:
        raise AMAError(
            f"The reference losses {what} have the column '{unknown[0]}', which does not belong there. {_AGAIN}"
        )
    for column in set(features) - set(_TYPES):
        if not _is_plain(features[column]):
            raise AMAError(
                f"Column '{column}' of the reference losses {what} is {features[column]}, not text. {_AGAIN}"
            )
    if _sha256(path) != noted["sha256"]:
        raise AMAError(f"The reference losses {what} are not the file that the note beside them describes. {_AGAIN}")


def _is_plain(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if type(feature).__name__ not in _PLAIN_FEATURES:
        return False
    inner = getattr(feature, "feature", None)
    return inner is None or _is_plain(inner)


def _read_rows(path: Path, what: str) -> Dataset:
    try:
        return load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # as above
        raise AMAError(f"The reference losses {what} cannot be read: {first_line(error)} {_AGAIN}") from error


def check_rows(rows: Dataset, task: str, what: str) -> None:
    """Raise an `AMAError` unless every row is a pair of `task` with an id of its own and log-probs that can be."""
    owners = rows.unique(TASK_COLUMN) if len(rows) else [task]
    if owners != [task]:
        other = next(owner for owner in owners if owner != task)
        raise AMAError(f"The reference losses {what} hold rows of task {other!r}, but belong to '{task}'. {_AGAIN}")
    ids = rows[PAIR_ID_COLUMN][:]
    if any(not name for name in ids):
        raise AMAError(f"The reference losses {what} have rows without a pair_id. {_AGAIN}")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        double = next(name for name in ids if name in seen or seen.add(name))
        raise AMAError(f"The reference losses {what} have the pair_id '{double}' more than once. {_AGAIN}")
    has_columns(rows, LOGP_COLUMNS, f"The reference losses {what}")
    for column in LOGP_COLUMNS:
        high = np.flatnonzero(np.asarray(rows[column][:]) > _POSITIVE_LOGP)
        if len(high):
            raise AMAError(
                f"Column '{column}' of the reference losses {what} has a positive value in row {high[0]} "
                f"({rows[column][int(high[0])]:.3g}), which no log-prob can be. {_AGAIN}"
            )
    for column in TOKEN_COLUMNS:
        counts = rows[column][:]
        if any(count is None or count < 0 for count in counts):
            raise AMAError(
                f"Column '{column}' of the reference losses {what} has missing or negative counts. {_AGAIN}"
            )
    present = [column for column in PAIR_COLUMNS if column in rows.column_names]
    if present and len(present) < len(PAIR_COLUMNS):
        raise AMAError(f"The reference losses {what} have {present} of the texts {list(PAIR_COLUMNS)}. {_AGAIN}")
    if present:
        for number, row in enumerate(rows.select_columns([PAIR_ID_COLUMN, *PAIR_COLUMNS])):
            if pair_id(*(row[column] for column in PAIR_COLUMNS)) != row[PAIR_ID_COLUMN]:
                raise AMAError(
                    f"Row {number} of the reference losses {what} has the pair_id '{row[PAIR_ID_COLUMN]}', which is not that of "
                    f"its text: its numbers belong to another pair. {_AGAIN}"
                )


def stack(parts: list[TaskLosses]) -> dict[str, Dataset]:
    """The rows of several tasks, by split, with the columns that all of them have."""
    stacked = {}
    for split in SPLITS:
        rows = [part.splits[split] for part in parts if split in part.splits]
        if rows:
            shared = [name for name in rows[0].column_names if all(name in table.column_names for table in rows)]
            stacked[split] = concatenate_datasets([table.select_columns(shared) for table in rows])
    return stacked
