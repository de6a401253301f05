"""The numbers of a sweep over pairs, kept on disk while it lasts: whatever stops it costs about a minute of scoring.

A shard is a small Parquet file with the rows that were finished since the last one: position and id of each pair, and its
numbers, never texts. It appears whole or not at all, its name holds the hash of its content, and its content names the run
that made it. So one that is cut off, changed or somebody else's shows when it is read; its pairs are scored again.
"""

import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.logging import get_logger

from ..common.errors import AMAError, first_line, sentence
from ..common.files import read_json, sync, unreadable, write_json
from ..common.fingerprint import check_fingerprint
from ..common.run_folder import SHARDS_FILE
from ..common.versions import VERSIONS, check_version


logger = get_logger(__name__)

SHARD_SECONDS = 60.0  # what a stop may cost; a day's sweep is about 1,400 shards of a few kilobytes
_RUN_KEY, _ROW, _PAIR_ID = b"run", "row", "pair_id"


class LossShards:
    """The shards of one task's sweep. Used as a context while scoring: what is finished is saved also when an error ends it.

    Args:
        folder (`Path`): Where they are, and nothing else.
        fingerprint (`dict`): Everything that decides the numbers, as JSON types.
        pair_ids (`list[str]`): Of the rows of the sweep, in order. # N
        rank (`int`): Of the process that writes here. All ranks may write into one folder, as rows say where they belong.

    Raises:
        AMAError: If the folder holds shards that other settings made; the message names the field and both values.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], pair_ids: list[str], rank: int = 0):
        self.folder, self._pair_ids, self._rank = folder, np.asarray(pair_ids), rank
        check_unfinished(folder, fingerprint)
        # What the first start noted, if there was one: a later one may name the same weights by another folder
        self._note = _read_note(folder) or {"version": VERSIONS[SHARDS_FILE], "fingerprint": fingerprint}
        self._run = hashlib.sha256(json.dumps(self._note, sort_keys=True).encode()).hexdigest()
        self._rows: list[np.ndarray] = []
        self._scores: dict[str, np.ndarray] = {}
        self._saved_at = time.monotonic()

    def load(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Fill in what the shards hold; those that cannot be used are named in the log and removed.

        Args:
            scores (`dict[str, np.ndarray]`): Column → the array to write to. # (N,) each

        Returns:
            `np.ndarray`: Which rows are filled in. # (N,) bool

        Raises:
            AMAError: If a shard is there and cannot be read.
        """
        done = np.zeros(len(self._pair_ids), dtype=bool)
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from error
            try:
                rows, columns = self._read(path, content)
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                logger.warning(
                    f"The unfinished reference losses '{path}' are not used, and their pairs are scored again: {sentence(error)}"
                )
                path.unlink(missing_ok=True)
                continue
            if set(scores) <= set(columns):  # others are of another sweep of this run, under another policy
                for name, values in scores.items():
                    values[rows] = columns[name]
                done[rows] = True
        for path in self.folder.glob(".[0-9][0-9][0-9]*-*.tmp"):  # no process writes before all know what is loaded
            path.unlink(missing_ok=True)
        return done

    def _read(self, path: Path, content: bytes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if _hash(content) != path.stem.rsplit("-", 1)[-1]:
            raise ValueError("the file is not what was written, but damaged.")
        table = pq.read_table(io.BytesIO(content))
        if (table.schema.metadata or {}).get(_RUN_KEY) != self._run.encode():
            raise ValueError("another run made them.")
        columns = {name: table[name].to_numpy() for name in table.column_names}
        rows, ids = columns.pop(_ROW), columns.pop(_PAIR_ID)
        if (rows < 0).any() or (rows >= len(self._pair_ids)).any() or (self._pair_ids[rows] != ids).any():
            raise ValueError("they are of other pairs.")
        if not all(np.isfinite(values).all() for values in columns.values()):
            raise ValueError("they have values that are missing or not finite.")
        return rows, columns

    def add(self, rows: np.ndarray, scores: dict[str, np.ndarray]) -> None:
        """Note that rows of the scores are final; they are saved when the last shard is old enough."""
        self._rows.append(rows)
        self._scores = scores
        if time.monotonic() - self._saved_at >= SHARD_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was added since the last shard."""
        if self._rows:
            rows = np.concatenate(self._rows)
            table = pa.table(
                {
                    _ROW: rows.astype(np.int64),
                    _PAIR_ID: self._pair_ids[rows].tolist(),
                    **{name: values[rows] for name, values in self._scores.items()},
                }
            )
            stream = io.BytesIO()
            pq.write_table(table.replace_schema_metadata({_RUN_KEY: self._run.encode()}), stream)
            content = stream.getvalue()
            if not (self.folder / SHARDS_FILE).is_file():
                write_json(self.folder / SHARDS_FILE, self._note)  # makes the folder, too
            number = len(list(self.folder.glob(f"{self._rank:03d}-*.parquet")))
            name = f"{self._rank:03d}-{number:05d}-{_hash(content)}.parquet"
            temporary = self.folder / f".{name}.tmp"
            temporary.write_bytes(content)
            sync(temporary)
            os.replace(temporary, self.folder / name)
            sync(self.folder)
            self._rows = []
        self._saved_at = time.monotonic()

    def __enter__(self) -> "LossShards":
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.save()
        except OSError as full:
            if error is None:
                raise
            logger.warning(f"The last scored pairs could not be saved: {first_line(full)}")  # the first error counts


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read_note(folder: Path) -> dict[str, Any] | None:
    note = read_json(folder / SHARDS_FILE)
    if note is not None:
        check_version(folder / SHARDS_FILE, note, "delete that folder, and its pairs are scored again")
    if note is not None and not isinstance(note.get("fingerprint"), dict):
        raise AMAError(f"'{folder / SHARDS_FILE}' is damaged. Delete that folder, and its pairs are scored again.")
    return note


def check_unfinished(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Raise an `AMAError` if a folder holds shards that other settings made, by the fields that are known here."""
    note = _read_note(folder)
    if note is not None:
        check_fingerprint(
            fingerprint,
            {field: note["fingerprint"].get(field) for field in fingerprint},
            f"The unfinished reference losses in '{folder}' were",
            "Set the old value, or delete that folder and run `trl ama-losses --config …` again.",
        )


def remove_shards(folder: Path) -> None:
    """Remove a sweep's shards, if there are any: its final files are complete."""
    shutil.rmtree(folder, ignore_errors=True)
