"""Files are read as what they are: paths stand for themselves, texts for the letters in the file."""

import codecs
import gzip
import json
import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from trl_ama import AMAError, TaskMixtureConfig, load_tasks
from trl_ama.tasks.exact_texts import load_texts
from trl_ama.tasks.loading import read_tasks


def pair(chosen, rejected="no", prompt="q"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv(rows, separator=",", end="\n") -> str:
    return "".join(separator.join(row) + end for row in [("prompt", "chosen", "rejected"), *rows])


def load(path, loader="json", **changes):
    return read_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": loader, "data_files": str(path), **changes}]))


def pairs_in(loaded) -> list[tuple]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in loaded.pairs["train"]]


# ---- Texts ----

# Answers that one reader or the other takes for something else
ODD = ["None", "NA", "null", "N/A", "nan", "-", "007", "1.0", "1e5", "2", "True", "FALSE", "12345678901234567890123", "2020-01-01",
       "2020-01-01 10:00:00", "2020-01-01T10:00:00Z", "10:30", " ", "\ufeffx"]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_odd_texts_stay_what_they_are(tmp_path, kind):
    """Each alone in a column, which is then taken for one of numbers, times or nothing."""
    path = tmp_path / f"x.{kind}"
    rows = [{f"column {number}": odd for number, odd in enumerate(ODD)}] * 2
    if kind == "jsonl":
        path.write_text(lines(rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        separator = "," if kind == "csv" else "\t"
        path.write_text("".join(separator.join(row) + "\n" for row in [rows[0], ODD, ODD]), encoding="utf-8")
    dataset, _ = load_texts("train", path="json" if kind.startswith("json") else "csv", data_files=str(path))
    assert dataset.to_list() == rows


@pytest.mark.parametrize(
    "odd", ["2020-01-01", "2020-01-01T10:00:00Z", "123", "null", "true", '{"a": 1}', "[1]", '"quoted"']
)
@pytest.mark.parametrize("packed", [False, True])
def test_odd_contents_of_messages_stay_what_they_are(tmp_path, odd, packed):
    """Also beside contents in parts, where `datasets` keeps JSON and reads texts as such."""

    def said(content):
        return [{"role": "assistant", "content": content}]

    rows = [pair(said(odd), said(f"{odd} {odd}"), said("q"))] * 3
    rows += [pair(said([{"type": "text", "text": odd}]), said("no"), said("q"))] if packed else []
    (tmp_path / "x.jsonl").write_text(lines(rows))
    dataset, _ = load_texts("train", path="json", data_files=str(tmp_path / "x.jsonl"))
    assert dataset.to_list() == rows


def test_numbers_in_calls_of_tools_keep_all_their_places(tmp_path):
    def call(**arguments):
        return [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        ]

    rows = [pair(call(a=0.30000000000000004, b=1e-15), call(c=0.3), [{"role": "user", "content": "q"}]),
            pair(call(a=3.141592653589793), call(), [{"role": "user", "content": "q"}])]  # fmt: skip
    (tmp_path / "x.jsonl").write_text(lines(rows))
    assert load_texts("train", path="json", data_files=str(tmp_path / "x.jsonl"))[0].to_list() == rows
    raw = load_dataset("json", data_files=str(tmp_path / "x.jsonl"), split="train").to_list()
    assert raw != rows


def test_a_second_file_is_not_cast_into_the_first_ones_type(tmp_path):
    """Silently "2020-01-01 00:00:00", as `load_dataset` casts what it took for times into text."""
    (tmp_path / "a.jsonl").write_text(lines([pair("one"), pair("two")]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines([pair("2020-01-01"), pair("2021-01-01T10:00:00")]))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    assert "2020-01-01 00:00:00" in load_dataset("json", data_files=files, split="train")["chosen"][:]
    for split, expected in {
        "train": ["one", "two", "2020-01-01", "2021-01-01T10:00:00"],
        "train[1:3]": ["two", "2020-01-01"],
        "train[:1]+train[75%:]": ["one", "2021-01-01T10:00:00"],
        "all": ["one", "two", "2020-01-01", "2021-01-01T10:00:00"],
    }.items():
        assert load_texts(split, path="json", data_files=files)[0]["chosen"][:] == expected


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "x.jsonl"
    for day in ("2020-01-01", "2021-01-01"):
        path.write_text(lines([pair(day)]))
        os.utime(path, ns=(1, int(day[:4])))
        assert load_texts("train", path="json", data_files=str(path))[0]["chosen"][:] == [day]


def test_dates_in_a_repository_of_the_hub(hub):
    commit = hub.write(
        "dataset", "org/days", {"train.jsonl": lines([pair("2020-01-01")]), "test.jsonl": lines([pair("b")])}
    )
    hub.write("dataset", "org/table", {"train.csv": csv([("q", "None", "007")])})
    task = {"task": "days", "path": "org/days", "eval_split": "test"}
    loaded = read_tasks(TaskMixtureConfig(tasks=[task, {"task": "table", "path": "org/table"}]))
    assert pairs_in(loaded) == [("q", "2020-01-01", "no"), ("q", "None", "007")]
    assert loaded.commits["days"] == commit and set(loaded.commits) == {"days", "table"}


def test_a_repository_without_network(hub, monkeypatch):
    """Out of the cache, where `datasets` names no files any more."""
    hub.write(
        "dataset", "org/days", {"train.jsonl": lines([pair("2020-01-01")]), "test.jsonl": lines([pair("2021-01-01")])}
    )
    hub.write("dataset", "org/table", {"train.csv": csv([("q", "None", "007"), ("q", "a", "b")])})
    for name in ("org/days", "org/table"):
        load_dataset(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    hub.clear_log()
    tasks = [{"task": "days", "path": "org/days"}, {"task": "table", "path": "org/table"}]
    loaded = read_tasks(TaskMixtureConfig(tasks=tasks))
    assert pairs_in(loaded) == [("q", "2020-01-01", "no"), ("q", "None", "007"), ("q", "a", "b")]
    assert not hub.requests


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen": pd.Categorical(["a", "b"])},
        {"chosen": pa.array(["a", "b"]).dictionary_encode()},
        {"chosen": pa.array(["a", "b"], pa.large_string())},
        {"chosen": pa.array(["a", "b"], pa.string_view())},
    ],
    ids=["categorical", "dictionary", "large_string", "string_view"],
)  # fmt: skip
def test_kinds_of_text_in_parquet(tmp_path, columns):
    table = {"prompt": ["q", "r"], "rejected": ["x", "y"]} | columns
    if isinstance(columns["chosen"], pd.Categorical):
        pd.DataFrame(table).to_parquet(tmp_path / "x.parquet")
    else:
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
    assert pairs_in(load(tmp_path / "x.parquet", "parquet")) == [("q", "a", "x"), ("r", "b", "y")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", lines([pair("é")]).encode("utf-16"), "'.*x.jsonl' is written in UTF-16. Save it as UTF-8"),
        ("x.csv", csv([("q", "é", "b")]).encode("utf-32"), "'.*x.csv' is written in UTF-32. Save it as UTF-8"),
        ("x.csv", csv([("q", "é", "b")]).encode("latin-1"), "cannot be loaded.*codec can't decode.*Save the file as UTF-8"),
        ("x.csv", csv([("q", "well, yes", "no")] * 2).encode(), "first row of '.*x.csv' has more values than .*between quotes"),
        ("x.csv", csv([("q", "yes", "no"), ("q", "well, yes", "no")]).encode(), "cannot be loaded.*Expected 3 fields in line 3, saw 4"),
        ("x.csv", csv([("q", "yes", "no")], ";").encode(), "seems to have semicolons between its values"),
        ("x.parquet", pa.array([b"a"]), "chosen is b'a', of type bytes. Give it as a string"),
        ("x.jsonl", lines([pair(7)]).encode(), "chosen is 7, of type int. Give it as a string"),
    ],
)  # fmt: skip
def test_files_that_hold_no_texts_are_refused_by_name(tmp_path, name, content, expected):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        pq.write_table(pa.table({"prompt": ["q"], "chosen": content, "rejected": ["b"]}), tmp_path / name)
    loader = {"jsonl": "json"}.get(name.split(".")[1], name.split(".")[1])
    with pytest.raises(AMAError, match=f"(?s)Task 't'.*{expected}"):
        load(tmp_path / name, loader)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_ends_of_lines(tmp_path, mark, end):
    (tmp_path / "x.csv").write_bytes(mark + csv([("q", "a", "b"), ("r", "c", "d")], end=end).encode())
    assert pairs_in(load(tmp_path / "x.csv", "csv")) == [("q", "a", "b"), ("r", "c", "d")]
    if end != "\r":
        (tmp_path / "x.jsonl").write_bytes(mark + lines([pair("a"), pair("b")]).replace("\n", end * 2).encode())
        assert pairs_in(load(tmp_path / "x.jsonl")) == [("q", "a", "no"), ("q", "b", "no")]


def test_an_empty_value_of_a_csv_is_a_missing_one(tmp_path):
    (tmp_path / "x.csv").write_text(csv([("q", "None", "b"), ("q", "", "b")]))
    with pytest.raises(AMAError, match=r"1 of 2 in split 'train', the first in row 1 \(chosen=None"):
        load(tmp_path / "x.csv", "csv")


# ---- Paths ----


def put(folder, text):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"t_{split}.jsonl").write_text(lines([pair(f"{text} {split}"), pair(f"{text} {split}", "other")]))


@pytest.mark.parametrize(("name", "siblings"), [("set [2]", False), ("set [2]", True), ("run*", True), ("a?b", True)])
@pytest.mark.parametrize(
    "how", ["data_files", "pattern", "relative", "cwd", "data_dir", "folder", "folder and files", "link", "tasks_dir"]
)
def test_a_path_is_the_path_itself(tmp_path, monkeypatch, name, how, siblings):
    """For `load_dataset` it is a pattern: `set [2]` is read from the folder `set 2`, and `run*` from `run-old` too."""
    put(tmp_path / name, "ours")
    if siblings:
        for other in ("set 2", "run-old", "axb"):
            put(tmp_path / other, "theirs")
    folder, task = tmp_path / name, {"task": "t", "path": "json", "eval_split": "test"}
    both = {"train": "t_train.jsonl", "test": "t_test.jsonl"}
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if how == "cwd" else tmp_path)
    tasks_dir = None
    if how == "data_files":
        task["data_files"] = {split: str(folder / file) for split, file in both.items()}
    elif how == "pattern":
        task["data_files"] = {split: [f"{folder}/t_{split}.*"] for split in both}
    elif how == "relative":
        task["data_files"] = {split: f"{name}/{file}" for split, file in both.items()}
    elif how == "cwd":
        task["data_files"] = both
    elif how == "data_dir":
        task["data_dir"] = name
    elif how == "folder":
        task["path"] = str(folder)
    elif how == "folder and files":
        task |= {"path": str(folder), "data_files": both}
    elif how == "link":
        task["path"] = "link"
    else:
        tasks_dir = str(folder)
    loaded = read_tasks(TaskMixtureConfig(tasks=[task], tasks_dir=tasks_dir))
    for split in both:
        assert loaded.pairs[split]["chosen"][:] == [f"ours {split}"] * 2


def test_a_file_of_such_a_name_in_a_plain_folder(tmp_path):
    for name in ("x[1]", "x1"):
        (tmp_path / f"{name}.jsonl").write_text(lines([pair(name)]))
    for path, file in ((str(tmp_path), "x[1].jsonl"), ("json", str(tmp_path / "x[1].jsonl"))):
        loaded = read_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": path, "data_files": {"train": file}}]))
        assert loaded.pairs["train"]["chosen"][:] == ["x[1]"]


def test_a_missing_file_of_such_a_folder_is_not_another_ones(tmp_path):
    put(tmp_path / "set 2", "theirs")
    (tmp_path / "set [2]").mkdir()
    with pytest.raises(AMAError, match="Task 't' cannot be loaded"):
        load(tmp_path / "set [2]" / "t_train.jsonl")


def test_two_files_for_one_split_are_named(tmp_path):
    put(tmp_path / "x", "ours")
    (tmp_path / "x" / "t_train.jsonl.bak").write_text("no file of pairs")
    config = TaskMixtureConfig(tasks=[{"task": "t"}], tasks_dir=str(tmp_path / "x"))
    assert len(read_tasks(config).pairs["train"]) == 2
    (tmp_path / "x" / "t_train.csv").write_text(csv([("q", "a", "b")]))
    with pytest.raises(AMAError, match="two files for the train pairs of task 't': 't_train.csv' and 't_train.jsonl'"):
        read_tasks(config)
    (tmp_path / "x" / "t_train.jsonl").unlink()
    loaded = read_tasks(config)  # each split by its own loader
    assert pairs_in(loaded) == [("q", "a", "b")] and loaded.pairs["test"]["chosen"][:] == ["ours test"] * 2


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_file_with_other_contents_is_read_anew_whatever_its_time_stamp(tmp_path, ending):
    """`datasets` knows files by path and time, and a copy may keep the time of what it was made from."""
    path = tmp_path / f"pairs.{ending}"
    loader = {"jsonl": "json"}.get(ending, ending)

    def answers(rows):
        data = Dataset.from_list(rows)
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[ending](path)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found = []
        for source in ({"path": loader, "data_files": str(path)}, {"path": str(tmp_path)}):
            config = TaskMixtureConfig(tasks=[{"task": "t", **source}])
            found.append(load_tasks(config)["train"]["chosen"][:])
        return found

    # Days, too, for which JSON is read by another reader
    for good, bad in (("good", "bad"), ("2020-01-01", "2021-02-02")):
        rows = [{"prompt": f"q{number}", "chosen": good, "rejected": bad} for number in range(3)]
        assert answers(rows) == [[good] * 3] * 2
        assert answers([{**row, "chosen": bad, "rejected": good} for row in rows]) == [[bad] * 3] * 2


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,chosen\nq,a,b,z\n")
    with pytest.raises(AMAError, match="has two columns 'chosen'"):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": "csv", "data_files": str(path)}]))


def test_a_file_as_path_is_told_how_to_be_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(AMAError, match=r"is a file. Write `path: json` and `data_files: "):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": str(path)}]))


@pytest.mark.parametrize("source", [{"columns": {"prompt": "question"}}, {"format": "single_turn"}, {}])
def test_a_column_that_the_model_should_see_is_not_left_out_in_silence(tmp_path, source):
    name = "question" if "columns" in source else "prompt"
    columns = {"prompt": name, "chosen": "chosen", "rejected": "rejected"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"system": "be brief", name: "q", "chosen": "a", "rejected": "b"}) + "\n")
    task = {"task": "t", "path": "json", "data_files": str(path), **source}
    task = {**task, "columns": columns} if "columns" in source else task
    with pytest.warns(UserWarning, match="has a column 'system', which DPOTrainer does not read"):
        load_tasks(TaskMixtureConfig(tasks=[task]))
