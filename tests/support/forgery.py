"""An honest reference-loss dataset, and the tools of somebody who forges one."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny_pairs import make_rows

from trl_ama import AMAError, load_reference_losses
from trl_ama.reference_losses.columns import LOGP_COLUMNS, TOKEN_COLUMNS
from trl_ama.reference_losses.files import save_task
from trl_ama.tasks.forms import PAIR_COLUMNS, pair_id


SIZES = {"list": 6, "sort": 4}


def honest_table(task: str, rows: list[dict], seed: int = 0) -> Dataset:
    """Rows as `trl ama-losses` writes them, with numbers that only look like log-probs."""
    rng = np.random.default_rng(seed)
    table = Dataset.from_list(
        [{"task": task, "pair_id": pair_id(*(row[name] for name in PAIR_COLUMNS)), **row} for row in rows]
    )
    for column in LOGP_COLUMNS:
        table = table.add_column(column, -rng.uniform(5, 9, len(rows)).astype(np.float32))
    for column in TOKEN_COLUMNS:
        table = table.add_column(column, rng.integers(2, 6, len(rows)).astype(np.int32))
    return table


def honest_losses(folder: Path) -> Path:
    fingerprint = {"base_model": "base@sha256:00", "tokenizer": "00", "versions": {"trl": "1"}}
    for order, (task, count) in enumerate(SIZES.items()):
        tables = {
            split: honest_table(task, make_rows(task, count, seed)) for seed, split in enumerate(("train", "test"))
        }
        save_task(folder, task, tables, {"task": task, **fingerprint}, {"train": [], "test": []}, order)
    return folder


def seal(folder: Path) -> None:
    """Make a task's note describe the files as they now are, so that only their content can give a forgery away."""
    note = json.loads((folder / "fingerprint.json").read_text())
    for name in list(note["files"]):
        data = (folder / name).read_bytes()
        rows = pq.read_metadata(folder / name).num_rows
        note["files"][name] = {"rows": rows, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "fingerprint.json").write_text(json.dumps(note))


def forge(folder: Path, change: Callable[[pa.Table], pa.Table], sealed: bool = True, **options: Any) -> None:
    """Rewrite the training rows of a task's folder."""
    path = folder / "train.parquet"
    pq.write_table(change(pq.ParquetFile(path).read()), path, **options)
    if sealed:
        seal(folder)


def edit_note(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "fingerprint.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps(change(note) or note))


def put(column: str, values: Any, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Another column in the place of one; `values` may be one value, for the row with number 1 only."""

    def change(table: pa.Table) -> pa.Table:
        place, field = table.schema.get_field_index(column), table.schema.field(column)
        new = values
        if not isinstance(values, list):
            new = table[column].to_pylist()
            new[1] = values
        return table.set_column(place, column, pa.array(new, kind or field.type))

    return change


def copied(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "losses"))


def refused(folder: Path, *words: str) -> str:
    """The text of the refusal: a few sentences of one line, for people to read in a terminal."""
    with pytest.raises(AMAError) as caught:
        load_reference_losses(str(folder))
    return readable(caught.value, *words)


def readable(error: AMAError, *words: str) -> str:
    text = str(error)
    assert text.isprintable() and len(text) < 1500, text[:3000]
    assert len(re.findall(r"[.?!](?= [A-Z]|$)", text.replace("…", ""))) <= 4, text
    for word in words:
        assert word in text, text
    return text


def numbers(folder: Path) -> dict[str, list[dict]]:
    """All that a reader gets."""
    return {split: list(rows) for split, rows in load_reference_losses(str(folder)).items()}


@pytest.fixture(name="honest", scope="module")
def honest_fixture(tmp_path_factory):
    return honest_losses(tmp_path_factory.mktemp("honest"))


@pytest.fixture(name="losses")
def losses_fixture(honest, tmp_path):
    return copied(honest, tmp_path)
