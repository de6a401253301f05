"""A stage's models are gone, and their memory is given back, before the next stage or the next policy is loaded."""

import json
import weakref

import pytest
from accelerate.utils import memory
from hub_world import parse
from tiny_pairs import make_rows
from tiny_runs import RECIPE
from trl.trainer import dpo_trainer

from trl_ama import run_pipeline
from trl_ama.common.files import write_json
from trl_ama.policies import switching
from trl_ama.training.stage import TrainingStage


# Which trainer or reference is loaded by whom, and how many others are in memory
STAGES = {
    "specialist": [("dpo_trainer", 0), ("dpo_trainer", 1)],  # with its reference
    "losses": [
        ("dpo_trainer", 0),
        ("switching", 1),
        ("switching", 1),
    ],  # the base, then one specialist after the other
    "generalist": [("dpo_trainer", 0)],
    "evaluation": [("dpo_trainer", 0), ("switching", 1), ("switching", 1)],
}
RUN = ["specialist", "specialist", "losses", "generalist", "generalist", "evaluation"]


@pytest.fixture
def loads(monkeypatch):
    """Of every model that is loaded: by whom, how many others are in memory, and whether memory was given back since the last."""
    found, models, given_back = [], [], []
    clear, finish = memory.clear_device_cache, TrainingStage.finish

    def cleared(**kwargs):
        given_back.append(True)
        clear(**kwargs)

    def finished(self, result):
        given_back.clear()  # the Trainer has done so when it began, when there was nothing to give
        finish(self, result)

    def watch(module):
        load = module.create_model_from_path

        def loaded(*args, **kwargs):
            others = sum(model() is not None for model in models)
            found.append((module.__name__.rpartition(".")[2], others, bool(given_back)))
            given_back.clear()
            model = load(*args, **kwargs)
            models.append(weakref.ref(model))
            return model

        monkeypatch.setattr(module, "create_model_from_path", loaded)

    monkeypatch.setattr(memory, "clear_device_cache", cleared)
    monkeypatch.setattr(TrainingStage, "finish", finished)
    watch(dpo_trainer)
    watch(switching)
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_models_of_a_stage_are_gone_before_the_next(loads, model_dir, tmp_path):
    for task in ("list", "sort"):
        for split in ("train", "test"):
            rows = make_rows(task, 4, 0)
            (tmp_path / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **RECIPE,
        "model_name_or_path": model_dir,
        "use_peft": False,
        "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in ("list", "sort")],
        "tasks_dir": str(tmp_path),
        "compare": ["proportional"],
        "max_steps": 1,
        "save_strategy": "no",
    }
    write_json(tmp_path / "recipe.yaml", recipe)
    run_pipeline(*parse(tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run"))
    assert [load[:2] for load in loads] == [load for stage in RUN for load in STAGES[stage]]
    firsts = [index for index, (who, others, _) in enumerate(loads) if index and (who == "switching" or others == 0)]
    assert all(loads[index][2] for index in firsts), loads
