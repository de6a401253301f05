"""A small world on the test Hub: a base model, pairs of two tasks, and recipes that use them."""

import json
from pathlib import Path
from typing import Any

import tiny_runs
import yaml
from tiny_pairs import make_rows
from trl import ModelConfig, TrlParser

from trl_ama import AMAConfig, TaskMixtureConfig
from trl_ama.recipe.arguments import PipelineArguments


SIZES = {"list": 24, "sort": 12}
HELD_OUT = 10
RECIPE: dict[str, Any] = {
    **tiny_runs.RECIPE,
    "model_name_or_path": "org/base",
    "tasks": [{"task": task, "path": f"org/{task}-pairs", "eval_split": "test"} for task in SIZES],
    "specialist_args": {"max_steps": 4},
    "max_steps": 4,
}


def write_pairs(folder: Path) -> None:
    """The same pairs as files, for `tasks_dir`."""
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", HELD_OUT, 1)):
            rows = make_rows(task, size, seed)
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def upload_model(hub, folder: str | Path, repo_id: str = "org/base") -> str:
    """Returns the commit."""
    return hub.write("model", repo_id, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def upload_pairs(hub, task: str, count: int, repo_id: str | None = None) -> str:
    """Returns the commit."""
    files = {
        f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in make_rows(task, size, seed))
        for split, size, seed in (("train", count, 0), ("test", HELD_OUT, 1))
    }
    return hub.write("dataset", repo_id or f"org/{task}-pairs", files)


def write_recipe(path: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    recipe = {key: value for key, value in {**RECIPE, **changes}.items() if key not in without}
    path.write_text(yaml.safe_dump(recipe))
    return path


def parse(path: Path, *flags: Any):
    """The four argument groups, as the command line gives them."""
    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    return parser.parse_args_and_config(["--config", str(path), *map(str, flags)])
