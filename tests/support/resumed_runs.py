"""Trainings and runs to stop and go on with, and what must be the same afterwards."""

import shutil
import signal

import pytest
import torch
from hub_world import SIZES as WORLD_SIZES
from hub_world import parse, write_pairs, write_recipe
from tiny_models import lora
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import weights_of
from transformers import TrainerCallback

from trl_ama import AMATrainer, run_pipeline


SIZES = {"list": 20, "sort": 6, "brief": 14}


@pytest.fixture(name="training")
def training_fixture(model_dir, quick_args, tmp_path):
    """Builds a trainer of 7 steps, across epochs of 5, that logs and saves at different steps."""
    dataset = with_reference_columns(make_dataset(SIZES))

    def build(folder, rows=dataset, **overrides):
        settings = {
            "mixing": "ama_s",
            "mixing_lr": 0.5,
            "max_steps": 7,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        }
        args = quick_args(output_dir=str(tmp_path / folder), **{**settings, **overrides})
        held_out = rows.select(range(0, 40, 4))
        return AMATrainer(model_dir, args=args, train_dataset=rows, eval_dataset=held_out, peft_config=lora())

    return build


def log_of(trainer) -> list[dict]:
    times = ("_runtime", "_per_second", "step_time")
    return [
        {key: value for key, value in entry.items() if not key.endswith(times)} for entry in trainer.state.log_history
    ]


def assert_same(resumed, whole):
    assert log_of(resumed) == log_of(whole)
    assert resumed.mixture.state_dict() == whole.mixture.state_dict()
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name


_made: dict = {}  # by fixtures, for the tests of every file: a recipe and its run


@pytest.fixture(name="recipe", scope="module")
def recipe_fixture(model_dir, tmp_path_factory):
    if "recipe" not in _made:
        _made["recipe"] = _make_recipe(model_dir, tmp_path_factory)
    return _made["recipe"]


def _make_recipe(model_dir, tmp_path_factory):
    home = tmp_path_factory.mktemp("recipe")
    write_pairs(home)
    return write_recipe(
        home / "config.yaml",
        model_name_or_path=model_dir,
        tasks=[{"task": task, "path": "org/data", "eval_split": "test"} for task in WORLD_SIZES],
        tasks_dir=str(home),
        save_strategy="steps",
        save_steps=2,
        specialist_args={"max_steps": 4},
    )


@pytest.fixture(name="finished", scope="module")
def finished_fixture(recipe, tmp_path_factory):
    """Folder and results of its run; who changes them takes a `copy`."""
    if "run" not in _made:
        folder = tmp_path_factory.mktemp("finished") / "run"
        _made["run"] = folder, run_pipeline(*parse(recipe, "--output_dir", folder))
    return _made["run"]


@pytest.fixture(name="copy")
def copy_fixture(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


class At(TrainerCallback):
    """Sends a signal to this process when a step begins."""

    def __init__(self, step: int, number: int = signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)
