"""What a run says before it begins, and what it refuses then."""

import json

import pytest
from tiny_pairs import make_rows
from whole_runs import no_training_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline


def test_the_plan_comes_first(recipe, tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr("trl_ama.pipeline.run.train_specialists", stop)
    with pytest.raises(Stop):
        run_pipeline(*recipe(tmp_path))
    printed = capsys.readouterr().out
    assert "3 tasks, 108 training pairs, 60 held out" in printed
    assert printed.count("to do") == 3 + 3 + 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--specialist_args", "{learning_rat: 1}"],
            "Unknown training argument 'learning_rat' .*Did you mean 'learning_rate'",
        ),
        (["--model_name_or_path", "org/not-cached"], "base model 'org/not-cached' cannot be read"),
    ],
)
def test_recipes_that_cannot_run(recipe, tmp_path, no_training, flags, text):
    with pytest.raises(AMAError, match=text):
        run_pipeline(*recipe(tmp_path, *flags))


def test_what_the_trainer_would_refuse_is_refused_before_any_specialist(recipe, tmp_path, no_training):
    for flags, text in (
        (["--use_weighting"], "use_weighting"),
        (
            ["--fp16", "true", "--bf16", "false", "--dtype", "float16", "--use_peft", "false"],
            "fp16 is set and dtype is float16",
        ),
        (["--sync_ref_model"], "sync_ref_model moves the reference"),
        (["--train_sampling_strategy", "group_by_length"], "both decide which pairs come next"),
        (
            ["--specialists", json.dumps({"brief": str(tmp_path)})],
            "specialist of task 'brief' at .* is neither an adapter",
        ),
    ):
        with pytest.raises(AMAError, match=text):
            run_pipeline(*recipe(tmp_path / "run", *flags))


def test_arguments_that_a_pipeline_cannot_follow(recipe, tmp_path, no_training):
    with pytest.raises(AMAError, match="finds by itself where each stage was stopped"):
        run_pipeline(*recipe(tmp_path, "--resume_from_checkpoint", "x"))
    arguments = recipe(tmp_path, "--eval_strategy", "steps")
    for task in arguments[3].tasks:
        task.eval_split = None
    arguments[3].tasks_dir = None
    for task in arguments[3].tasks:
        task.path = "json"
        task.data_files = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows("list", 4, 0)))
    with pytest.raises(AMAError, match="eval_strategy is 'steps', but no task has held-out pairs"):
        run_pipeline(*arguments)
    with pytest.raises(AMAError, match="do not go together"):
        run_pipeline(*recipe(tmp_path, "--specialist_args", "{load_best_model_at_end: true}"))
