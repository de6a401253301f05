"""The recipe of a whole run on a tiny model, with its pairs."""

import json

import pytest
from tiny_pairs import make_rows
from tiny_runs import QUICK
from trl import ModelConfig, TrlParser

from trl_ama import AMAConfig, TaskMixtureConfig
from trl_ama.fingerprint import write_json
from trl_ama.pipeline_arguments import PipelineArguments


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
            **QUICK,
            "model_name_or_path": model_dir,
            "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
            "tasks_dir": str(data_dir),
            "mixing": "ama_s",
            "compare": ["proportional"],
            "specialist_args": {"max_steps": 12},
            "use_peft": True,
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": "all-linear",
            "learning_rate": 5e-3,
            "per_device_eval_batch_size": 16,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 1,
            "seed": 3,
        },
    )

    def build(output_dir, *flags):
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        return parser.parse_args_and_config(["--config", str(path), "--output_dir", str(output_dir), *map(str, flags)])

    return build
