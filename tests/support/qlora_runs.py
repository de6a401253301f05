"""A QLoRA recipe on a tiny model, and its finished run."""

import gc
import json
from pathlib import Path

import pytest
import torch
import trl.trainer.dpo_trainer
from tiny_models import make_model, save
from tiny_pairs import make_rows
from tiny_runs import QUICK
from transformers import BitsAndBytesConfig
from trl import ModelConfig, TrlParser

from trl_ama import AMAConfig, TaskMixtureConfig, run_pipeline
from trl_ama.common.files import write_json
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings


pytest.importorskip("bitsandbytes")  # skips whoever imports this

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
SIZES = {"list": 64, "brief": 64}
LAYERS = 14  # of the tiny model that are quantised: seven in each of two


def make_base(tokenizer, folder: Path) -> str:
    """bitsandbytes quantises blocks of 64 weights, and on a CPU wants every row to be a whole number of them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return save(make_model(len(tokenizer), **sizes), tokenizer, folder)


def make_recipe(base: str, folder: Path):
    """Parses a recipe on disk, whose path it has as `config`."""
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 20, 1)):
            lines = [json.dumps(row) + "\n" for row in make_rows(task, size, seed)]
            (folder / f"{task}_{split}.jsonl").write_text("".join(lines))
    settings = {
        **QUICK,
        "model_name_or_path": base,
        "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
        "tasks_dir": str(folder),
        "mixing": "ama_s",
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "paged_adamw_8bit",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "specialist_args": {"max_steps": 24},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "seed": 3,
    }
    write_json(folder / "config.yaml", settings)

    def parse(output_dir, *flags):
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        argv = ["--config", str(folder / "config.yaml"), "--output_dir", str(output_dir), *map(str, flags)]
        return parser.parse_args_and_config(argv)

    parse.config = str(folder / "config.yaml")
    return parse


class Loads:
    """Every base that DPOTrainer loads, and how many quantised weights were alive just before."""

    def __init__(self, load):
        self.load, self.before = load, []

    def __call__(self, *args, **kwargs):
        self.before.append(alive())
        return self.load(*args, **kwargs)


def alive() -> int:
    """Quantised weights in memory, by their storage."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one).__name__ == "Params4bit" and one.device.type != "meta"]
    return len({one.data_ptr() for one in found})


def make_run(recipe, output_dir: Path):
    """A finished run: its settings, its results and the loads of each stage."""
    loads = {}
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("specialists", "losses", "train", "eval"):
            loads[stage] = Loads(trl.trainer.utils.create_model_from_path)
            patch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", loads[stage])
            results = run_pipeline(*recipe(output_dir), stages=(stage,))
    return RunSettings(*recipe(output_dir)), results, {stage: load.before for stage, load in loads.items()}


def gradient(model):
    model.train()
    model.zero_grad()
    ids = torch.arange(5, 25)[None]
    model(ids, labels=ids).loss.backward()
    return torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])


# Made once for all files of a process, see conftest


@pytest.fixture(name="base", scope="session")
def base_fixture(qlora_base):
    return qlora_base


@pytest.fixture(name="recipe", scope="session")
def recipe_fixture(qlora_recipe):
    return qlora_recipe


@pytest.fixture(name="finished", scope="session")
def finished_fixture(qlora_run):
    return qlora_run
