"""What the model sees is what the data says: the tokens of every form of rows, alone and beside others, are DPOTrainer's."""

import copy
import functools
import itertools
import json
from datetime import datetime

import pytest
from corpus_rows import MESSAGES, PLAIN, REFUSED, TEXTS, assistant, parts, user
from datasets import Dataset, LargeList, Value, load_dataset
from tiny_runs import QUICK
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMAError, AMATrainer, TaskMixtureConfig, load_tasks
from trl_ama.tasks.forms import pair_id_of
from trl_ama.tasks.loading import fits_into, prompt_fits_into, read_tasks
from trl_ama.tasks.pairs import concatenate_tasks


KINDS = {"texts": TEXTS, "messages": MESSAGES}
FORMS = {**TEXTS, **MESSAGES}
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def entry(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "".join(letter if letter.isalnum() else "_" for letter in name),
        "path": "json",
        "data_files": str(path),
    }


def raw(folder, name, rows):
    return load_dataset("json", data_files=entry(folder, name, rows)["data_files"], split="train")


def quick(config_class, folder, **changes):
    return config_class(**{**QUICK, "max_length": None, "output_dir": str(folder), "max_steps": 1, **changes})


@pytest.fixture(scope="module")
def trl_ids(letters, letters_dir, folder):
    """The token ids that a plain `DPOTrainer` makes of rows: its own first dataset, and others as it prepares them."""
    args = quick(DPOConfig, folder, precompute_ref_log_probs=False)
    trainer = DPOTrainer(letters_dir, args=args, train_dataset=raw(folder, "oracle", PLAIN))

    @functools.cache
    def ids(name, tokenizer=letters):
        rows = FORMS[name].rows if FORMS[name].instead is None else FORMS[name].instead
        prepared = trainer._prepare_dataset(raw(folder, f"trl {name}", rows), tokenizer, args, "train")
        return [[row[column] for column in IDS] for row in prepared]

    return ids


@pytest.fixture(scope="module")
def together(folder):
    """All forms of a kind at once, each a task, so that all have to share the columns' types."""

    @functools.cache
    def load(kind):
        entries = [entry(folder, name, form.rows) for name, form in KINDS[kind].items()]
        return load_tasks(TaskMixtureConfig(tasks=entries))["train"]

    return load


def of_task(data, name):
    """The rows of one form."""
    kind = next(kind for kind, forms in KINDS.items() if name in forms)
    number = list(KINDS[kind]).index(name)
    return [row for row in data(kind) if row["task"] == number]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_dpo_trainer(kind, letters, letters_dir, folder, together, trl_ids):
    args = quick(AMAConfig, folder, mixing="uniform")
    prepared = AMATrainer(letters_dir, args=args, train_dataset=together(kind), processing_class=letters).train_dataset
    ours = {name: [] for name in KINDS[kind]}
    for row in prepared:
        ours[list(ours)[row["task"]]].append([row[column] for column in IDS])
    wrong = []
    for name, form in KINDS[kind].items():
        assert len(ours[name]) == len(form.rows)
        wrong += [
            (name, letters.decode(sum(us, [])), letters.decode(sum(them, [])))
            for us, them in zip(ours[name], trl_ids(name), strict=True)
            if us != them
        ]
    assert not wrong, "\n".join(map("\n  ".join, wrong))


def test_a_task_is_the_same_beside_another(folder):
    """Every form beside its neighbour in the table."""
    names = list(MESSAGES)
    for first, second in zip(names[::2], names[1::2], strict=True):
        tasks = [entry(folder, name, MESSAGES[name].rows) for name in (first, second)]
        alone = [load_tasks(TaskMixtureConfig(tasks=[task]))["train"].remove_columns("task") for task in tasks]
        both = concatenate_tasks(dict(zip("ab", alone, strict=True))).remove_columns("task")
        for row, expected in zip(both, itertools.chain(*alone), strict=True):
            # What only the other task has is null, or empty
            given = {name: value for name, value in row.items() if name in expected or value not in (None, {})}
            assert repr(given) == repr({name: expected.get(name) for name in given})
            assert pair_id_of(row) == expected["pair_id"]


@pytest.mark.parametrize("name", FORMS)
def test_raw_rows_have_the_ids_of_loaded_pairs(name, folder, together):
    """As a file has them, as `datasets` reads them, and as they are loaded; different rows have different ids."""
    loaded = [row["pair_id"] for row in of_task(together, name)]
    assert [pair_id_of(row) for row in raw(folder, name, FORMS[name].rows)] == loaded
    assert [pair_id_of(row) for row in FORMS[name].rows] == loaded
    assert len(set(loaded)) == len(loaded)


def test_ids_of_published_pairs_hold():
    """These are in datasets of others."""
    plain = {"prompt": "list: a b", "chosen": " a b", "rejected": " a"}
    assert pair_id_of(plain) == "0b5fbdde639b2d6d7e309e0f"
    assert pair_id_of(PLAIN[0]) == "b9d7e05493571c0332b44edf"
    assert (
        pair_id_of({**PLAIN[0], "tools": "[]", "chat_template_kwargs": {"a": None, "b": True}})
        == "4ed4a797a1f00b4f5de7caa2"
    )
    assert pair_id_of({**PLAIN[0], "chosen": [assistant(None)]}) == "dd33ffd2ea0b31d6529bc44b"


def test_what_is_another_pair():
    base = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    others = [
        {**base, "chosen": [assistant("a", tool_calls=[{"id": 1}])]},
        {**base, "chosen": [assistant("a", tool_calls=[{"id": 2}])]},
        {**base, "chosen": [assistant("a", reasoning_content="r")]},
        {**base, "chosen": [assistant(parts("a"))]},
        {**base, "prompt": [user("q", name="Ann")]},
    ]
    assert len({pair_id_of(row) for row in (base, *others)}) == 6
    same = [
        {**base, "chosen": [assistant("a", tool_calls=None, name=None)]},
        {**base, "prompt": [{"content": "q", "role": "user"}]},
        {"chosen": base["prompt"] + base["chosen"], "rejected": base["prompt"] + base["rejected"], "prompt": None},
    ]
    assert {pair_id_of(row) for row in same} == {pair_id_of(base)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(name, folder):
    task = entry(folder, name, REFUSED[name].rows)
    with pytest.raises(AMAError, match=REFUSED[name].says):
        load_tasks(TaskMixtureConfig(tasks=[task], drop_empty=True))


def test_answers_that_are_calls_are_not_dropped(folder):
    rows = [
        *MESSAGES["a call as answer"].rows,
        {**PLAIN[0], "chosen": [assistant(" ")]},
        {**PLAIN[0], "rejected": [assistant(parts("a"))]},
    ]
    rows += [{**PLAIN[1], "chosen": [assistant(parts(" ", ""))]}]
    loaded = read_tasks(TaskMixtureConfig(tasks=[entry(folder, "calls and blanks", rows)], drop_empty=True))
    assert loaded.empty == {"calls_and_blanks": {"train": 2}}
    assert loaded.pairs["train"]["chosen"][:] == [rows[0]["chosen"], rows[2]["chosen"]]


def test_columns_of_the_input_that_nobody_reads_are_named(folder):
    """ms-swift and others have the system prompt in a column."""
    rows = [{**row, "system": "Be brief.", "id": 1} for row in PLAIN]
    with pytest.warns(
        UserWarning, match="Task 'system_column' has a column 'system', which DPOTrainer does not"
    ) as seen:
        load_tasks(TaskMixtureConfig(tasks=[entry(folder, "system column", rows)]))
    assert len(seen) == 1


def test_large_strings_and_lists_beside_ordinary_ones(folder):
    """As Polars and others write them."""
    small = load_tasks(TaskMixtureConfig(tasks=[entry(folder, "small", PLAIN)]))["train"].remove_columns("task")
    text = {key: Value("large_string") for key in ("role", "content")}
    for kind in (small.features["prompt"].__class__(text), LargeList(text)):
        large = small.cast_column("prompt", kind).cast_column("chosen", kind)
        assert large.features["prompt"] == kind
        both = concatenate_tasks({"a": small, "b": large})
        assert both["prompt"][:] == small["prompt"][:] * 2 and both["chosen"][:] == small["chosen"][:] * 2
    plain = Dataset.from_list(TEXTS["texts"].rows)
    both = concatenate_tasks({"a": plain, "b": plain.cast_column("chosen", Value("large_string"))})
    assert both["chosen"][:] == plain["chosen"][:] * 2


def test_a_value_that_json_cannot_hold_is_kept_or_refused():
    rows = [{**PLAIN[0], "chosen": [assistant("a", at=datetime(2020, 1, 1))]}]
    dated = Dataset.from_list(rows)
    assert concatenate_tasks({"a": dated, "b": dated})["chosen"][:] == 2 * [rows[0]["chosen"]]
    with pytest.raises(AMAError, match="Task 'b' has chosen with a value that JSON cannot hold"):
        concatenate_tasks({"a": Dataset.from_list(PLAIN), "b": Dataset.from_list(rows)})


@pytest.mark.parametrize("name", FORMS)
def test_lengths_are_those_of_the_tokens(name, letters, together, trl_ids):
    """What `drop_truncated` keeps, and which prompts are said to fill `max_length`, to the token."""
    for row, (prompt, chosen, rejected) in zip(of_task(together, name), trl_ids(name), strict=True):
        longest = len(prompt) + max(len(chosen), len(rejected))
        assert fits_into(letters, longest)(row) and not fits_into(letters, longest - 1)(row)
        assert prompt_fits_into(letters, len(prompt) + 1)(row) and not prompt_fits_into(letters, len(prompt))(row)


def test_a_prompt_that_is_rendered_otherwise_alone(letters, together, trl_ids):
    """A template that opens a thought which a whole conversation has not: the answer begins before it."""
    thinking = copy.deepcopy(letters)
    thinking.chat_template = letters.chat_template.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    [row, _], [(prompt, _, _), _] = of_task(together, "messages"), trl_ids("messages", thinking)
    assert thinking.decode(prompt).endswith("<assistant>")
    assert prompt_fits_into(thinking, len(prompt) + 1)(row) and not prompt_fits_into(thinking, len(prompt))(row)
