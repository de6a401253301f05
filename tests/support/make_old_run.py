"""Makes `tests/data/old_run`: runs as `trl ama` leaves them when it is stopped, for later versions to go on from.

    python tests/support/make_old_run.py --output outputs/old_run

Run it with the version whose files are to be kept. The same run is made undisturbed, stopped while it scores reference losses,
and stopped while it trains its second generalist, each in a process of its own. What is kept of the undisturbed one is what
the stopped ones have to end with; that they do with the version that made them is seen here, bit by bit. No path of this
machine gets into a file, as model, tasks and output folder are named from the folder that the run is started in.
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from places import SUPPORT


STOPPED = 75  # how a run that a signal stopped ends
SIZES = {"list": 12, "sort": 6}
HELD_OUT = 4
STEPS, STOP_AT = 6, 3
RECIPE = {
    "model_name_or_path": "model",
    "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
    "tasks_dir": "data",
    "output_dir": "run",
    # The one that trains when the run is stopped has the more state: weights that move, and draws that follow them
    "mixing": "ama_r",
    "compare": ["ama_s"],
    "mixing_lr": 2.0,
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "down_proj"],
    "learning_rate": 2e-2,
    "beta": 0.5,
    "max_length": 32,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": STEPS,
    "specialist_args": {"max_steps": 8, "save_strategy": "no"},
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


def make_world() -> None:
    """The recipe, its pairs, and a base model with its tokenizer, in the current folder."""
    from tiny_models import make_model
    from tiny_pairs import make_rows
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    words = {"<pad>": None, "</s>": None, "<user>": None, "<assistant>": None}
    Path("data").mkdir()
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", HELD_OUT, 1)):
            rows = make_rows(task, size, seed)
            Path("data", f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            words.update(dict.fromkeys(word for row in rows for word in row["prompt"][0]["content"].split()))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
    fast.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained("model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_model(len(words), num_hidden_layers=1, **sizes).save_pretrained("model")


def train(stop: str) -> None:
    """`trl ama` in this process; with a signal in the middle of the second task's scoring, or of the second generalist."""
    import datasets
    from trl import DPOTrainer

    import trl_ama
    from trl_ama.dpo import sweep

    datasets.config.HF_DATASETS_CACHE = Path("cache")
    training_step, forward, batches = DPOTrainer.training_step, sweep.packed_forward, []

    def step(self, *args, **kwargs):
        if stop == "training" and self.args.output_dir.endswith("ama_s") and self.state.global_step == STOP_AT - 1:
            signal.raise_signal(signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    def score(*args, **kwargs):
        if stop == "losses" and Path("run/reference_losses/list").exists():
            batches.append(args)
            if len(batches) == 3:
                signal.raise_signal(signal.SIGTERM)
        return forward(*args, **kwargs)

    DPOTrainer.training_step, sweep.packed_forward = step, score
    script = Path(trl_ama.__file__).parent / "scripts" / "ama.py"
    sys.argv = [str(script), "--config", "recipe.yaml"]
    runpy.run_path(str(script), run_name="__main__")


def run(stop: str) -> None:
    command = [sys.executable, str(SUPPORT / "make_old_run.py"), "--stop", stop]
    code = subprocess.run(command, check=False).returncode
    if code != (0 if stop == "nowhere" else STOPPED):
        raise SystemExit(f"The run that was to be stopped {stop} ended with {code}.")


def outcome(folder: Path) -> dict:
    """What must not depend on how often a run was stopped."""
    history = json.loads((folder / "generalists/ama_s/trainer_state.json").read_text())["log_history"]
    times = ("_runtime", "_per_second", "step_time")
    log = [{key: value for key, value in entry.items() if not key.endswith(times)} for entry in history]
    return {"policies": json.loads((folder / "results.json").read_text())["policies"], "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="a new folder")
    parser.add_argument(
        "--stop", choices=["nowhere", "losses", "training"], help="the run alone, in the current folder"
    )
    args = parser.parse_args()
    if args.stop:
        return train(args.stop)
    args.output.mkdir(parents=True)
    os.chdir(args.output)
    make_world()
    run("nowhere")
    whole = outcome(Path("run"))
    Path("run").rename("whole")
    run("losses")
    shutil.copytree("run", "stopped_in_losses")
    run("training")
    shutil.copytree("run", "stopped_in_training")
    run("nowhere")
    if outcome(Path("run")) != whole:
        raise SystemExit("The stopped run ended with other numbers than the undisturbed one.")
    Path("undisturbed.json").write_text(json.dumps(whole, indent=1) + "\n")
    for folder in ("whole", "run", "cache"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
