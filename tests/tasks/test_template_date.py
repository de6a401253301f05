"""`template_date` and `chat_template_kwargs` from the recipe to the tokens: of every stage, and of what is saved."""

import datetime

import pytest
from hub_world import SIZES, parse, write_pairs, write_recipe
from tiny_models import CHAT_TEMPLATE, make_model, save
from transformers import AutoTokenizer

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json
from trl_ama.policies.identity import tokenizer_identity
from trl_ama.recipe.settings import RunSettings
from trl_ama.tasks.template_date import asks_for_the_day, fix_date


DAY = "{{ strftime_now('%d') }} {{ 'quiet' if quiet is defined and quiet else 'piano' }} "
MESSAGES = [{"role": "user", "content": "list apple"}]


def rendered(tokenizer, **kwargs) -> str:
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, **kwargs)


@pytest.fixture(scope="module")
def dated_model(tokenizer, tmp_path_factory):
    """A model whose template begins with the day, as SmolLM3's does."""
    path = str(tmp_path_factory.mktemp("dated"))
    save(make_model(len(tokenizer)), tokenizer, path)
    dated = AutoTokenizer.from_pretrained(path)
    dated.add_tokens(["07"])
    dated.chat_template = DAY + CHAT_TEMPLATE
    save(make_model(len(dated)), dated, path)
    return path


def test_fixing_the_date(dated_model):
    tokenizer = AutoTokenizer.from_pretrained(dated_model)
    before = tokenizer_identity(tokenizer)
    assert asks_for_the_day(tokenizer) and rendered(tokenizer).startswith(datetime.date.today().strftime("%d "))
    assert fix_date(tokenizer, "2025-07-07")
    assert rendered(tokenizer).startswith("07 piano <user>") and not asks_for_the_day(tokenizer)
    assert tokenizer_identity(tokenizer) != before  # so losses of another day do not pass for these
    assert not fix_date(tokenizer, "2025-07-08") and rendered(tokenizer).startswith("07 ")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('{%- set today = strftime_now("%d %B %Y") -%}{{ today }}', "08 July 2025"),  # as SmolLM3
        ("{% if strftime_now is defined %}{{ strftime_now( '%d %b %Y' ) }}{% endif %}", "08 Jul 2025"),  # as Llama 3.2
        ("no date", "no date"),
    ],
)
def test_ways_to_ask_for_the_date(tokenizer, template, expected):
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        assert fix_date(tokenizer, "2025-07-08") == (template != "no date")
        assert rendered(tokenizer) == expected
        tokenizer.chat_template = "{% set f = '%d' %}{{ strftime_now(f) }}"
        with pytest.raises(AMAError, match="in a way that template_date cannot answer"):
            fix_date(tokenizer, "2025-07-08")
    finally:
        tokenizer.chat_template = own


def recipe_of(dated_model, folder, **changes):
    write_pairs(folder)
    kwargs = {"list": {"quiet": True}}
    tasks = [{"task": task, "path": "json", "chat_template_kwargs": kwargs.get(task, {})} for task in SIZES]
    return write_recipe(
        folder / "recipe.yaml", model_name_or_path=dated_model, tasks=tasks, tasks_dir=str(folder), **changes
    )


def test_a_run_has_one_date_and_each_tasks_arguments(dated_model, tmp_path, monkeypatch):
    """What trainers tokenise in every stage; the saved models ask for the day again."""
    from trl import DPOTrainer

    seen = []
    prepare = DPOTrainer._prepare_dataset

    def watched(self, dataset, processing_class, *args):
        result = prepare(self, dataset, processing_class, *args)
        seen.append((type(self).__name__, {processing_class.decode(ids[:2]) for ids in result["prompt_ids"]}))
        return result

    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", watched)
    recipe = recipe_of(dated_model, tmp_path, template_date=datetime.date(2025, 7, 7))
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "run"))
    assert {name for name, _ in seen} == {
        "SimpleNamespace",
        "_Rehearsal",
        "SpecialistTrainer",
        "ScoringTrainer",
        "GeneralistTrainer",
    }  # the first two for the plan and before anything is trained
    assert set.union(*(starts for _, starts in seen)) == {"07 quiet", "07 piano"}
    assert [starts for name, starts in seen if name == "GeneralistTrainer"][0] == {"07 quiet", "07 piano"}
    for folder in ("specialists/list", "generalists/ama_s"):
        assert asks_for_the_day(AutoTokenizer.from_pretrained(tmp_path / "run" / folder))
    note = read_json(tmp_path / "run" / "specialists" / "list" / "stage.json")["fingerprint"]
    other = recipe_of(dated_model, tmp_path, template_date="2025-07-08")
    assert tokenizer_identity(RunSettings(*parse(other)).inputs.tokenizer) != note["tokenizer"]
    with pytest.raises(AMAError, match="made with tokenizer="):
        run_pipeline(*parse(other, "--output_dir", tmp_path / "run"))


def test_the_plan_says_how_many_pairs_had_no_answer(dated_model, tmp_path):
    from trl_ama.pipeline.start import describe_plan

    recipe = recipe_of(dated_model, tmp_path, template_date="2025-07-07", drop_empty=True)
    path = tmp_path / "sort_train.jsonl"
    path.write_text(
        path.read_text() + '{"prompt": [{"role": "user", "content": "sort"}], "chosen": [], "rejected": []}\n'
    )
    lines = describe_plan(RunSettings(*parse(recipe, "--output_dir", tmp_path / "run")), ("specialists",))
    count = len(path.read_text().splitlines())
    (line, rest) = [line.split() for line in lines if "rows read" in line]
    assert (
        line == f"rows read sort training: {count} rows = {count - 1} pairs + 1 without an answer (drop_empty)".split()
    )
    assert rest[:4] == "rows read all others".split()


def test_a_date_that_is_not_fixed_is_warned_about(dated_model, tmp_path):
    from trl_ama.pipeline.start import check_recipe

    recipe = recipe_of(dated_model, tmp_path)
    with pytest.warns(UserWarning, match="writes today's date into every prompt.*template_date"):
        check_recipe(RunSettings(*parse(recipe)), ("specialists",))
    with pytest.raises(AMAError, match="template_date must be a day like 2025-07-08, got 'yesterday'"):
        parse(recipe, "--template_date", "yesterday")
