"""Preference data sets of several tasks, and what becomes of them: one, with a column that names the task."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset
from tiny_pairs import make_rows

from trl_ama import AMAError, TaskMixtureConfig, load_tasks
from trl_ama.tasks.forms import pair_id
from trl_ama.tasks.loading import fits_into, read_tasks
from trl_ama.tasks.pairs import add_pair_ids, concatenate_tasks, task_names_of, with_task_labels


@pytest.fixture
def files(tmp_path):
    for task, count in (("list", 30), ("sort", 10)):
        for split, seed in (("train", 0), ("test", 1)):
            with open(tmp_path / f"{task}_{split}.jsonl", "w") as file:
                file.writelines(json.dumps({**row, "id": 1}) + "\n" for row in make_rows(task, count, seed))
    return tmp_path


def entries(folder, **changes):
    return [
        {
            "task": task,
            "path": "json",
            "data_files": {split: str(folder / f"{task}_{split}.jsonl") for split in ("train", "test")},
            "split": "train",
            "eval_split": "test",
            **changes,
        }
        for task in ("sort", "list")
    ]


def test_tasks_are_loaded_in_the_recipes_order(files):
    data = load_tasks(TaskMixtureConfig(tasks=entries(files)))
    assert data["train"].features["task"].names == ["sort", "list"]
    assert {split: len(part) for split, part in data.items()} == {"train": 40, "test": 40}
    assert set(data["train"].column_names) == {"prompt", "chosen", "rejected", "pair_id", "task"}
    first = data["train"][0]
    assert first["task"] == 0 and first["prompt"][0]["content"].startswith("sort")
    assert first["pair_id"] == pair_id(first["prompt"], first["chosen"], first["rejected"])


def test_tasks_dir_replaces_the_recipes_paths(files):
    tasks = [{"task": name, "path": "nowhere/at-all", "format": "hh_rlhf"} for name in ("sort", "list")]
    data = load_tasks(TaskMixtureConfig(tasks=tasks, tasks_dir=str(files)))
    assert len(data["train"]) == 40 and len(data["test"]) == 40


def test_tasks_on_the_command_line_are_inline_yaml(files):
    text = f"{{task: list, path: json, data_files: '{files / 'list_train.jsonl'}'}}"
    data = load_tasks(TaskMixtureConfig(tasks=[text], test_split_size=0.2))
    assert {split: len(part) for split, part in data.items()} == {"train": 24, "test": 6}
    assert not set(data["train"]["pair_id"]) & set(data["test"]["pair_id"])


def test_only_some_tasks_have_held_out_pairs(files):
    tasks = entries(files)
    tasks[0]["eval_split"] = None
    data = load_tasks(TaskMixtureConfig(tasks=tasks))
    assert data["test"].features["task"].names == ["sort", "list"]
    assert set(data["test"]["task"]) == {1}


def test_at_most_so_many_pairs_seeded(files):
    config = TaskMixtureConfig(tasks=entries(files), max_train_pairs=7, max_eval_pairs=3)
    data, again, other = load_tasks(config, seed=1), load_tasks(config, seed=1), load_tasks(config, seed=2)
    assert (len(data["train"]), len(data["test"])) == (14, 6)
    assert data["train"]["pair_id"][:] == again["train"]["pair_id"][:] != other["train"]["pair_id"][:]


def test_dropping_happens_before_counting(files, tokenizer):
    fits = fits_into(tokenizer, 13)
    data = load_tasks(TaskMixtureConfig(tasks=entries(files), max_train_pairs=5), fits=fits)
    assert len(data["train"]) == 10 and all(fits(row) for row in data["train"])
    with pytest.raises(AMAError, match="None of the 10 pairs of task 'sort' fits"):
        load_tasks(TaskMixtureConfig(tasks=entries(files)), fits=fits_into(tokenizer, 2))


def test_columns_can_be_renamed(tmp_path):
    rows = [{"question": "a?", "good": "yes", "bad": "no", "extra": 1}] * 3
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    plain = load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": columns}]))["train"]
    assert plain[0]["prompt"] == "a?" and plain[0]["chosen"] == "yes"
    turns = load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": columns, "format": "single_turn"}]))["train"]
    assert turns[0]["prompt"] == [{"role": "user", "content": "a?"}]
    assert turns[0]["rejected"] == [{"role": "assistant", "content": "no"}]
    with pytest.raises(AMAError, match="Task 'x' has no column 'better'; found .*Mend its `columns`"):
        load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": {"chosen": "better"}}]))
    with pytest.raises(AMAError, match="no column 'qestion'; found .* Did you mean 'question'"):
        load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": {**columns, "prompt": "qestion"}}]))
    with pytest.raises(AMAError, match="no column 'prompt'; found .* TRL's name first and the dataset's own second"):
        swapped = {theirs: ours for ours, theirs in columns.items()}
        load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": swapped}]))
    with pytest.raises(
        AMAError, match="single_turn' of task 'x' needs 'prompt'; found .* `columns: {prompt: …, chosen"
    ):
        load_tasks(TaskMixtureConfig(tasks=[{**task, "format": "single_turn"}]))
    with pytest.raises(AMAError, match="has no column 'chosen'; found .* Name the dataset's own columns"):
        load_tasks(TaskMixtureConfig(tasks=[task]))
    with pytest.raises(AMAError, match="format 'hh'; known are"):
        load_tasks(TaskMixtureConfig(tasks=[{**task, "columns": columns, "format": "hh"}]))


def test_hh_rlhf_transcripts(tmp_path):
    start = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: What is 1+1?\n\nAssistant: "
    rows = [
        {"chosen": start + "2", "rejected": start + "3\n\nsurely"},
        {"chosen": start + "2", "rejected": start},  # no answer
        {"chosen": start + "2", "rejected": start.replace("1+1", "1+2") + "3"},  # another prompt
    ]
    (tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "hh", "path": "json", "data_files": str(tmp_path / "hh.jsonl"), "format": "hh_rlhf"}
    data = load_tasks(TaskMixtureConfig(tasks=[task]))["train"]
    assert len(data) == 1
    row = data[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][-1]["content"] == "What is 1+1?"
    assert row["chosen"] == [{"role": "assistant", "content": "2"}]
    assert row["rejected"] == [{"role": "assistant", "content": "3\n\nsurely"}]


def test_implicit_prompts_and_extra_message_keys(tmp_path):
    turns = [{"role": "user", "content": "q", "id": 3}]
    row = {
        "chosen": [*turns, {"role": "assistant", "content": "a", "id": 4}],
        "rejected": [*turns, {"role": "assistant", "content": "b", "id": 5}],
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    data = load_tasks(
        TaskMixtureConfig(tasks=[{"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}])
    )
    assert data["train"][0]["prompt"] == turns
    assert data["train"][0]["chosen"] == [{"role": "assistant", "content": "a", "id": 4}]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data_files": "missing.jsonl"}, "Task 'sort' cannot be loaded: split 'train' of 'missing.jsonl'"),
        ({"split": "trian"}, "split 'trian'"),
        ({"path": "org/not-cached", "data_files": None}, "Check `path`, `data_files` and `split`"),
    ],
)
def test_data_that_cannot_be_loaded(files, changes, text):
    with pytest.raises(AMAError, match=text) as caught:
        load_tasks(TaskMixtureConfig(tasks=entries(files, **changes)))
    assert "\n" not in str(caught.value)


def test_plain_text_counts_the_eos_that_dpo_trainer_adds(tokenizer):
    row = {"prompt": "apple bread", "chosen": " cloud", "rejected": " dance"}
    assert fits_into(tokenizer, 4)(row) and not fits_into(tokenizer, 3)(row)


def test_no_local_file_for_a_task(files):
    tasks = [{"task": name, "path": "x"} for name in ("sort", "code")]
    with pytest.raises(AMAError, match="has no file for task 'code'; looked for 'code_train'"):
        load_tasks(TaskMixtureConfig(tasks=tasks, tasks_dir=str(files)))


def write_task(folder, rows, name="x"):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"task": name, "path": "json", "data_files": str(folder / f"{name}.jsonl")}


def test_pairs_without_an_answer_are_an_error(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    task = write_task(tmp_path, [good, {**good, "chosen": ""}, {**good, "rejected": None}, good])
    expected = r"2 of 4 in split 'train', the first in row 1 \(chosen='', rejected='b'\)\. Set `drop_empty: true`"
    with pytest.raises(AMAError, match=expected):
        load_tasks(TaskMixtureConfig(tasks=[task]))


def test_pairs_without_an_answer_can_be_dropped(tmp_path):
    """Texts and conversations, in both splits; every task and split that lost some is counted, the others are not."""
    turns = make_rows("list", 5, 0)
    silent = {**turns[0], "chosen": [{"role": "assistant", "content": " \n"}]}
    none = {**turns[1], "rejected": []}
    first = write_task(tmp_path, [silent, *turns, none], "first")
    second = write_task(tmp_path, turns, "second")
    test = write_task(tmp_path, [turns[0], silent], "test")["data_files"]
    first |= {"data_files": {"train": first["data_files"], "test": test}, "eval_split": "test"}
    loaded = read_tasks(TaskMixtureConfig(tasks=[first, second], drop_empty=True))
    assert loaded.empty == {"first": {"train": 2, "test": 1}}
    assert loaded.pairs["train"]["prompt"][:5] == [row["prompt"] for row in turns]
    assert {split: len(part) for split, part in loaded.pairs.items()} == {"train": 10, "test": 1}


def test_a_task_without_any_answer(tmp_path):
    task = write_task(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": ""}] * 3)
    with pytest.raises(AMAError, match="Task 'x' has no pair with two answers in its 3 rows"):
        load_tasks(TaskMixtureConfig(tasks=[task], drop_empty=True))


def test_template_arguments_of_a_task(tmp_path):
    """Each pair has the keys that are meant for it and no others: a template can tell null from not given."""
    rows = make_rows("list", 2, 0)
    own = [{**rows[0], "chat_template_kwargs": {"enable_thinking": True, "day": None}}, rows[1]]
    tasks = [
        {**write_task(tmp_path, own, "think"), "chat_template_kwargs": {"enable_thinking": False, "day": "Monday"}},
        {**write_task(tmp_path, rows, "silent"), "chat_template_kwargs": {"enable_thinking": False}},
        write_task(tmp_path, rows, "plain"),
    ]
    data = load_tasks(TaskMixtureConfig(tasks=tasks, test_split_size=0.5))
    kwargs = {}
    for row in [*data["train"], *data["test"]]:
        name, text = data["train"].features["task"].names[row["task"]], row["prompt"][0]["content"]
        kwargs[name, [one["prompt"][0]["content"] for one in rows].index(text)] = row["chat_template_kwargs"]
        assert row["pair_id"] == pair_id(
            row["prompt"], row["chosen"], row["rejected"], chat_template_kwargs=row["chat_template_kwargs"]
        )
    assert kwargs == {
        ("think", 0): {"enable_thinking": True, "day": "Monday"},  # a pair's own win
        ("think", 1): {"enable_thinking": False, "day": "Monday"},
        ("silent", 0): {"enable_thinking": False},
        ("silent", 1): {"enable_thinking": False},
        ("plain", 0): {},
        ("plain", 1): {},
    }
    assert len(set(data["train"]["pair_id"]) | set(data["test"]["pair_id"])) == 6


def test_template_arguments_need_a_template(tmp_path):
    task = {
        **write_task(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}]),
        "chat_template_kwargs": {"a": 1},
    }
    with pytest.raises(AMAError, match="sets chat_template_kwargs, but its pairs are plain text"):
        load_tasks(TaskMixtureConfig(tasks=[task]))
    for columns in ({5: "prompt"}, {"prompt": 5}, [5, "chosen"]):
        with pytest.raises(AMAError, match="columns of task 'x' names 5, of type int"):
            TaskMixtureConfig(tasks=[{**task, "columns": columns}])
    with pytest.raises(AMAError, match="chat_template_kwargs of task 'x' must be a mapping"):
        TaskMixtureConfig(tasks=[{**task, "chat_template_kwargs": "enable_thinking"}])


SAID = [{"role": "user", "content": "q"}]
ANSWERS = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
MESSAGES = {"prompt": SAID, **ANSWERS}
PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [MESSAGES, {**MESSAGES, "prompt": None}],
            "train pairs: of 2 rows 1 with a prompt .*row 0.* and 1 without .*row 1.*leave the column out",
        ),
        (
            [{**PLAIN, "prompt": None}, PLAIN],
            "of 2 rows 1 with a prompt .*row 1.* and 1 without .*row 0.*Drop those",
        ),
        ([{"prompt": None, **ANSWERS}], "row 0 .* has no prompt. Drop such rows, or leave the column out"),
        (
            [{**MESSAGES, "chosen": "a"}],
            "row 0 .* mixes two forms: prompt is messages, chosen is plain text, rejected is mess",
        ),
        ([{**PLAIN, "prompt": SAID}], "row 0 .* mixes two forms: prompt is messages, chosen is plain text"),
        (
            [{**PLAIN, "chosen": 5, "rejected": 6}],
            "row 0 .*: chosen is 5, of type int. Give it as a string, or as a list",
        ),
        ([{**PLAIN, "chosen": ["a"]}], "row 0 .*: chosen is a list that holds 'a', of type str"),
        (
            [{**MESSAGES, "chosen": [{"from": "gpt", "value": "a"}]}],
            r"chosen is .* keys \['from', 'value'\]. Rename 'from' to 'role'",
        ),
        (
            [{**MESSAGES, "prompt": [{"from": "human", "value": "a"}]}],
            "prompt is .* ShareGPT's roles 'human' and 'gpt'",
        ),
        (
            [{**MESSAGES, "prompt": [{"role": "user", "text": "a"}]}],
            r"keys \['role', 'text'\]; 'role' and 'content' are needed",
        ),
        (
            [{"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}],
            "chosen is .* ShareGPT",
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:40],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, rows, expected):
    """By task, row, what was found and what to do, never a KeyError or TypeError of code that expects pairs."""
    Dataset.from_list(rows).to_json(tmp_path / "x.jsonl")
    with pytest.raises(AMAError, match=f"(?s)Task 'x',.*{expected}"):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a"], r"row 1 .*: chosen is a list of messages with the content \['a'\], of type list"),
        ({"text": "a"}, "row 1 .*: chosen is a list of messages with the content {'text': 'a'}, of type dict"),
    ],
)
def test_messages_with_other_contents_are_refused(tmp_path, content, expected):
    rows = [MESSAGES, {**MESSAGES, "chosen": [{"role": "assistant", "content": content}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AMAError, match=f"(?s)Task 'x',.*{expected}"):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}]))


@pytest.mark.parametrize(
    "data_files", ["{0}", ["{0}"], {"train": "{0}"}, None], ids=["text", "list", "mapping", "dir"]
)
@pytest.mark.parametrize("start", ["null", '\n "a"', "5\n6"])
def test_a_file_that_is_no_json_is_named(tmp_path, start, data_files):
    """One that begins with `null` ended the process."""
    path = tmp_path / "x_train.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(start)
    text = json.dumps(data_files).replace("{0}", str(path))
    task = {"task": "x", "path": "json", "data_files": json.loads(text)}
    with pytest.raises(
        AMAError, match="Task 'x': '.*x_train.jsonl.gz' begins with '.*', which is no row. Write a JSON obj"
    ):
        load_tasks(TaskMixtureConfig(tasks=[task], tasks_dir=None if data_files else str(tmp_path)))


def test_template_kwargs_of_a_row_that_are_no_mapping(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(MESSAGES | {"chat_template_kwargs": 5}))
    with pytest.raises(AMAError, match="Task 'x', row 0: chat_template_kwargs is 5, of type int. Give a mapping like"):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}]))


def test_a_file_of_two_kinds_of_rows_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (MESSAGES, MESSAGES, PLAIN)))
    with pytest.raises(AMAError, match="(?s)Task 'x'.*(row 2 of the train pairs is plain text, but|cannot be loaded)"):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl")}]))


@pytest.mark.parametrize(
    ("format", "row"), [("single_turn", MESSAGES), ("hh_rlhf", MESSAGES), ("single_turn", {**PLAIN, "prompt": None})]
)
def test_formats_of_strings_refuse_other_rows(tmp_path, format, row):
    Dataset.from_list([row]).to_json(tmp_path / "x.jsonl")
    task = {"task": "x", "path": "json", "data_files": str(tmp_path / "x.jsonl"), "format": format}
    with pytest.raises(AMAError, match=f"Task 'x', row 0 of the train pairs: .*format '{format}' takes strings"):
        load_tasks(TaskMixtureConfig(tasks=[task]))


def test_held_out_rows_are_named_as_such(tmp_path):
    for split, row in (("train", PLAIN), ("test", {**PLAIN, "prompt": None})):
        Dataset.from_list([PLAIN, row]).to_json(tmp_path / f"x_{split}.jsonl")
    with pytest.raises(
        AMAError, match="held-out pairs: of 2 rows 1 with a prompt .*and 1 without .the first is row 1"
    ):
        load_tasks(TaskMixtureConfig(tasks=[{"task": "x", "path": "unused"}], tasks_dir=str(tmp_path)))


def test_tasks_of_different_formats_cannot_be_concatenated():
    plain = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    turns = Dataset.from_list(make_rows("list", 1, 0))
    with pytest.raises(
        AMAError, match="task 'a' are plain text, .* 'b' are messages. Set `format: single_turn` on 'a'"
    ):
        concatenate_tasks({"a": plain, "b": turns})
    with pytest.raises(
        AMAError, match="Column 'note' of task 'b' is missing, that of task 'a' is of type Value.'string'"
    ):
        concatenate_tasks({"a": plain.add_column("note", ["[]"]), "b": plain})


def test_labels_follow_the_training_tasks():
    dataset = Dataset.from_dict({"task": ["b", "a", "b"]})
    assert task_names_of(dataset) == ["a", "b"]
    assert with_task_labels(dataset, ["b", "c", "a"])["task"][:] == [0, 2, 0]
    labelled = dataset.cast_column("task", ClassLabel(names=["b", "a"]))
    assert with_task_labels(labelled, ["a", "b"])["task"][:] == [1, 0, 1]


def test_pair_ids_are_of_the_text_alone():
    turns = [{"role": "user", "content": "é"}]
    swapped = [{"content": "é", "role": "user"}]
    assert pair_id(turns, "a", "b") == pair_id(swapped, "a", "b")
    assert len({pair_id("p", "a", "b"), pair_id("p", "b", "a"), pair_id(None, "a", "b"), pair_id("pa", "", "b")}) == 4


def test_the_same_texts_with_other_tools_or_template_arguments_are_another_pair():
    plain = pair_id("p", "a", "b")
    think, silent = ({"enable_thinking": value} for value in (True, False))
    tools = [{"type": "function", "function": {"name": "f", "parameters": None}}]
    ids = [
        plain,
        pair_id("p", "a", "b", chat_template_kwargs=think),
        pair_id("p", "a", "b", chat_template_kwargs=silent),
    ]
    ids += [pair_id("p", "a", "b", tools=tools), pair_id("p", "a", "b", tools=tools, chat_template_kwargs=think)]
    assert len(set(ids)) == len(ids)
    # A dataset fills in the keys that only other rows have
    rows = add_pair_ids(
        Dataset.from_list(
            [
                {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": kwargs}
                for kwargs in (None, think, {"style": "short"})
            ]
        )
    )
    assert rows["pair_id"][:2] == ids[:2] and rows["pair_id"][2] not in ids
