"""The recipe of a whole run on a tiny model, with its pairs."""

import json

import pytest
from hub_world import parse
from tiny_pairs import make_rows
from tiny_runs import RECIPE

from trl_ama.safe_files import write_json


SIZES = {"list": 48, "sort": 12, "brief": 48}


@pytest.fixture(name="data_dir", scope="module")
def data_dir_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 20, 1)):
            with open(folder / f"{task}_{split}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in make_rows(task, size, seed))
    return folder


@pytest.fixture(name="recipe", scope="module")
def recipe_fixture(model_dir, data_dir, tmp_path_factory):
    """Builds the four parsed argument groups, as the command line does."""
    path = tmp_path_factory.mktemp("recipe") / "config.yaml"
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
