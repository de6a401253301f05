"""`trl ama-check`: rows that never become pairs, answers that a model cannot tell apart, words that no token stands for."""

import json

import pytest
from checked_pairs import CLEAN, POOL, levels, message, pair, recipe_fixture, with_list  # noqa: F401 - fixtures
from datasets import Dataset
from row_forms import START, both
from tiny_runs import QUICK
from trl import DPOTrainer, ModelConfig

from trl_ama import AMAConfig, TaskMixtureConfig
from trl_ama.check.check import check_data
from trl_ama.check.text import render
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings
from trl_ama.tasks.transcripts import DIFFER


# As the templates of reasoning models do
WITHOUT_THOUGHTS = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'].split('</think>')[-1] }}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def thinking(row, answer="apple"):
    """The pair with answers that differ in their thoughts alone."""
    return {
        **row,
        "chosen": message("assistant", f"<think> bread </think> {answer}"),
        "rejected": message("assistant", f"<think> cloud </think> {answer}"),
    }


def trained_on_nothing(trainer) -> int:
    """Pairs of which a trainer's collator makes the same two sequences with the same tokens counted."""
    count = 0
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        counted = batch["input_ids"] * batch["completion_mask"]
        count += bool((batch["input_ids"][0] == batch["input_ids"][1]).all() and (counted[0] == counted[1]).all())
    return count


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_answers_that_the_template_makes_the_same(recipe, model_dir, quick_args, share):
    rows = [thinking(row) if number < 40 * share else row for number, row in enumerate(CLEAN["list"][0][:40])]
    settings = recipe(with_list(rows))
    settings.inputs.tokenizer.chat_template = WITHOUT_THOUGHTS
    check = check_data(settings)
    figures = check.tasks[0]
    left = figures.splits["train"]["left"]
    trainer = DPOTrainer(
        model_dir, args=quick_args(), train_dataset=Dataset.from_list(rows), processing_class=settings.inputs.tokenizer
    )
    assert left["same_tokens"] == trained_on_nothing(trainer) == 40 * share and left["same_text"] == 0
    assert levels(figures)["same_tokens"] == "look"
    assert ("no_gradient" in levels(figures)) == (share == 1.0) == (figures.verdict == "will not train")
    if share == 1.0:
        assert "All pairs have two answers that are the same to the model (40 by their tokens)" in render(check)
        assert render(check).splitlines()[-1].startswith("1 of 2 tasks will not train (list)")
    else:
        assert render(check).splitlines()[-1].startswith("Every task will train. Look first")


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_answers_that_are_the_same_where_they_are_cut(recipe, model_dir, quick_args, mode):
    """By kind, on pairs that differ in the part that is kept, in the part that is cut, and nowhere."""
    rows = [
        *(pair(f"list {number}", "apple " * 20 + "bread", "apple " * 20 + "cloud") for number in range(8)),
        *(pair(f"list {number}", "bread " + "apple " * 20, "cloud " + "apple " * 20) for number in range(5)),
        *(pair(f"list {number}", "apple", "apple") for number in range(3)),
    ]
    figures = check_data(recipe(with_list(rows), max_length=12, truncation_mode=mode)).tasks[0]
    left = figures.splits["train"]["left"]
    args = quick_args(max_length=12, truncation_mode=mode)
    trainer = DPOTrainer(model_dir, args=args, train_dataset=Dataset.from_list(rows))
    cut = {"keep_start": 8, "keep_end": 5}[mode]
    assert (left["same_text"], left["same_tokens"], left["same_after_cut"]) == (3, 0, cut)
    assert trained_on_nothing(trainer) == 3 + cut and figures.verdict != "will not train"
    every = [row for number, row in enumerate(rows) if number < 8] if mode == "keep_start" else rows[8:13]
    figures = check_data(recipe(with_list([*every, *rows[13:]]), max_length=12, truncation_mode=mode)).tasks[0]
    (problem,) = [problem for problem in figures.problems if problem.kind == "no_gradient"]
    assert problem.level == "fatal"
    assert f"(3 by their text, {cut} up to where max_length cuts them), so no pair sends a gradient" in problem.found


def test_blank_ends_make_no_other_tokens(recipe):
    rows = [{**row, "rejected": message("assistant", row["chosen"][0]["content"] + " ")} for row in CLEAN["list"][0]]
    figures = check_data(recipe(with_list(rows))).tasks[0]
    assert figures.splits["train"]["left"]["same_tokens"] == 60 and levels(figures)["no_gradient"] == "fatal"


def test_held_out_pairs_that_measure_nothing(recipe):
    figures = check_data(recipe(with_list(CLEAN["list"][0], [pair("list", "apple", "apple")] * 3))).tasks[0]
    assert levels(figures)["no_gradient"] == "look" and figures.verdict == "look at this"


def test_words_that_the_tokenizer_does_not_know(recipe):
    """A system prompt of which the model sees nothing; and the word for its role, which the template writes."""
    system = message("system", "Répondez poliment apple")
    rows = [{**row, "prompt": system + row["prompt"]} for row in POOL["list"][:20]]
    check = check_data(recipe(with_list([*rows, *POOL["list"][20:60]])))
    found = check.tasks[0].splits["train"]["unknown_tokens"]
    assert set(found["share"]) == {"prompt"} and set(found["sources"]) == {"system", "template"}
    assert found["sources"]["system"]["share"] == pytest.approx(2 / 3)
    assert sorted(found["sources"]["system"]["words"]) == ["Répondez", "poliment"]
    lengths = [1 + 3 + 1 + len(row["prompt"][1]["content"].split()) + 1 for row in rows]
    rest = [1 + len(row["prompt"][0]["content"].split()) + 1 for row in POOL["list"][20:60]]
    assert found["share"]["prompt"] == pytest.approx(20 * 3 / (sum(lengths) + sum(rest)))
    assert levels(check.tasks[0])["unknown_tokens"] == "look"
    text = "in system messages 67 %, e.g. “Répondez”, “poliment”; also in what the chat template adds"
    assert text in render(check)
    assert check.tasks[1].splits["train"]["unknown_tokens"] is None


def test_a_token_with_another_meaning_is_no_unknown_one(recipe):
    settings = recipe()
    settings.inputs.tokenizer.unk_token = settings.inputs.tokenizer.eos_token
    assert check_data(settings).tasks[0].splits["train"]["unknown_tokens"] is None


def test_messages_as_json_text_among_others(recipe):
    odd = {**CLEAN["list"][0][0], "chosen": message("assistant", json.dumps(message("assistant", "apple bread")))}
    figures = check_data(recipe(with_list([odd, *CLEAN["list"][0][1:]]))).tasks[0]
    assert levels(figures)["json_text"] == "look"


def test_rows_that_a_format_leaves_out(model_dir, tmp_path):
    differ = (both(START)[0], both(START.replace("Hello!", "Good day."))[1])
    rows = [both(START, "apple bread", f"cloud {number}") for number in range(4)] + [differ] * 12
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in rows))
    task = {"task": "hh", "path": "json", "data_files": str(path), "format": "hh_rlhf"}
    settings = RunSettings(
        PipelineArguments(),
        AMAConfig(**QUICK, output_dir=str(tmp_path / "out")),
        ModelConfig(model_name_or_path=model_dir),
        TaskMixtureConfig(tasks=[task]),
    )
    check = check_data(settings)
    figures = check.tasks[0]
    assert levels(figures)["left_out"] == "look"
    assert figures.splits["train"]["rows"] == {"read": 16, "kept": 4, "dropped": {DIFFER: 12}, "noted": {}}
    assert f"train: 16 rows = 4 pairs + 12 {DIFFER}\n" in render(check)
    assert f"Of 16 rows 12 {DIFFER} are left out." in render(check)
