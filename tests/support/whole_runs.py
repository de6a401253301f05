"""The recipe of a whole run on a tiny model with its pairs, and the run when it is finished."""

import json
import shutil
from pathlib import Path

import pytest
from hub_world import parse
from tiny_pairs import make_rows
from tiny_runs import RECIPE
from trl import DPOTrainer

from trl_ama.common.files import write_json


SIZES = {"list": 48, "sort": 12, "brief": 48}


def write_data(folder: Path) -> Path:
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 20, 1)):
            with open(folder / f"{task}_{split}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in make_rows(task, size, seed))
    return folder


def make_recipe(path: Path, model_dir: str, data_dir: Path):
    """Builds the four parsed argument groups of a recipe, as the command line does."""
    write_json(
        path,
        {
            **RECIPE,
            "model_name_or_path": model_dir,
            "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
            "tasks_dir": str(data_dir),
            "compare": ["proportional"],
            "specialist_args": {"max_steps": 12},
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 4,
        },
    )

    def build(output_dir, *flags):
        return parse(path, "--output_dir", output_dir, *flags)

    return build


# Made once for all files of a process, see conftest


@pytest.fixture(name="recipe", scope="session")
def recipe_fixture(whole_recipe):
    return whole_recipe


@pytest.fixture(name="finished", scope="session")
def finished_fixture(whole_run):
    """A finished run's folder and results; tests copy it before they change it."""
    return whole_run


@pytest.fixture(name="copy")
def copy_fixture(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(name="no_training")
def no_training_fixture(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))
