"""Schemas, files and notes of reference losses that a stranger made up, down to every byte."""

import json
import pickle
import time

import numpy as np
import pyarrow as pa
import pytest
from datasets import Audio, Features, Image, Json, List
from forgery import copied, edit_note, forge, honest_fixture, losses_fixture, numbers, put, refused, seal  # noqa: F401 - fixtures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_ama import AMAError, load_reference_losses


# ---- Schemas ----


def with_features(**features):
    """The same rows, whose schema tells `datasets` to decode a column as something else."""

    def change(table):
        for column, feature in features.items():
            values = [{"bytes": None, "path": "/etc/passwd"}] * len(table)
            if not isinstance(feature, (Image, Audio)):
                values = [[value] for value in values]
            table = put(column, values, Features({column: feature}).arrow_schema.field(0).type)(table)
        info = Features({**Features.from_arrow_schema(table.schema.remove_metadata()), **features})
        return table.replace_schema_metadata(info.arrow_schema.metadata)

    return change


@pytest.mark.parametrize("column", ["prompt", "chosen"])
@pytest.mark.parametrize("feature", [Image(), Audio(), List(Image()), List(Audio())], ids=str)
def test_features_that_open_files(losses, column, feature, monkeypatch):
    opened = []
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: opened.append(args))
    monkeypatch.setattr(Audio, "decode_example", lambda *args, **kwargs: opened.append(args))
    forge(losses / "list", with_features(**{column: feature}))
    refused(losses, "'list'", "train.parquet", column, "not text")
    assert not opened


def test_the_attack_of_the_test_before_works_on_datasets(losses, monkeypatch):
    """Otherwise it would prove nothing."""
    from datasets import load_dataset

    opened = []
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: opened.append(args))
    forge(losses / "list", with_features(prompt=Image()))
    path = str(losses / "list" / "train.parquet")
    list(load_dataset("parquet", data_files=path, split="train"))
    assert opened


def test_json_that_is_none(losses):
    def change(table):
        table = put("chosen", ["{" * 3] * len(table), pa.string())(table)
        features = Features({**Features.from_arrow_schema(table.schema.remove_metadata()), "chosen": Json()})
        schema = features.arrow_schema
        return pa.table({name: table[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)

    forge(losses / "list", change)
    refused(losses, "'list'", "train.parquet")


METADATA = {
    "no json": b"{",
    "no object": b"[]",
    "unknown type": b'{"info": {"features": {"task": {"_type": "os.system"}}}}',
    "a list": b'{"info": {"features": ["task"]}}',
    "deep": b'{"info":' + b'{"features":' * 100_000,
    "wrong arguments": b'{"info": {"features": {"task": {"_type": "Value", "dtype": "no"}}}}',
    "labels": b'{"info": {"features": {"task": {"names": [], "_type": "ClassLabel"}}}}',
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_the_schema(honest, losses, name):
    """Refused, or without effect: the columns' own types count then."""
    forge(losses / "list", lambda table: table.replace_schema_metadata({b"huggingface": METADATA[name]}))
    honest_or_refused(losses, numbers(honest))


def honest_or_refused(folder, honest_numbers):
    try:
        found = numbers(folder)
    except AMAError as error:
        assert "\n" not in str(error)
        return
    assert found == honest_numbers


class Pickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_the_schema(honest, losses, tmp_path):
    """`arrow.py_extension_type` was a way to run code by a schema (CVE-2023-47248)."""
    trap = tmp_path / "trap"

    def change(table):
        field = pa.field(
            "chosen_tokens",
            pa.int32(),
            metadata={
                "ARROW:extension:name": "arrow.py_extension_type",
                "ARROW:extension:metadata": pickle.dumps(Pickled(trap)),
            },
        )
        place = table.schema.get_field_index("chosen_tokens")
        return table.set_column(place, field, table["chosen_tokens"])

    forge(losses / "list", change)
    honest_or_refused(losses, numbers(honest))
    assert not trap.exists()
    pickle.loads(pickle.dumps(Pickled(trap))).close()
    assert trap.exists()  # the pickle would have worked


@pytest.mark.parametrize("depth", [20, 45])
def test_a_bomb_of_a_schema(losses, depth):
    """Lists of lists of lists, as deep as Parquet lets them be: an empty value takes a byte, its type a recursion."""
    kind = pa.string()
    for _ in range(depth):
        kind = pa.list_(kind)
    forge(losses / "list", put("chosen", [None] * 6, kind))
    refused(losses, "train.parquet")


# ---- Files ----


def test_files_that_are_missing_or_cut(losses):
    path = losses / "list" / "test.parquet"
    data = path.read_bytes()
    for rest in (data[:-1], data[: len(data) // 2], b"", b"PAR1", b"PAR1PAR1", data + b"x"):
        path.write_bytes(rest)
        refused(losses, "'test.parquet' of task 'list'", "Get an intact copy")
    path.unlink()
    refused(losses, "'test.parquet' of task 'list'", "no reference losses")
    path.mkdir()
    refused(losses, "'test.parquet' of task 'list'", "no reference losses")


def test_another_number_under_the_old_note(losses):
    forge(losses / "list", put("ref_chosen_logps", -5.0), sealed=False)
    refused(losses, "are not the file that the note beside them describes")


def test_a_million_rows_under_the_old_note(losses):
    """Refused by the file's footer, without reading a row."""
    forge(losses / "list", lambda table: table.take(np.arange(1_000_006) % 6), sealed=False)
    start = time.perf_counter()
    refused(losses, "1000006 rows", "says 6")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("ids", ["equal", "counted"])
def test_a_million_rows_that_take_no_room(losses, ids):
    """A few bytes that stand for a million rows: honest ids are hashes, which nothing can pack."""

    def change(table):
        table = table.drop_columns(["prompt", "chosen", "rejected"]).take(np.zeros(1_000_000, dtype=int))
        return put("pair_id", [f"{number:024}" for number in range(1_000_000)])(table) if ids == "counted" else table

    forge(losses / "list", change, compression="zstd")
    start = time.perf_counter()
    refused(losses, "train.parquet")
    assert time.perf_counter() - start < 1


# ---- Notes ----

NOTES = {
    "a list": lambda note: [note],
    "a string": lambda note: "note",
    "null": lambda note: None,
    "no fields": lambda note: {"version": 2},
    "version 99": lambda note: note.update(version=99),
    "version true": lambda note: note.update(version=True),
    "version a list": lambda note: note.update(version=[2] * 10_000),
    "version a text": lambda note: note.update(version="2\n" * 10_000),
    "negative rows": lambda note: note["files"]["train.parquet"].update(rows=-1),
    "bool rows": lambda note: note["files"]["train.parquet"].update(rows=True),
    "rows a text": lambda note: note["files"]["train.parquet"].update(rows="6"),
    "rows a float": lambda note: note["files"]["train.parquet"].update(rows=6.0),
    "rows not a number": lambda note: note["files"]["train.parquet"].update(rows=float("nan")),
    "huge rows": lambda note: note["files"]["train.parquet"].update(rows=10**4000),
    "no hash": lambda note: note["files"]["train.parquet"].update(sha256=None),
    "files a list": lambda note: note.update(files=["train.parquet"]),
    "a file a list": lambda note: note["files"].update({"train.parquet": []}),
    "files outside": lambda note: note["files"].update({"../../x.parquet": note["files"]["train.parquet"]}),
    "absolute files": lambda note: note["files"].update({"/etc/passwd": note["files"]["train.parquet"]}),
    "no train": lambda note: note["files"].pop("train.parquet") and None,
    "dropped a list": lambda note: note.update(dropped=[]),
    "dropped numbers": lambda note: note.update(dropped={"train": [1]}),
    "dropped texts": lambda note: note.update(dropped={"train": "abc"}),
    "order a text": lambda note: note.update(order="1"),
    "order a float": lambda note: note.update(order=float("inf")),
    "fingerprint a list": lambda note: note.update(fingerprint=[]),
    "specialist a list": lambda note: note["fingerprint"].update(specialist=["x"]),
    "specialist a number": lambda note: note["fingerprint"].update(specialist=5),
    "base model a mapping": lambda note: note["fingerprint"].update(base_model={"a": 1}),
    "data a list": lambda note: note["fingerprint"].update(data=[[]]),
    "endless": lambda note: note["fingerprint"].update(tokenizer="x" * 1_000_000),
    "half a character": lambda note: note["fingerprint"].update(extra="\ud800"),
    "deep": lambda note: note["fingerprint"].update(extra=json.loads('{"a":' * 900 + "1" + "}" * 900)),
    "fingerprint of another task": lambda note: note["fingerprint"].update(task="sort"),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes(losses, name):
    edit_note(losses / "list", NOTES[name])
    if name == "null":
        (losses / "list" / "fingerprint.json").write_text("null")
    refused(losses, "list'", "trl ama-losses")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{", b'{"version": ' + b"1" * 5000 + b"}", b"[" * 200_000, b'{"a":' * 200_000],
    ids=["empty", "no text", "cut", "digits", "brackets", "braces"],
)
def test_notes_that_are_no_json(losses, content):
    (losses / "list" / "fingerprint.json").write_bytes(content)
    refused(losses, "list")


def test_a_note_of_a_split_that_is_not_there(losses):
    edit_note(losses / "list", lambda note: note["files"].update({"test.parquet": {"rows": 1, "sha256": "0"}}))
    (losses / "list" / "test.parquet").unlink()
    refused(losses, "'test.parquet' of task 'list'", "the note beside them lists that file")


def test_a_split_that_the_note_does_not_list_is_not_read(losses):
    edit_note(losses / "list", lambda note: note["files"].pop("test.parquet") and None)
    (losses / "list" / "test.parquet").write_bytes(b"no Parquet at all")
    assert "test" not in load_reference_losses(str(losses), tasks=["list"])


@pytest.mark.parametrize("name", ["a..b", "a b", "<script>", "x" * 80, "a\nb", "[!a]", "{{7}}"])
def test_folders_whose_names_are_no_tasks(losses, name):
    (losses / "list").rename(losses / name)
    refused(losses, "cannot be a folder name")


def test_a_task_under_another_name(losses):
    (losses / "list").rename(losses / "code")
    refused(losses, "'code'")


# ---- Every byte ----


def set_byte(data: bytes, place: int, value: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([value]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["fingerprint.json", "train.parquet"])
@pytest.mark.parametrize("sealed", [False, True])
def test_any_byte(honest, tmp_path_factory, name, sealed):
    """Either refused or the honest data: never another error, never other data under the old note. A forger who writes
    the note anew may bring other numbers, but no other error either."""
    before = numbers(honest)
    folder = copied(honest, tmp_path_factory.mktemp("mutated"))
    path = folder / "list" / name
    intact = {file.name: file.read_bytes() for file in (folder / "list").iterdir()}

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
    def mutate(changes):
        for file, data in intact.items():
            (folder / "list" / file).write_bytes(data)
        data = intact[name]
        for place, value in changes:
            data = set_byte(data, place, value)
        path.write_bytes(data)
        if not sealed:
            honest_or_refused(folder, before)
            return
        try:
            seal(folder / "list")
        except Exception:  # not even the forger can read it
            return
        try:
            numbers(folder)
        except AMAError as error:
            assert "\n" not in str(error)

    mutate()
