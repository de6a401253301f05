"""The stage of evaluation: what it refuses."""

import pytest
from whole_runs import copy_fixture, finished_fixture, no_training_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.recipe.settings import RunSettings


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--ld_alpha", "0.1"],
            "reference losses of task 'list'.*made with ld_alpha=None, but this run has ld_alpha=0.1",
        ),
        (["--dtype", "bfloat16"], "made with dtype='float32', but this run has dtype='bfloat16'"),
        (
            ["--mixing", "ama_r"],
            r"'ama_r' is not there to be evaluated .*; found \['proportional'\].*trl ama --config",
        ),
        (["--smoothing", "0.2"], "generalist 'ama_s'.*made with smoothing=0.1, but this run has smoothing=0.2"),
        (["--max_eval_pairs", "5"], "reference losses of task 'list'.*made with test_pairs="),
    ],
)
def test_evaluating_with_other_settings_is_refused(copy, recipe, flags, text):
    before = (copy / "results.md").read_text()
    with pytest.raises(AMAError, match=text):
        run_pipeline(*recipe(copy, *flags), stages=("eval",))
    assert (copy / "results.md").read_text() == before


def test_nothing_to_evaluate_on(recipe, copy, no_training, capsys):
    settings = RunSettings(*recipe(copy))
    from trl_ama import evaluate_policies

    del settings.inputs.data["test"]
    with pytest.raises(AMAError, match="No task has held-out pairs"):
        evaluate_policies(settings, {})
