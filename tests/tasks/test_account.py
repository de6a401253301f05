"""Rows read = pairs kept + rows left out, each for a reason that has a name: over all formats, files and ways to leave rows out."""

import json
import random

import pandas as pd
import pytest
from datasets import Dataset
from row_forms import as_json, conversations, plain, turns

from trl_ama import AMAError, TaskMixtureConfig
from trl_ama.tasks import loading as task_loading
from trl_ama.tasks.account import EMPTY, HELD_OUT, LIMITS, TRUNCATED, RowAccount, account_lines
from trl_ama.tasks.loading import read_tasks
from trl_ama.tasks.transcripts import DIFFER, EMPTY_ANSWER, NO_ANSWER, NO_QUESTION, NO_TURNS


def transcripts(number, chosen="yes", rejected="no"):
    return {
        side: f"\n\nHuman: question {number}\n\nAssistant: {text}"
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }


def broken_transcripts(number):
    """A transcript row that is no pair, and why."""
    row, other = transcripts(number), transcripts(f"other {number}")
    return [
        ({**row, "rejected": other["rejected"]}, DIFFER),
        (transcripts(number, rejected=""), EMPTY_ANSWER),
        ({side: text.split("\n\nAssistant")[0] for side, text in row.items()}, NO_ANSWER),
        ({side: "\n\n" + text.split("\n\n")[-1] for side, text in row.items()}, NO_QUESTION),
        ({"chosen": "yes", "rejected": "no"}, NO_TURNS),
    ][number % 5]


def empty(make):
    return lambda number: (make(number, rejected=" "), EMPTY)


# Format → how a row is made, and one that is left out
FORMS = {
    "plain": (None, plain, empty(plain)),
    "messages": (None, turns, empty(turns)),
    "conversations": (None, conversations, empty(conversations)),
    "single_turn": ("single_turn", plain, empty(plain)),
    "json_messages": ("json_messages", as_json, empty(as_json)),
    "hh_rlhf": ("hh_rlhf", transcripts, broken_transcripts),
}


def write(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "json"), str(path)


def _fits(row):
    text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
    return not text.endswith("7")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_holds_for_every_format(tmp_path, form, suffix):
    """With everything at once that leaves rows out, in a random order; each reason has the number of rows that was planted."""
    format, make, broken = FORMS[form]
    if suffix == ".csv" and form in ("messages", "conversations"):
        pytest.skip("CSV holds no lists")
    bad = [broken(number) for number in range(1000, 1007)]
    rows = [make(number) for number in range(40)] + [row for row, _ in bad]
    random.Random(form).shuffle(rows)
    loader, path = write(tmp_path / f"x{suffix}", rows)
    task = {"task": "t", "path": loader, "data_files": path, "format": format}
    config = TaskMixtureConfig(
        tasks=[task], drop_empty=True, test_split_size=0.25, max_train_pairs=20, max_eval_pairs=5
    )
    loaded = read_tasks(config, fits=_fits)
    train, test = loaded.accounts["t"]["train"], loaded.accounts["t"]["test"]
    assert (train.read, test.read, train.kept, test.kept) == (47, 10, 20, 5)
    assert {split: len(part) for split, part in loaded.pairs.items()} == {"train": 20, "test": 5}
    for account in (train, test):
        assert account.read == account.kept + sum(account.dropped.values())
    reasons = {reason: [why for _, why in bad].count(reason) for _, reason in bad}
    assert {reason: train.dropped[reason] for reason in reasons} == reasons
    assert train.dropped[HELD_OUT] == 10
    long = sum(not _fits(turns(number)) for number in range(40))
    assert train.dropped.get(TRUNCATED, 0) + test.dropped.get(TRUNCATED, 0) == long == 4
    assert train.dropped[LIMITS["train"]] == 30 - train.dropped.get(TRUNCATED, 0) - 20
    assert set(train.dropped) <= {*reasons, HELD_OUT, TRUNCATED, LIMITS["train"]}
    assert loaded.truncated["t"].get("train", 0) == train.dropped.get(TRUNCATED, 0)


def test_ready_pairs_and_whole_files_have_an_account_too(tmp_path):
    rows = Dataset.from_list([turns(number) for number in range(6)])
    _, path = write(tmp_path / "x_train.jsonl", [turns(number) for number in range(4)])
    loaded = read_tasks(TaskMixtureConfig(tasks=[{"task": "r"}], max_train_pairs=4), ready={"r": {"train": rows}})
    assert str(loaded.accounts["r"]["train"]) == "6 rows = 4 pairs + 2 left out by max_train_pairs"
    loaded = read_tasks(TaskMixtureConfig(tasks=[{"task": "x"}], tasks_dir=str(tmp_path)))
    assert str(loaded.accounts["x"]["train"]) == "4 rows = 4 pairs"


@pytest.mark.parametrize("where", ["_at_most", "_preference_columns"])
def test_whoever_leaves_rows_out_without_a_word_is_found_out(tmp_path, monkeypatch, where):
    _, path = write(tmp_path / "x.jsonl", [turns(number) for number in range(9)])
    whole = getattr(task_loading, where)
    monkeypatch.setattr(task_loading, where, lambda dataset, *rest: whole(dataset, *rest).select(range(7)))
    with pytest.raises(
        AMAError, match="Task 't': of 9 rows read, none dropped, 9 training pairs should be left, and there are 7"
    ):
        read_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": "json", "data_files": path}]))


def test_what_a_run_says():
    def account(task, split, read, dropped):
        account = RowAccount(task, split, read)
        for reason, count in dropped.items():
            account.drop(reason, count)
        account.close(read - sum(dropped.values()))
        return account

    some = account("a", "train", 12000, {EMPTY: 2, "with a fault": 1})
    some.note("are odd", 5)
    accounts = {
        "a": {"train": some, "test": account("a", "test", 30, {})},
        "b": {"train": account("b", "train", 10, {})},
    }
    assert list(account_lines(accounts)) == [
        ("a", f"training: 12,000 rows = 11,997 pairs + 2 {EMPTY} + 1 with a fault; 5 are odd"),
        ("all others", "40 rows = 40 pairs"),
    ]
    del accounts["a"]
    assert list(account_lines(accounts)) == [("all", "10 rows = 10 pairs")]
    assert some.to_dict()["dropped"] == {EMPTY: 2, "with a fault": 1}
