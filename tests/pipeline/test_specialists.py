"""The stage of specialists: the same each time, gone on with, ready ones, and weak ones."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import make_model
from trl import DPOTrainer
from whole_runs import SIZES, copy_fixture, finished_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.pipeline.specialists import quality_warning


def test_a_specialist_trained_again_is_the_same(copy, recipe, monkeypatch):
    """Same settings, same weights: the reference losses still hold, whatever was printed or logged meanwhile."""
    monkeypatch.setattr(
        "trl_ama.pipeline.losses.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored again")
    )
    shutil.rmtree(copy / "specialists" / "sort")
    run_pipeline(
        *recipe(copy, "--logging_steps", "5", "--run_name", "again"), stages=("specialists", "losses", "train")
    )


def test_specialists_are_the_same_from_another_folder(finished, recipe, tmp_path, model_dir):
    """Bases are known by their weights, where the run noted them, not by where they lay."""
    shutil.copytree(model_dir, tmp_path / "elsewhere")
    sources = {task: str(finished[0] / "specialists" / task) for task in SIZES}
    flags = ["--model_name_or_path", tmp_path / "elsewhere", "--specialists", json.dumps(sources)]
    run_pipeline(*recipe(tmp_path / "run", *flags), stages=("losses",))
    stranger = tmp_path / "stranger"
    shutil.copytree(model_dir, stranger)
    make_model(26, seed=9).save_pretrained(stranger)
    flags[1] = stranger
    with pytest.raises(AMAError, match="is an adapter of .*, but this run's base model is"):
        run_pipeline(*recipe(tmp_path / "run", *flags), stages=("losses",))


def test_a_stopped_specialist_goes_on_from_its_checkpoint(recipe, finished, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    steps = []
    original = DPOTrainer.training_step

    def count(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", count)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(*recipe(output_dir), stages=("specialists",))
    assert (output_dir / "specialists" / "list" / "checkpoint-8").is_dir()
    run_pipeline(*recipe(output_dir), stages=("specialists",))
    assert steps[10:14] == [8, 9, 10, 11]
    adapter = Path("specialists", "list", "adapter_model.safetensors")
    assert (output_dir / adapter).read_bytes() == (finished[0] / adapter).read_bytes()


def test_a_users_own_specialist_is_not_trained(copy, recipe, tmp_path, monkeypatch):
    source = tmp_path / "mine"
    shutil.copytree(copy / "specialists" / "sort", source)
    shutil.rmtree(copy)
    trained = []
    monkeypatch.setattr(
        "trl_ama.pipeline.specialists.train_specialist", lambda settings, task: trained.append(task) or {}
    )
    run_pipeline(*recipe(copy, "--specialists", json.dumps({"sort": str(source)})), stages=("specialists",))
    assert trained == ["list", "brief"]
    with pytest.raises(AMAError, match=r"specialist for 'sorting', but the recipe's tasks are .* Did you mean 'sort'"):
        run_pipeline(*recipe(copy, "--specialists", json.dumps({"sorting": str(source)})))


def test_quality_warning():
    good = {"eval_loss": 0.5, "base_loss": 0.693, "eval_accuracy": 0.8, "eval_pairs": 100}
    assert quality_warning("list", good) is None
    for worse in ({"eval_loss": 0.7}, {"eval_accuracy": 0.54}):
        text = quality_warning("list", {**good, **worse})
        assert "specialist of task 'list' does not beat the base model on its own 100 held-out pairs" in text
    assert quality_warning("list", {"steps": 3}) is None


def test_a_weak_specialist_is_said_loudly(recipe, tmp_path):
    with pytest.warns(UserWarning, match="does not beat the base model"):
        run_pipeline(
            *recipe(tmp_path, "--specialist_args", "{max_steps: 1, learning_rate: 1.0e-9}"), stages=("specialists",)
        )
