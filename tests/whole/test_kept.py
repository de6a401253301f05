"""What `tests/support/kept.py` keeps is what the libraries would have worked out."""

import importlib.metadata
import importlib.util
import os
import pickle

import accelerate.utils.imports
import pytest
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets.fingerprint import Hasher
from datasets.utils._dill import dumps


FEATURES = Features(
    {
        "task": ClassLabel(names=["list", "sort"]),
        "ids": List(Value("int64")),
        "fixed": List(Value("float32"), length=2),
        "large": LargeList(Value("string")),
        "chosen": List({"role": Value("string"), "content": Value("string")}),
        "inner": {"a": Value("bool")},
    }
)


def test_copies_of_types_are_the_same_and_nobody_elses():
    expected = pickle.loads(pickle.dumps(FEATURES))
    copies = [FEATURES.copy() for _ in range(2)]
    for features in copies:
        assert features == expected and type(features) is Features and features.type == expected.type
        assert features.__dict__ == expected.__dict__ and features["task"].__dict__ == expected["task"].__dict__
    changed, other = copies
    changed["chosen"].feature["role"] = Value("int32")
    changed["inner"]["b"] = Value("int32")
    changed["ids"].feature.dtype = "int32"
    changed["task"].names.append("brief")
    changed["more"] = Value("string")
    assert other == FEATURES == expected and other.__dict__ == FEATURES.__dict__ == expected.__dict__
    assert changed._column_requires_decoding.keys() == changed.keys()


def test_types_of_a_table_are_those_that_are_noted_in_it():
    rows = [{"task": "list", "ids": [1]}]
    plain = Dataset.from_list(rows)
    noted = plain.cast_column("ids", List(Value("int32"))).class_encode_column("task")
    for _ in range(2):
        assert Dataset(plain.data).features == {"task": Value("string"), "ids": List(Value("int64"))}
        found = Dataset(noted.data).features
        assert found == {"task": ClassLabel(names=["list"]), "ids": List(Value("int32"))}
        found["more"] = Value("string")
    assert Features.from_arrow_schema(FEATURES.arrow_schema) == FEATURES


@pytest.mark.parametrize("value", ["", "a", "1", 1, 0, True, False, None, 1.0, ("a",), ["a"]], ids=repr)
def test_fingerprints_of_values(value):
    for _ in range(2):
        assert Hasher.hash(value) == Hasher.hash_bytes(dumps(value))


def test_packages_are_looked_for_where_the_test_says(monkeypatch):
    find = importlib.util.find_spec
    assert accelerate.utils.imports.is_peft_available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    assert not accelerate.utils.imports.is_peft_available()
    monkeypatch.undo()
    assert accelerate.utils.imports.is_peft_available()


def test_packages_on_a_path_of_the_test_are_found(monkeypatch, tmp_path):
    assert not accelerate.utils.imports._is_package_available("of_this_test")
    (tmp_path / "of_this_test.py").touch()
    (tmp_path / "of_this_test-1.dist-info").mkdir()
    (tmp_path / "of_this_test-1.dist-info" / "METADATA").write_text("Name: of_this_test\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert accelerate.utils.imports._is_package_available("of_this_test")
    assert importlib.metadata.version("of_this_test") == "1"


def test_a_file_that_is_not_open_cannot_be_written_to_the_disk(tmp_path):
    with open(tmp_path / "file", "w") as file:
        os.fsync(file)
        os.fsync(file.fileno())
    with pytest.raises(ValueError, match="closed"):
        os.fsync(file)
