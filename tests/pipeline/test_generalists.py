"""The stage of generalists: what it needs, and which of its checkpoints is kept."""

import shutil

import pytest
from whole_runs import copy_fixture, finished_fixture, no_training_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json


def test_only_the_mixing_changed(copy, recipe, no_training):
    """Specialists and reference losses serve any mixing; the generalist of that name does not."""
    with pytest.raises(
        AMAError, match=r"The generalist 'ama_s'.*made with smoothing=0.1, but this run has smoothing=0.3"
    ):
        run_pipeline(*recipe(copy, "--smoothing", "0.3"))


def test_training_without_reference_losses(copy, recipe, no_training):
    shutil.rmtree(copy / "reference_losses" / "sort")
    shutil.rmtree(copy / "generalists")
    with pytest.raises(
        AMAError, match=r"'sort' has no reference losses; found \['brief', 'list'\]. Run `trl ama-losses"
    ):
        run_pipeline(*recipe(copy), stages=("train",))


def test_best_generalist_by_its_worst_task(copy, recipe):
    """`save_strategy: best` is the generalist's; specialists have nothing to choose by."""
    shutil.rmtree(copy / "specialists" / "sort")
    shutil.rmtree(copy / "generalists")
    flags = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "best", "--load_best_model_at_end"]
    flags += ["--metric_for_best_model", "eval_worst_excess", "--greater_is_better", "False"]
    run_pipeline(*recipe(copy, *flags, "--compare", "ama_s"))
    state = read_json(copy / "generalists" / "ama_s" / "trainer_state.json")
    seen = [entry["eval_worst_excess"] for entry in state["log_history"] if "eval_worst_excess" in entry]
    assert len(seen) == 3 and state["best_metric"] == min(seen)
