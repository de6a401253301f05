"""Clean pairs of two tasks, and recipes that read them or others in their place."""

import json

import pytest
from tiny_pairs import make_rows
from tiny_runs import QUICK
from trl import ModelConfig

from trl_ama import AMAConfig, TaskMixtureConfig
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, list]:
    return {
        "prompt": message("user", prompt),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }


def unique(rows: list[dict]) -> list[dict]:
    return list({json.dumps(row["prompt"]): row for row in rows}.values())


# Of two tasks, 60 pairs each to train on and 30 held out, all with prompts of their own
POOL = {task: unique(make_rows(task, 150, seed=5)) for task in ("list", "sort")}


CLEAN = {task: (rows[:60], rows[60:90]) for task, rows in POOL.items()}


@pytest.fixture(name="recipe")
def recipe_fixture(model_dir, tmp_path):
    """Write pairs and return the settings of a recipe that reads them."""

    def build(tasks=CLEAN, task_changes=None, specialist_args=None, **changes) -> RunSettings:
        for task, parts in tasks.items():
            for split, rows in zip(("train", "test"), parts, strict=False):
                path = tmp_path / f"{task}_{split}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        args = AMAConfig(**{**QUICK, "output_dir": str(tmp_path / "out"), "seed": 3, **changes})
        return RunSettings(
            PipelineArguments(specialist_args=specialist_args),
            args,
            ModelConfig(model_name_or_path=model_dir),
            TaskMixtureConfig(
                tasks=[{"task": task} for task in tasks], tasks_dir=str(tmp_path), **(task_changes or {})
            ),
        )

    return build


def levels(figures) -> dict[str, str]:
    return {problem.kind: problem.level for problem in figures.problems}


def with_list(train: list[dict], test: list[dict] | None = None) -> dict:
    """The clean tasks with other pairs of `list`."""
    return {**CLEAN, "list": (train, CLEAN["list"][1] if test is None else test)}
