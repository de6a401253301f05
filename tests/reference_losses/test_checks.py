"""Reference losses that a stranger made up: refused in a sentence, whatever is wrong with them, before they are used."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import List, Value
from forgery import forge, honest_fixture, losses_fixture, numbers, put, refused  # noqa: F401 - fixtures

from trl_ama import load_reference_losses
from trl_ama.reference_losses.columns import LOGP_COLUMNS
from trl_ama.tasks.forms import pair_id


TEXT = List({"role": Value("string"), "content": Value("string")})


def test_the_honest_ones_are_read(honest):
    assert {split: len(rows) for split, rows in numbers(honest).items()} == {"train": 10, "test": 10}


# ---- Values ----

BAD_VALUES = {
    "nan": (put("ref_chosen_logps", float("nan")), "not finite"),
    "inf": (put("specialist_chosen_logps", float("inf")), "not finite"),
    "minus inf": (put("specialist_rejected_logps", float("-inf")), "not finite"),
    "none": (put("ref_rejected_logps", None), "is missing or not finite"),
    "positive": (put("ref_chosen_logps", 0.5), "positive value in row 1"),
    "beyond float32": (put("ref_chosen_logps", [-1e300] * 6, pa.float64()), "ref_chosen_logps"),
    "absurd": (put("specialist_rejected_logps", -3e38), "specialist_rejected_logps"),
    "strings": (put("ref_chosen_logps", ["-1"] * 6, pa.string()), "is string"),
    "integers": (put("ref_chosen_logps", [-1] * 6, pa.int64()), "is int64"),
    "half": (put("ref_chosen_logps", [np.float16(-1)] * 6, pa.float16()), "is float16"),
    "bools": (put("chosen_tokens", [True] * 6, pa.bool_()), "is bool"),
    "lists": (put("ref_chosen_logps", [[-1.0]] * 6, pa.list_(pa.float32())), "ref_chosen_logps"),
    "structs": (put("pair_id", [{"a": "x"}] * 6, pa.struct({"a": pa.string()})), "pair_id"),
    "negative tokens": (put("chosen_tokens", -1), "negative counts"),
    "no tokens": (put("chosen_tokens", None), "missing"),
    "too many tokens": (put("chosen_tokens", [2**40] * 6, pa.int64()), "chosen_tokens"),
    "no id": (put("pair_id", None), "without a pair_id"),
    "empty id": (put("pair_id", ""), "without a pair_id"),
    "wrong id": (put("pair_id", "0" * 24), "not that of its text"),
    "terminal codes": (put("pair_id", "\x1b[2J\nAll is well."), "train.parquet"),
    "endless id": (put("pair_id", "x" * 100_000), "train.parquet"),
    "another task": (put("task", "sort"), "rows of task 'sort'"),
    "no task": (put("task", None), "rows of task None"),
    "endless task": (put("task", "x\n" * 100_000), "rows of task"),
    "all of another task": (put("task", ["sort"] * 6), "rows of task 'sort'"),
    "no rows": (lambda table: table.slice(0, 0), "train.parquet"),
    "no column": (lambda table: table.drop_columns(["pair_id"]), "no column 'pair_id'"),
    "no columns": (lambda table: pa.table({"x": [1]}), "no column 'task'"),
    "half of the text": (lambda table: table.drop_columns(["chosen"]), "of the texts"),
    "a column more": (lambda table: table.append_column("x\x1b[2J\n", [[1] * 6]), "does not belong there"),
    "a column twice": (lambda table: table.append_column("task", [["list"] * 6]), "train.parquet"),
    "other text": (
        put("chosen", [[{"role": "assistant", "content": "evil"}]] * 6),
        "not that of its text",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values(losses, name):
    change, says = BAD_VALUES[name]
    forge(losses / "list", change)
    refused(losses, "'list'", "train.parquet", says, "trl ama-losses")


def test_ids_twice(losses):
    ids = pq.read_table(losses / "list" / "train.parquet")["pair_id"].to_pylist()
    forge(losses / "list", lambda table: pa.concat_tables([table, table.slice(2, 1)]))
    refused(losses, f"'{ids[2]}' more than once")


def texts_of(kind, value, **columns):
    """All rows have `value` in the place of one text, and the ids are those of the rows."""

    def change(table):
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            row["chosen"] = value if not callable(value) else value(number)
        table = put("chosen", [row["chosen"] for row in rows], kind)(table)
        ids = [pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
        return put("pair_id", ids)(table)

    return change


@pytest.mark.parametrize(
    "change",
    [
        texts_of(pa.int64(), lambda number: number),
        texts_of(pa.string(), lambda number: None),
        texts_of(pa.string(), lambda number: ""),
        texts_of(pa.list_(pa.string()), lambda number: [str(number)]),
        texts_of(pa.list_(pa.struct({"role": pa.string()})), lambda number: [{"role": str(number)}]),
        texts_of(
            pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            lambda number: [{"role": None, "content": str(number)}],
        ),
        texts_of(
            pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            lambda number: [{"role": "assistant", "content": None}],
        ),
        texts_of(pa.binary(), None),
    ],
    ids=["numbers", "none", "empty", "strings", "no content", "no role", "no text", "bytes"],
)
def test_texts_that_are_none(losses, change):
    """The ids are right, but there is nothing that a model could be trained on."""
    forge(losses / "list", change)
    refused(losses, "'list'", "train.parquet", "chosen")


def test_tasks_of_different_types_make_one_dataset(honest, losses):
    """A stranger's float64 is no reason to fail where the tasks' rows are put together."""
    before = numbers(honest)

    def wide(table):
        for column in LOGP_COLUMNS:
            table = put(column, table[column].to_pylist(), pa.float64())(table)
        return put("task", table["task"].to_pylist(), pa.large_string())(table)

    forge(losses / "list", wide)
    assert numbers(losses) == before


def test_tasks_of_different_formats(losses):
    def plain(table):
        rows = [
            {**row, **{name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")}}
            for row in table.to_pylist()
        ]
        for row in rows:
            row["pair_id"] = pair_id(row["prompt"], row["chosen"], row["rejected"])
        return pa.Table.from_pylist(rows)

    forge(losses / "list", plain)
    refused(losses, "'list' and 'sort'", "different formats")
    assert load_reference_losses(str(losses), tasks=["list"]).tasks == ["list"]
