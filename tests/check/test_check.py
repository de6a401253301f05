"""`trl ama-check`: what is planted in pairs is found, and clean pairs pass."""

import json
import sys

import pytest
from checked_pairs import CLEAN, POOL, levels, message, pair, recipe_fixture, with_list  # noqa: F401 - fixtures
from datasets import Dataset
from docs_runs import base_and_pairs_fixture, run_page  # noqa: F401 - fixtures
from tiny_pairs import WORDS
from transformers import PreTrainedModel
from trl import DPOTrainer

from trl_ama import AMAError, load_tasks
from trl_ama.check.check import check_data
from trl_ama.check.duplicates import duplicates, text_hashes
from trl_ama.check.mistakes import mistakes_of
from trl_ama.check.rules import trivial_rules
from trl_ama.check.text import render, safe
from trl_ama.dpo.tokens import token_counts, tokenise
from trl_ama.scripts import ama_check
from trl_ama.scripts.common import parse_arguments
from trl_ama.tasks.loading import fits_into


GOOD = pair("Sort these five words for me", "apple bread", "bread apple")
NIGHT = pair("night", "apple bread", "bread apple")


def test_clean_pairs_pass(recipe):
    check = check_data(recipe())
    for figures in check.tasks:
        assert figures.verdict == "OK" and set(levels(figures)) == {"few_held_out"}
        assert figures.splits["train"]["left"]["left"] == 60 and figures.splits["test"]["pairs"] == 30
        assert len(figures.shown) == 2
    assert check.trains
    report = render(check)
    assert report.count("## ") == 3 and "| list | OK" in " ".join(report.split())
    assert report.splitlines()[-1].startswith("Every task will train. `trl ama-plan`")
    json.dumps(check.to_dict())


def test_tokens_are_those_of_the_trainer(recipe, model_dir, tokenizer, quick_args):
    settings = recipe()
    rows = Dataset.from_list(CLEAN["list"][0])
    ours = tokenise(rows, tokenizer, settings.recipe.training_args)
    trainer = DPOTrainer(model_dir, args=quick_args(), train_dataset=rows)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[name][:] == trainer.train_dataset[name][:]
    assert token_counts(ours)[0].tolist() == [
        len(ours[0][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]


def test_a_row_that_the_template_refuses_is_named(recipe, tokenizer):
    """Of many rows, by its number; the other tasks are looked at all the same."""
    refusing = "{% if 'night' in messages[0]['content'] %}{{ raise_exception('no nights') }}{% endif %}"
    settings = recipe(with_list([row for row in POOL["list"] if "night" not in str(row)][:50] + [GOOD, NIGHT, GOOD]))
    settings.inputs.tokenizer.chat_template = refusing + tokenizer.chat_template
    figures = check_data(settings).tasks[0]
    (problem,) = [
        problem for problem in figures.problems if problem.kind == "template" and "training" in problem.found
    ]
    assert problem.level == "fatal" and "Row 51 cannot be tokenised" in problem.found and "no nights" in problem.found
    with pytest.raises(AMAError, match="Row 907 cannot be tokenised"):
        tokenise(
            Dataset.from_list([GOOD, NIGHT]), settings.inputs.tokenizer, settings.recipe.training_args, rows=[900, 907]
        )


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("limit", [None, 20])
def test_drops_are_those_of_the_pipeline(recipe, model_dir, tokenizer, quick_args, drop, limit):
    prompts = [" ".join(WORDS[: 1 + number % 12]) for number in range(60)]
    rows = [pair(f"list {text}", "apple " * (1 + number % 7), "bread") for number, text in enumerate(prompts)]
    changes = {"drop_truncated": drop, "max_train_pairs": limit}
    settings = recipe(with_list(rows), changes, max_length=14)
    left = check_data(settings).tasks[0].splits["train"]["left"]
    assert not left["estimated"] and left["prompt_fills_max_length"] + left["drop_truncated"] > 0
    fits = fits_into(tokenizer, 14) if drop else None
    loaded = load_tasks(settings.recipe.task_args, settings.recipe.training_args.seed, fits)["train"]
    loaded = loaded.filter(lambda row: row["task"] == 0)
    assert len(loaded) == 60 - left["drop_truncated"] - left["max_pairs"]
    trainer = DPOTrainer(model_dir, args=quick_args(max_length=14), train_dataset=loaded)
    assert len(trainer.train_dataset) == left["left"]


def test_what_is_cut_is_marked(recipe):
    rows = [pair(f"list {a} {b}", "apple " * 20, "bread") for a in WORDS[:8] for b in WORDS[:8]]
    check = check_data(recipe(with_list(rows), max_length=12), show=1)
    figures = check.tasks[0]
    assert levels(figures)["truncated"] == "look" and figures.splits["train"]["over_max_length"] == 1
    (shown,) = figures.shown
    assert shown["tokens"]["prompt"] + shown["tokens"]["chosen"] - shown["cut"]["chosen"] == 12
    assert shown["chosen"].split() == ["apple"] * (12 - shown["tokens"]["prompt"]) and shown["cut"]["rejected"] == 0
    assert f"max_length CUTS {shown['cut']['chosen']} of them" in render(check)
    # The other mode cuts the prompt
    (shown,) = check_data(recipe(with_list(rows), max_length=12, truncation_mode="keep_end"), show=1).tasks[0].shown
    assert shown["cut"]["prompt with chosen"] == shown["tokens"]["prompt"] and shown["cut"]["chosen"] > 0


def test_prompts_that_fill_max_length(recipe):
    rows = [pair(f"list {' '.join(WORDS)} {word}", "apple", "bread") for word in WORDS]
    check = check_data(recipe(with_list(rows), max_length=16))
    assert levels(check.tasks[0])["prompt_fills_max_length"] == "fatal" and check.tasks[0].verdict == "will not train"
    assert check.tasks[1].verdict == "OK" and not check.trains
    dropped = check_data(recipe(with_list(rows), {"drop_truncated": True}, max_length=16)).tasks[0]
    assert levels(dropped)["drop_truncated"] == "fatal"
    of_specialist = check_data(recipe(with_list(rows), specialist_args={"max_length": 16}))
    assert [levels(figures).get("specialist_max_length") for figures in of_specialist.tasks] == ["fatal", None]


def test_answers_that_differ_only_where_they_are_cut(recipe):
    rows = [pair(f"list {a} {b}", "apple " * 9 + "river", "apple " * 9 + "piano") for a in WORDS for b in WORDS[:3]]
    assert levels(check_data(recipe(with_list(rows), max_length=10)).tasks[0])["same_after_cut"] == "look"
    assert "same_after_cut" not in levels(check_data(recipe(with_list(rows))).tasks[0])


def plant(feature: str, clean: list[dict]) -> list[dict]:
    change = {
        "is longer": lambda c, r: (f"{c} {c}", r),
        "is shorter": lambda c, r: (c, f"{r} {r}"),
        "has more lines": lambda c, r: (c.replace(" ", "\n"), r),
        "contains a code block": lambda c, r: (c, r[: len(c)]) if not c else (f"``` {c} ```", f"xxx {r} xxx"),
        "begins with “brief”": lambda c, r: (f"brief {c}", f"night {r}"),
        "ends with “zebra”": lambda c, r: (f"{c} zebra", r),
        "does not end with “zebra”": lambda c, r: (c, f"{r} zebra"),
    }[feature]
    rows = []
    for row in clean:
        chosen, rejected = change(row["chosen"][0]["content"], row["rejected"][0]["content"])
        rows.append(pair(row["prompt"][0]["content"], chosen, rejected))
    return rows


@pytest.mark.parametrize(
    "feature",
    [
        "is longer",
        "is shorter",
        "has more lines",
        "contains a code block",
        "begins with “brief”",
        "ends with “zebra”",
        "does not end with “zebra”",
    ],
)
def test_leaks(recipe, feature):
    figures = check_data(recipe(with_list(*(plant(feature, part) for part in CLEAN["list"])))).tasks[0]
    assert figures.verdict == "look at this" and levels(figures)["leak"] == "look"
    rule = next(rule for rule in figures.rules if rule.name == feature)
    assert rule.accuracy == rule.held_out == 1.0 and rule.decides == 1.0 and 0 < rule.stderr < 0.12


def test_leak_of_the_training_pairs_only_is_no_rule(recipe):
    """A rule that the held-out pairs contradict is shown, but is not what a policy will be credited for."""
    figures = check_data(
        recipe(with_list(plant("is longer", CLEAN["list"][0]), plant("is shorter", CLEAN["list"][1])))
    )
    rule = next(rule for rule in figures.tasks[0].rules if rule.name == "is longer")
    assert (rule.accuracy, rule.held_out) == (1.0, 0.0)
    assert "leak" not in levels(figures.tasks[0])


def test_rules_of_few_pairs_are_uncertain():
    (best, *_) = trivial_rules([("aa", "b"), ("cc", "d"), ("ee", "f")], [])
    assert best.accuracy == 1.0 and best.accuracy - 2 * best.stderr < 0.65
    rules = trivial_rules([], [])
    assert {rule.accuracy for rule in rules} == {0.5}


def test_duplicates_within_a_task_and_between_train_and_held_out(recipe):
    train, test = CLEAN["list"]
    leaked = [*test[:25], *train[:5]]
    figures = check_data(recipe(with_list([*train, *train[:7]], leaked))).tasks[0]
    counts = figures.duplicates
    assert (counts["repeated_pairs"], counts["repeated_prompts"], counts["contradictions"]) == (7, 7, 0)
    assert (counts["held_out_in_training"], counts["held_out_prompts_in_training"]) == (5, 5)
    assert levels(figures)["repeated_pairs"] == levels(figures)["held_out_in_training"] == "look"
    # The same prompts with other answers
    other = [*test[:25], *(pair(row["prompt"][0]["content"], "apple", "river") for row in train[:5])]
    found = levels(check_data(recipe(with_list(train, other))).tasks[0])
    assert found["held_out_prompts_in_training"] == "look" and "held_out_in_training" not in found


def test_duplicates_and_contradictions_across_tasks(recipe):
    train, _ = CLEAN["list"]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in train[:4]]
    check = check_data(recipe({**CLEAN, "sort": ([*CLEAN["sort"][0], *train[4:10], *swapped], CLEAN["sort"][1])}))
    first, second = check.tasks
    assert first.duplicates["shared_pairs"] == {"sort": 6} == {"sort": second.duplicates["shared_pairs"]["list"]}
    assert first.duplicates["contradicted_by"] == {"sort": 4} and first.duplicates["contradictions"] == 4
    assert levels(first)["contradicted_by"] == "look" and levels(second)["shared_pairs"] == "look"
    assert "contradict a pair of task 'sort'" in render(check)


def test_swapped_pairs_and_same_answers(recipe):
    train, _ = CLEAN["list"]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in train[:3]]
    same = [{**row, "rejected": row["chosen"]} for row in train[10:12]]
    figures = check_data(recipe(with_list([*train[:10], *train[12:], *swapped, *same]))).tasks[0]
    assert figures.duplicates["contradictions"] == 6 and figures.duplicates["same_answers"] == 2
    assert levels(figures)["contradictions"] == levels(figures)["same_answers"] == "look"
    all_same = check_data(recipe(with_list([{**row, "rejected": row["chosen"]} for row in train]))).tasks[0]
    assert levels(all_same)["no_gradient"] == "fatal" and all_same.splits["train"]["left"]["same_text"] == len(train)


def test_white_space_makes_no_other_pair():
    rows = [pair("a b", "c d", "e"), pair("a  b ", "c\nd", "e"), pair("a b", "c d", "f")]
    counts = duplicates({"list": {"train": text_hashes(Dataset.from_list(rows))}})["list"]
    assert (counts["repeated_pairs"], counts["repeated_prompts"]) == (1, 2)


PLAIN = {"prompt": "Sort these five words for me:", "chosen": " apple bread", "rejected": " bread apple"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, []),
        (PLAIN, []),
        ({**GOOD, "chosen": "apple bread"}, ["mixed_forms"]),
        ({**GOOD, "prompt": None}, ["mixed_forms"]),
        ({**GOOD, "chosen": [{"from": "gpt", "value": "apple"}]}, ["mixed_forms"]),
        ({**GOOD, "chosen": message("user", "apple")}, ["last_not_assistant"]),
        ({**GOOD, "rejected": [*GOOD["rejected"], *message("user", "why")]}, ["last_not_assistant"]),
        ({**GOOD, "prompt": [*GOOD["prompt"], *message("assistant", "Sure")]}, ["prompt_ends_with_assistant"]),
        ({**GOOD, "prompt": message("human", "Sort")}, ["unknown_role"]),
        ({**GOOD, "chosen": [*GOOD["prompt"], *GOOD["chosen"]]}, ["prompt_in_answer"]),
        ({**GOOD, "chosen": message("assistant", "Sort these five words for me: a b")}, ["prompt_in_answer"]),
        ({**PLAIN, "chosen": PLAIN["prompt"] + PLAIN["chosen"]}, ["prompt_in_answer"]),
        ({**PLAIN, "prompt": "Hi", "chosen": "Hi there"}, []),
        ({**PLAIN, "prompt": "\n\nHuman: sort\n\nAssistant:"}, ["transcript"]),
        ({**GOOD, "prompt": []}, ["empty_prompt"]),
        ({**PLAIN, "prompt": " "}, ["empty_prompt"]),
        ({**PLAIN, "rejected": "\n"}, ["empty_answer"]),
        ({**GOOD, "prompt": message("user", "end it </s> <user> now")}, ["special_token"]),
        ({**PLAIN, "chosen": " apple </s> bread"}, ["special_token"]),
        ({**PLAIN, "chosen": " apple bread</s>"}, []),
    ],
)
def test_mistakes_of_form(row, expected):
    assert mistakes_of(row, ["</s>"]) == expected


def test_mistakes_are_reported_with_the_row(recipe):
    train, test = CLEAN["list"]
    rows = [*train[:8], {**train[8], "chosen": message("user", "apple")}, *train[9:]]
    figures = check_data(recipe(with_list(rows, test))).tasks[0]
    (problem,) = [problem for problem in figures.problems if problem.kind == "last_not_assistant"]
    assert problem.level == "look" and "1 of 60 pairs" in problem.found
    start = train[8]["prompt"][0]["content"]
    assert f"row 8 of train, “{start}…”" in problem.found


def test_a_task_that_cannot_be_loaded_does_not_hide_the_others(recipe):
    train, _ = CLEAN["list"]
    check = check_data(recipe(with_list([*train, pair("list apple", " ", "bread")])))
    assert (
        levels(check.tasks[0]) == {"unreadable": "fatal"} and "without an answer" in check.tasks[0].problems[0].found
    )
    assert check.tasks[1].verdict == "OK"
    assert "without an answer" in render(check).split("## Summary")[1]


def test_answers_that_drop_empty_drops_are_counted(recipe):
    train, test = CLEAN["list"]
    silent = pair("list apple", " ", "bread")
    data = with_list([silent, *train, silent], [*test, silent])
    check = check_data(recipe(data, task_changes={"drop_empty": True}))
    found = [problem for problem in check.tasks[0].problems if problem.kind == "empty_answer"]
    assert [(problem.level, problem.found) for problem in found] == [
        ("note", f"drop_empty drops 2 of {len(train) + 2} pairs: they have an empty answer."),
        ("note", f"drop_empty drops 1 of {len(test) + 1} held-out pairs: they have an empty answer."),
    ]
    assert check.tasks[0].splits["train"]["pairs"] == len(train) and check.trains


@pytest.mark.parametrize("chosen", [5, [3], [{"text": "x"}], [{"from": "gpt", "value": "apple"}]])
@pytest.mark.parametrize("which", [slice(None), slice(5, 6)])
def test_rows_of_any_shape(recipe, chosen, which):
    """All of a file's rows, or one among good ones."""
    rows = [dict(row) for row in CLEAN["list"][0]]
    for row in rows[which]:
        row["chosen"] = chosen
    check = check_data(recipe(with_list(rows)))
    assert check.tasks[0].verdict == "will not train" and check.tasks[1].verdict == "OK"
    assert render(check).splitlines()[-1].startswith("1 of 2 tasks will not train (list): mend")


def test_a_row_without_a_prompt(recipe):
    rows = [*CLEAN["list"][0], {**POOL["list"][-1], "prompt": None}]
    check = check_data(recipe(with_list(rows)))
    assert levels(check.tasks[0]) == {"unreadable": "fatal"} and check.tasks[1].verdict == "OK"
    text = (
        "of 61 rows 60 with a prompt (the first is row 0) and 1 without (the first is row 60). Drop those without one"
    )
    assert f"Task 'list', train pairs: {text}" in render(check)


def test_plain_and_conversational_tasks_together(recipe):
    plain = [{name: side[0]["content"] for name, side in row.items()} for row in CLEAN["list"][0]]
    check = check_data(recipe({"sort": CLEAN["sort"], "list": (plain,)}))
    assert levels(check.tasks[1])["other_columns"] == "fatal"
    text = "The pairs of task 'list' are plain text, and those of task 'sort' are messages. Set `format: single_turn` on 'list'"
    assert text in render(check)
    # Whichever comes first in the recipe
    check = check_data(recipe({"list": (plain,), "sort": CLEAN["sort"]}))
    assert check.tasks[0].verdict == "will not train" and check.tasks[1].verdict == "OK"
    assert text in render(check)
    assert "| Set `format: single_turn` on 'list'" in render(check)  # the first thing to do


def test_imbalance_and_no_held_out_pairs(recipe):
    check = check_data(recipe({"list": (POOL["list"][:100],), "sort": (POOL["sort"][:8],)}))
    assert levels(check.tasks[0]) == {"no_held_out": "look"}
    assert levels(check.tasks[1])["imbalance"] == "look"


def test_a_sample_is_scaled_up(recipe):
    rows = [
        pair(f"list {a} {b}", *(("apple " * 30, "bread") if a < "f" else ("bread", "apple")))
        for a in WORDS
        for b in WORDS
    ]
    check = check_data(recipe(with_list(rows), {"drop_truncated": True}, max_length=20), sample=50)
    found = check.tasks[0].splits["train"]
    assert (found["pairs"], found["looked_at"]) == (len(rows), 50) and found["left"]["estimated"]
    truth = sum(row["prompt"][0]["content"] >= "list f" for row in rows)
    assert abs(found["left"]["left"] - truth) < 0.25 * len(rows)
    assert found["left"]["left"] + found["left"]["drop_truncated"] == len(rows)
    assert check.tasks[0].duplicates["pairs"] == len(rows) and "about" in render(check)
    again = check_data(recipe(with_list(rows), {"drop_truncated": True}, max_length=20), sample=50)
    assert again.to_dict() == check.to_dict()


EVIL = "\x1b]0;owned\x07 \x1b[2J\x9b31m \r fine \u202e txt \ud800"


def test_nothing_of_the_data_reaches_the_terminal_unescaped(recipe, monkeypatch):
    evil = EVIL.encode("utf-8", "replace").decode()  # JSON lines hold no lone surrogate
    rows = [
        pair(f"{word} {evil}\n## list: OK", f"{evil} {word}", f"night {word}\u2028x") for word in WORDS for _ in "ab"
    ]
    monkeypatch.setattr("trl_ama.check.check.DataCheck.model", evil, raising=False)
    report = render(check_data(recipe(with_list(rows)), show=3))
    assert all(character.isprintable() for character in report.replace("\n", ""))
    assert "\\x1b]0" in report or "<unk>" in report  # this tokenizer knows few words
    assert "\n## list: OK" not in report
    assert all(character.isprintable() for character in safe(EVIL)) and "\\ud800" in safe(EVIL)


@pytest.fixture
def run(recipe, tmp_path, model_dir, capsys):
    """Runs the command on tasks; returns its exit code and what it printed."""

    def call(tasks, *flags):
        recipe(tasks)
        argv = [
            "--model_name_or_path",
            model_dir,
            "--tasks_dir",
            str(tmp_path),
            "--use_cpu",
            "true",
            "--bf16",
            "false",
        ]
        argv += [
            "--output_dir",
            str(tmp_path / "out"),
            "--max_length",
            "64",
            "--tasks",
            *(f"{{task: {task}}}" for task in tasks),
        ]
        capsys.readouterr()
        try:
            ama_check.main(*parse_arguments(ama_check.make_parser(), [*argv, *map(str, flags)]))
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return call


def test_command(run, tmp_path):
    path = tmp_path / "check.json"
    code, printed = run(CLEAN, "--show", 1, "--json", path)
    assert code == 0 and printed.count("as the model sees it") == 2
    assert [task["verdict"] for task in json.loads(path.read_text())["tasks"]] == ["OK", "OK"]
    code, _ = run(with_list(plant("is longer", CLEAN["list"][0])), "--show", 0)
    assert code == 0  # a warning
    code, printed = run(with_list([{**row, "rejected": row["chosen"]} for row in CLEAN["list"][0]]))
    assert code == 1 and "list: will not train" in printed
    assert not (tmp_path / "out").exists()


def test_command_looks_at_a_recipe_for_a_gpu(recipe, tmp_path, model_dir, capsys):
    """As `trl` runs it: nothing is launched, and the precision of a device that is not here is not refused."""
    from trl_ama import cli

    recipe(CLEAN)
    argv = [
        "ama-check",
        "--model_name_or_path",
        model_dir,
        "--tasks_dir",
        str(tmp_path),
        "--bf16",
        "true",
        "--show",
        "0",
    ]
    argv += ["--output_dir", str(tmp_path / "out"), "--num_processes", "4", "--tasks", "{task: list}", "{task: sort}"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count("## list: OK") == 1
    rows = [{**row, "rejected": row["chosen"]} for row in CLEAN["list"][0]]
    recipe(with_list(rows))
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 1 and "## sort: OK" in capsys.readouterr().out


def test_command_reads_no_weights(run, monkeypatch):
    for module in ("safetensors.torch", "safetensors"):
        if module in sys.modules:
            monkeypatch.setattr(f"{module}.safe_open", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr("trl_ama.policies.identity.model_identity", lambda *args: pytest.fail("weights were hashed"))
    monkeypatch.setattr("trl_ama.recipe.inputs.model_identity", lambda *args: pytest.fail("weights were hashed"))
    made, make = [], PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, path, *args, **kwargs):
        made.append((path, kwargs["device_map"], kwargs["state_dict"]))
        return make(cls, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    assert run(CLEAN)[0] == 0
    assert set(map(str, made)) <= {"(None, 'meta', {})"}


@pytest.mark.parametrize(("flag", "value"), [("--show", -1), ("--sample", -2)])
def test_command_refuses_negative_numbers(run, flag, value):
    with pytest.raises(AMAError, match="must be at least 0, got -"):
        run(CLEAN, flag, value)


def test_file_that_cannot_be_written(run, tmp_path):
    with pytest.raises(AMAError, match="cannot be written"):
        run(CLEAN, "--json", tmp_path / "missing" / "check.json")


def test_the_page(base_and_pairs, capsys):
    assert run_page("your_data.md") == ["ama-check"]
    printed = capsys.readouterr().out
    assert "## travel: look at this" in printed and "ends with “hours by car.”" in printed
    assert printed.splitlines()[-1].startswith("look at this ['leak'")
