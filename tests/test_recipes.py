"""Every shipped recipe parses strictly, and runs with model and data swapped from the command line."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from conftest import make_rows

from trl_ama import run_pipeline
from trl_ama.scripts.common import make_parser


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("ama/*.yaml"))
NAMES = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]


def parse(path, *flags):
    return make_parser("ama").parse_args_and_config(["--config", str(path), "--use_cpu", *map(str, flags)])


def test_there_are_recipes():
    assert {path.parent.parent.name for path in RECIPES} >= {"quickstart", "smollm2-135m-4tasks"}
    assert set(ROOT.glob("recipes/**/*.yaml")) == set(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_parses_strictly(path):
    """`parse_args_and_config` raises on keys that no dataclass has."""
    pipeline_args, training_args, model_args, task_args = parse(path)
    assert model_args.model_name_or_path and len(task_args.tasks) > 1
    assert training_args.output_dir.startswith("outputs/")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_written_like_the_others(path):
    text = path.read_text()
    assert re.match(r"# .*(GPU|CPU|cores)", text), "the first comment names the hardware"
    for key in ("mixing", "mixing_lr", "smoothing", "excess_clip", "compare", "specialist_args"):
        line = next((line for line in text.splitlines() if line.startswith(f"{key}:")), "")
        assert "#" in line, f"'{key}' lacks its comment"
    assert (path.parent.parent / "README.md").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_runs_with_model_and_data_swapped(path, model_dir, tmp_path):
    tasks = [task["task"] for task in yaml.safe_load(path.read_text())["tasks"]]
    for task, kind in zip(tasks, ("list", "sort", "brief", "list"), strict=False):
        for split, count in (("train", 16), ("test", 6)):
            rows = make_rows(kind, count, seed=count + tasks.index(task))
            (tmp_path / f"{task}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "model_name_or_path": model_dir,
        "tasks_dir": tmp_path,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "specialist_args": "{max_steps: 2}",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    results = run_pipeline(*parse(path, *(word for key, value in flags.items() for word in (f"--{key}", value))))
    assert results["tasks"] == tasks and len(results["policies"]) >= 4


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "recipes" / "quickstart" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstarts_tasks_are_what_its_readme_says(quickstart):
    tasks, _ = quickstart.make_tasks(random.Random(0))
    again, _ = quickstart.make_tasks(random.Random(0))
    other, _ = quickstart.make_tasks(random.Random(1))
    assert tasks == again != other
    assert {task: len(splits["train"]) for task, splits in tasks.items()} == {"list": 1000, "brief": 1000, "sort": 100}
    prompts = [row["prompt"][-1]["content"] for splits in tasks.values() for rows in splits.values() for row in rows]
    lists = [prompt.split(":", 1)[1] for prompt in prompts]
    assert len(set(lists)) == len(lists)  # no word list twice, so none in train and test
    for task, splits in tasks.items():
        rejected = []
        for row in splits["train"]:
            instruction, words = row["prompt"][-1]["content"].split(":")
            words = words.split()
            answers = {"list": words, "brief": words[:1], "sort": sorted(words)}
            assert instruction == task and len(set(map(tuple, answers.values()))) == 3
            assert row["chosen"][0]["content"].split() == answers[task]
            wrong = row["rejected"][0]["content"].split()
            rejected.append(next(name for name, answer in answers.items() if answer == wrong))
        share = rejected.count(max(set(rejected), key=rejected.count)) / len(rejected)
        assert task not in rejected and share < 0.65  # a fair coin between the other two ways
