"""What a run pushes, seen from the other side: by the Hub's own clients, and by the next person's run."""

import json
import shutil

import yaml
from conftest import QUICK, make_rows
from trl import ModelConfig, TrlParser

from trl_ama import AMAConfig, TaskMixtureConfig, run_pipeline
from trl_ama.pipeline_arguments import PipelineArguments


SIZES = {"list": 24, "sort": 12}


def jsonl(task, count, seed):
    return "".join(json.dumps(row) + "\n" for row in make_rows(task, count, seed))


def upload_base(hub, model_dir):
    files = {path.name: path.read_bytes() for path in __import__("pathlib").Path(model_dir).iterdir()}
    return hub.write("model", "org/base", files)


def upload_pairs(hub, task):
    return hub.write(
        "dataset", f"org/{task}", {"train.jsonl": jsonl(task, SIZES[task], 0), "test.jsonl": jsonl(task, 10, 1)}
    )


RECIPE = {
    **QUICK,
    "model_name_or_path": "org/base",
    "tasks": [{"task": task, "path": f"org/{task}", "eval_split": "test"} for task in SIZES],
    "mixing": "ama_s",
    "specialist_args": {"max_steps": 4},
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "learning_rate": 5e-3,
    "per_device_eval_batch_size": 16,
    "max_steps": 4,
    "logging_steps": 1,
    "seed": 3,
}


def parse(tmp_path, output_dir, *flags, without=(), **changes):
    path = tmp_path / f"{output_dir.name}.yaml"
    recipe = {key: value for key, value in {**RECIPE, **changes}.items() if key not in without}
    path.write_text(yaml.safe_dump(recipe))
    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    return parser.parse_args_and_config(["--config", str(path), "--output_dir", str(output_dir), *map(str, flags)])


def test_all(hub, model_dir, tmp_path):
    upload_base(hub, model_dir)
    for task in SIZES:
        upload_pairs(hub, task)
    hub.clear_log()
    run_pipeline(
        *parse(tmp_path, tmp_path / "run", push_to_hub=True, hub_model_id="org/mine", compare=["proportional"])
    )
    for request in hub.requests:
        print(request.method, request.path, request.status)
    for kind, name in (("model", "org/mine"), ("model", "org/mine-list"), ("dataset", "org/mine-reference-losses")):
        tree = hub.tree(kind, name)
        print("=====", name, {path: len(content) for path, content in tree.items()})
        print(tree["README.md"].decode())
    shutil.rmtree(tmp_path / "run")
    run_pipeline(
        *parse(tmp_path, tmp_path / "second", without=["tasks"], reference_losses="org/mine-reference-losses")
    )
