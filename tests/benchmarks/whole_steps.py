"""Times of whole training steps, for `overhead.py`: a run's steps, a tiny model, and a model that is given."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from real_pairs import TASKS, read_pairs  # noqa: E402
from tiny_models import make_model, make_tokenizer, save  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402

from trl_ama import AMAConfig, AMATrainer  # noqa: E402
from trl_ama.reference_losses.columns import REFERENCE_COLUMNS, SPECIALIST_COLUMNS  # noqa: E402


def made_up_pairs(count: int, words: int) -> list[dict]:
    """Pairs of four tasks in turn, of random words."""
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(60)]

    def text() -> str:
        return " ".join(rng.choice(vocabulary, words))

    return [
        {"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}", "task": f"task_{number % 4}"}
        for number in range(count)
    ]


def tiny_model(folder: str) -> str:
    """Save a model of some 20,000 parameters with a tokenizer of the made-up words."""
    tokenizer = make_tokenizer([f"w{number}" for number in range(60)], chat_template=None)
    return save(make_model(len(tokenizer)), tokenizer, folder)


def step_times(
    model: str, mixing: str, pairs: list[dict], steps: int, step_clock: Callable[[], float], lora: bool, **own
) -> list[float]:
    """Seconds from the end of each step of a run to the end of the next, so that loading and drawing are in them."""
    ends: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(step_clock())

    with tempfile.TemporaryDirectory() as folder:
        args = AMAConfig(
            output_dir=folder,
            mixing=mixing,
            max_steps=steps,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            seed=0,
            **own,
        )
        dataset = Dataset.from_list(pairs)
        # Reference log-probs that the pairs bring along keep every mixture to one forward a step
        for column in (*REFERENCE_COLUMNS, *SPECIALIST_COLUMNS):
            dataset = dataset.add_column(column, np.full(len(dataset), -60.0))
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None
        trainer = AMATrainer(model, args=args, train_dataset=dataset, callbacks=[Stamp()], peft_config=peft_config)
        trainer.reference_unchecked = False  # made-up reference log-probs
        trainer.train()
    return np.diff(ends).tolist()


def tiny_model_steps(options: argparse.Namespace) -> dict:
    """Whole steps of a tiny model, adaptive and proportional runs taking turns."""
    medians = {"ama_s": [], "proportional": []}
    with tempfile.TemporaryDirectory() as folder:
        model, pairs = tiny_model(folder), made_up_pairs(400, 12)
        for number in range(-1, options.rounds):
            names = list(medians) if number % 2 else list(medians)[::-1]
            for name in names:
                times = step_times(
                    model, name, pairs, options.tiny_steps, time.process_time, False, per_device_train_batch_size=8
                )
                if number >= 0:
                    medians[name].append(1e3 * statistics.median(times))
    differences = [a - b for a, b in zip(medians["ama_s"], medians["proportional"], strict=True)]
    return {
        **{f"{name}_milliseconds": statistics.median(values) for name, values in medians.items()},
        "difference_milliseconds": statistics.median(differences),
        "differences": [round(value, 3) for value in differences],
        "ratio": statistics.median(a / b for a, b in zip(medians["ama_s"], medians["proportional"], strict=True)),
    }


def share_of_a_step(options: argparse.Namespace, steps: dict) -> dict:
    """The share that strategy, sampler and bookkeeping have in a real step at k = 4; or why that was not measured."""
    if options.model is None:
        return {"skipped": "no model was given (--model, or TRL_AMA_BENCH_MODEL)"}
    if options.data is None:
        pairs = made_up_pairs(64, 30)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        pairs = [
            {**pair, "task": task}
            for task in TASKS
            for pair in islice(read_pairs(options.data, task, "train", tokenizer, options.max_length), 16)
        ]
    times = step_times(
        options.model,
        "ama_s",
        pairs,
        options.model_steps + 1,
        time.perf_counter,
        True,
        per_device_train_batch_size=4,
        max_length=options.max_length,
        model_init_kwargs={"dtype": "float32"},
    )
    seconds = statistics.median(times)
    shares = {name: by_tasks["4"]["step"] / 1e6 / seconds for name, by_tasks in steps.items() if "4" in by_tasks}
    return {
        "step_seconds": seconds,
        "pairs_of_a_step": 4,
        "pairs": "real" if options.data else "made up",
        "share": shares,
    }
