"""Messages that are the text of a JSON list: refused where nobody asked for them, read with `format: json_messages`."""

import json

import pandas as pd
import pytest
from datasets import Dataset
from row_forms import as_json, conversations, turns
from row_forms import plain as plain_row

from trl_ama import AMAError, TaskMixtureConfig
from trl_ama.tasks.json_messages import messages_in
from trl_ama.tasks.loading import read_tasks


CALL = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(turns(1)["chosen"]), turns(1)["chosen"]),
        (" " + json.dumps(CALL, indent=1), CALL),
        (str(CALL), CALL),  # as pandas writes lists
        (json.dumps(turns(1)["chosen"][0]), turns(1)["chosen"]),
        ('[{"from": "gpt", "value": "a"}]', [{"from": "gpt", "value": "a"}]),
        ('[{"name": "a", "content": "b"}]', None),
        ('{"role": "admin"}', None),
        ("[]", None),
        ("[1, 2]", None),
        ('[{"role": "assistant"', None),
        ("[" * 100000, None),
        ("a [link]", None),
        (None, None),
    ],
)
def test_which_texts_are_messages(text, expected):
    assert messages_in(text) == expected


def load(path, loader, **changes):
    return read_tasks(TaskMixtureConfig(tasks=[{"task": "t", "path": loader, "data_files": str(path), **changes}]))


@pytest.mark.parametrize("format", [None, "single_turn"])
def test_they_are_refused_with_the_fix(tmp_path, format):
    rows = [as_json(number) for number in range(5)]
    rows[1] = plain_row(1)  # one broken row hides nothing
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(
        AMAError,
        match="messages as JSON text in 4 of 5 train rows .the first is row 0: .*Set `format: json_messages`",
    ):
        load(tmp_path / "x.csv", "csv", format=format)
    (tmp_path / "x.csv").rename(tmp_path / "t_train.csv")
    with pytest.raises(
        AMAError, match="JSON text .*by the task's `path` and `data_files` with `format: json_messages`"
    ):
        read_tasks(TaskMixtureConfig(tasks=[{"task": "t"}], tasks_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "answers",
    [
        ('{"name": "a", "role": 5}', '{"name": "b"}'),
        ('[{"id": 1}]', '[{"id": 2}]'),
        ('[{"role": "assistant", "content": "a"}]', "no list"),
    ],
)
def test_other_json_is_an_answer_like_any_other(tmp_path, answers):
    rows = [{"prompt": "List them as JSON.", "chosen": answers[0], "rejected": answers[1]}] * 3
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(tmp_path / "x.jsonl", "json")
    assert [(row["chosen"], row["rejected"]) for row in loaded.pairs["train"]] == [answers] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("prompt", [True, False])
def test_they_are_read(tmp_path, kind, prompt):
    expected = [turns(number, f"yes {number}", "null") for number in range(4)]
    rows = [as_json(number, f"yes {number}", "null") for number in range(4)]
    if not prompt:
        rows = [{side: json.dumps(row["prompt"] + row[side]) for side in ("chosen", "rejected")} for row in expected]
    if kind == "csv":
        pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    else:
        Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    loaded = load(tmp_path / f"x.{kind}", kind, format="json_messages")
    found = [{side: row[side] for side in expected[0]} for row in loaded.pairs["train"]]
    assert found == expected
    assert str(loaded.accounts["t"]["train"]) == "4 rows = 4 pairs"


@pytest.mark.parametrize("plain", ["prompt", "answers"])
def test_plain_texts_beside_them_become_messages(tmp_path, plain):
    rows = []
    for number in range(3):
        texts, row = plain_row(number), as_json(number)
        kept = ("prompt",) if plain == "prompt" else ("chosen", "rejected")
        rows.append({**row, **{name: texts[name] for name in kept}})
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    if plain == "answers":
        with pytest.raises(
            AMAError, match="prompt is messages as JSON text in 3 of 3 train rows .*Set `format: json_messages`"
        ):
            load(tmp_path / "x.csv", "csv")
    loaded = load(tmp_path / "x.csv", "csv", format="json_messages")
    found = [{side: row[side] for side in turns(0)} for row in loaded.pairs["train"]]
    assert found == [turns(number) for number in range(3)]


def test_a_plain_prompt_of_whole_conversations(tmp_path):
    rows = [
        {"prompt": f"question {number}", **{side: json.dumps(said) for side, said in conversations(number).items()}}
        for number in range(3)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(
        AMAError, match="prompt is plain text, and chosen and rejected are whole conversations .*columns: .chosen, rej"
    ):
        load(tmp_path / "x.csv", "csv", format="json_messages")
    loaded = load(tmp_path / "x.csv", "csv", format="json_messages", columns=["chosen", "rejected"])
    assert [row["prompt"] for row in loaded.pairs["train"]] == [turns(number)["prompt"] for number in range(3)]


def test_calls_are_read_with_all_that_they_hold(tmp_path):
    rows = [
        {**turns(0), "chosen": CALL, "tools": [{"type": "function", "function": {"name": "f"}}]},
        turns(1),
    ]
    texts = [{name: json.dumps(side) for name, side in row.items()} for row in rows]
    pd.DataFrame(texts).to_csv(tmp_path / "x.csv", index=False)
    loaded = load(tmp_path / "x.csv", "csv", format="json_messages").pairs["train"].to_list()
    assert loaded[0]["chosen"] == CALL and loaded[1]["chosen"] == turns(1)["chosen"]
    assert json.loads(loaded[0]["tools"]) == rows[0]["tools"] and loaded[1]["tools"] is None


def test_a_row_that_is_none_is_named(tmp_path):
    pd.DataFrame([as_json(0), {**as_json(1), "prompt": "a question"}]).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(
        AMAError,
        match="Task 't', row 1 of the train pairs: prompt is 'a question', which is no JSON list of messages as in 1 other",
    ):
        load(tmp_path / "x.csv", "csv", format="json_messages")
