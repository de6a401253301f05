"""Step time, scoring throughput and memory of AMATrainer against TRL's DPOTrainer, side by side on the same batches.

    python tests/benchmarks/speed.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_train.jsonl[.gz]

Both trainers live in one process and take turns on each batch, so that a busy machine slows both down; what counts is the
median of the ratios. The part `floor` states steps and scoring as multiples of what nobody can leave out (`floor.py`). On a machine that others use, `--threads 1 --cpu-time` counts what the processor did for this process
and not what it waited. `--quick` takes few batches. Writes `speed.json` and `speed.md` into `--output`; of a run before
with the same settings, the table keeps the precisions that this one does not measure.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import floor  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from real_pairs import TASKS, add_material, measured_before, read_pairs, why_not  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from trl_ama import AMAConfig, AMATrainer  # noqa: E402
from trl_ama.dpo.scoring import score_pairs  # noqa: E402
from trl_ama.policies.switching import reference_policy  # noqa: E402


clock = time.perf_counter
PARTS = ("time", "floor", "memory")
WORKS = {"train": "training, precomputed reference", "train_live": "training, live reference", "score": "scoring"}
LONG_ANSWERS = "short prompts, long answers"


def long_answers(rows: list[dict], max_length: int) -> list[dict]:
    """Token rows with prompts of 8 tokens and answers that nearly fill `max_length`."""
    stream = [token for row in rows for token in row["prompt_ids"] + row["chosen_ids"]]
    rng = np.random.default_rng(0)
    result = []
    for row in rows:
        answers = []
        for _ in range(2):
            size, start = int(rng.integers(max_length * 3 // 4, max_length - 8)), int(rng.integers(len(stream) // 2))
            answers.append(stream[start : start + size])
        result.append(
            {**row, "prompt_ids": row["prompt_ids"][:8], "chosen_ids": answers[0], "rejected_ids": answers[1]}
        )
    return result


class Bench:
    """One trainer with its optimizer, ready for single steps."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer
        if trainer.args.gradient_checkpointing:  # else done by `train()`
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        self.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()

    def batch(self, rows: list[dict]) -> dict:
        batch = self.trainer.data_collator(rows)
        zeros = torch.full((len(rows),), -50.0)
        return {**batch, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}

    def step(self, batch: dict, precomputed: bool = True) -> float:
        """Seconds of forward, backward and optimizer."""
        if not precomputed:
            batch = {key: value for key, value in batch.items() if not key.startswith("ref_")}
        self.trainer.precompute_ref_logps = precomputed
        self.model.train()
        start = clock()
        self.trainer.training_step(self.model, dict(batch))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return clock() - start

    def score(self, dataset: Dataset, batch_size: int) -> float:
        """Seconds of one pass over pairs: as `precompute_ref_log_probs` runs it, or `score_pairs`."""
        start = clock()
        if isinstance(self.trainer, AMATrainer):
            with reference_policy(self.trainer) as model:
                score_pairs(self.trainer, model, dataset, "")
        else:
            self.model.eval()
            for first in range(0, len(dataset), batch_size):
                rows = [dataset[row] for row in range(first, min(first + batch_size, len(dataset)))]
                batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
                self.trainer.compute_ref_log_probs(self.model, batch)
        return clock() - start


def build(kind: str, options: argparse.Namespace, dtype: str, pairs: list[dict]) -> Bench:
    """A trainer of either kind: LoRA of rank 16 on all linear layers."""
    config, cls, own = (
        (AMAConfig, AMATrainer, {"mixing": "proportional"}) if kind == "ours" else (DPOConfig, DPOTrainer, {})
    )
    args = config(
        output_dir=tempfile.mkdtemp(),
        model_init_kwargs={"dtype": dtype},
        bf16=dtype == "bfloat16",
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **own,
    )
    dataset = Dataset.from_list(pairs)
    return Bench(
        cls(
            options.model,
            args=args,
            train_dataset=dataset if kind == "ours" else dataset.remove_columns("task"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
    )


def prepared(bench: Bench, tasks: list[str], max_length: int) -> dict[str, list[dict]]:
    """The tokenised pairs of our trainer, by task."""
    dataset, names = bench.trainer.train_dataset, bench.trainer.task_names
    rows = {task: [] for task in tasks if task in names}
    for row in dataset:
        rows[names[row["task"]]].append(
            {key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids", "task")}
        )
    if LONG_ANSWERS in tasks:
        rows[LONG_ANSWERS] = long_answers(rows[next(iter(rows))], max_length)
    return rows


def time_steps(trl: Bench, ours: Bench, rows: list[dict], options: argparse.Namespace) -> dict[str, float]:
    """Medians of step times and of their ratios, the trainers taking turns."""
    kinds = {"trl": (trl, True), "trl_live": (trl, False), "ours": (ours, True)}
    times = {kind: [] for kind in kinds}
    for number in range(-1, options.batches):
        batch = rows[(number + 1) * options.batch_size : (number + 2) * options.batch_size]
        order = list(kinds) if number % 2 else list(kinds)[::-1]
        for kind in order:
            bench, is_precomputed = kinds[kind]
            seconds = bench.step(bench.batch(batch), is_precomputed)
            if number >= 0:  # the first batch warms up, and is where every model is tried
                times[kind].append(seconds)
    values = {kind: np.array(entries) for kind, entries in times.items()}
    return {
        **{f"{kind}_seconds": float(np.median(entries)) for kind, entries in values.items()},
        "ratio": float(np.median(values["trl"] / values["ours"])),
        "ratio_without_precompute": float(np.median(values["trl_live"] / values["ours"])),
        "ratios": (values["trl"] / values["ours"]).round(2).tolist(),
    }


def time_scoring(trl: Bench, ours: Bench, rows: list[dict], options: argparse.Namespace) -> dict[str, float]:
    """Pairs a second of one pass over the same pairs, the trainers taking turns."""
    dataset = Dataset.from_list(rows[: options.score_pairs])
    seconds = {"trl": [], "ours": []}
    for _ in range(options.score_passes):
        for name, bench in (("trl", trl), ("ours", ours)):
            seconds[name].append(bench.score(dataset, options.batch_size))
    ratios = np.array(seconds["trl"]) / np.array(seconds["ours"])
    return {
        **{f"{name}_pairs_a_second": len(dataset) / float(np.median(entries)) for name, entries in seconds.items()},
        "ratio": float(np.median(ratios)),
    }


def peak_memory(kind: str, work: str, options: argparse.Namespace, dtype: str) -> dict[str, int]:
    """Peak resident memory (MB) of a process of its own that trains on, or scores, the longest pairs; and before that."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", kind, work, "--dtypes", dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def memory_of(kind: str, work: str, options: argparse.Namespace, dtype: str, pairs: list[dict]) -> None:
    bench = build(kind, options, dtype, pairs)
    length = {
        row: len(entry["prompt_ids"]) + max(len(entry["chosen_ids"]), len(entry["rejected_ids"]))
        for row, entry in enumerate(bench.trainer.train_dataset)
    }
    rows = bench.trainer.train_dataset.select(sorted(length, key=length.get)[: -4 * options.batch_size - 1 : -1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if work == "score":
        bench.score(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]), options.batch_size)
    else:
        for start in range(0, len(rows), options.batch_size):
            bench.step(bench.batch([rows[row] for row in range(start, start + options.batch_size)]), work == "train")
    print(json.dumps({"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = []
    for dtype, parts in result["dtypes"].items():
        lines += [f"## {dtype}", ""]
        if parts["steps"]:
            lines += [*time_table(parts), ""]
        if parts.get("floor"):
            lines += [*floor.table(parts["floor"]), ""]
        if parts.get("memory"):
            lines += ["| peak memory, MB | TRL | ours |", "| --- | ---: | ---: |"]
            for work, title in WORKS.items():
                peaks = [f"{parts['memory'][work][kind]['peak']:,}" for kind in ("trl", "ours")]
                lines.append(f"| {title} | {' | '.join(peaks)} |")
            lines.append("")
    return "\n".join(lines)


def time_table(parts: dict) -> list[str]:
    lines = [
        "| seconds a step, and ratios to ours | TRL, precomputed | TRL | ours | precomputed / ours | TRL / ours | scoring |",
        "| --- " + "| ---: " * 6 + "|",
    ]
    for task, figures in parts["steps"].items():
        cells = [f"{figures[f'{kind}_seconds']:.2f}" for kind in ("trl", "trl_live", "ours")]
        cells += [f"{figures[key]:.2f}" for key in ("ratio", "ratio_without_precompute")]
        lines.append(f"| {task} | {' | '.join(cells)} | {parts['scoring'][task]['ratio']:.2f} |")
    real = [task for task in TASKS if task in parts["steps"]] or list(parts["steps"])
    means = [np.mean([parts["steps"][task][key] for task in real]) for key in ("ratio", "ratio_without_precompute")]
    means.append(np.mean([parts["scoring"][task]["ratio"] for task in real]))
    return [*lines, f"| **mean of the tasks** | | | | {' | '.join(f'**{mean:.2f}**' for mean in means)} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, LONG_ANSWERS])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument(
        "--floor-batches", type=int, default=3, help="of each task, with one thread and processor time"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--score-pairs", type=int, default=32)
    parser.add_argument("--score-passes", type=int, default=2)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="`time` wants a quiet machine")
    parser.add_argument("--quick", action="store_true", help="3 batches and one scoring pass of 16 pairs a task")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time in place of time")
    options = parser.parse_args()
    if why_not(options):
        print(f"Skipped: {why_not(options)}.")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cpu_time:
        global clock
        clock = time.process_time
    if options.quick:
        options.batches, options.score_pairs, options.score_passes = 3, 16, 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = max((max(options.batches, options.floor_batches) + 1) * options.batch_size, options.score_pairs)
    real = [task for task in options.tasks if task != LONG_ANSWERS] or [TASKS[0]]
    pairs = [
        {**pair, "task": task}
        for task in real
        for pair in islice(read_pairs(options.data, task, "train", tokenizer, options.max_length), count)
    ]
    if options.memory_of:
        memory_of(*options.memory_of, options, options.dtypes[0], pairs)
        return
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("data", "model", "output", "dtypes", "parts")
    }
    result = {"settings": settings, "threads": torch.get_num_threads(), "torch": torch.__version__, "dtypes": {}}
    options.output.mkdir(parents=True, exist_ok=True)
    result["dtypes"] = measured_before(options.output / "speed.json", result)
    for dtype in options.dtypes:
        parts = result["dtypes"].setdefault(dtype, {"steps": {}, "scoring": {}})
        if {"time", "floor"} & set(options.parts):
            time_all(parts, options, dtype, pairs, lambda: save(result, options.output))
        if "memory" in options.parts:
            parts["memory"] = {
                work: {kind: peak_memory(kind, work, options, dtype) for kind in ("trl", "ours")} for work in WORKS
            }
        save(result, options.output)
    print(table(result))


def time_all(
    parts: dict, options: argparse.Namespace, dtype: str, pairs: list[dict], save_so_far: Callable[[], None]
) -> None:
    """Fill in steps, scoring and floors of every task in one precision."""
    trl, ours = build("trl", options, dtype, pairs), build("ours", options, dtype, pairs)
    ours.trainer.reference_unchecked = False  # made-up reference log-probs
    rows = prepared(ours, options.tasks, options.max_length)
    for task in options.tasks:
        if "time" in options.parts:
            parts["steps"][task] = time_steps(trl, ours, rows[task], options)
            parts["scoring"][task] = time_scoring(trl, ours, rows[task], options)
            print(dtype, task, json.dumps(parts["steps"][task]), json.dumps(parts["scoring"][task]), flush=True)
        if "floor" in options.parts:
            found = floor.measure(trl, ours, rows[task], options.batch_size, options.floor_batches)
            parts.setdefault("floor", {})[task] = found
            print(dtype, task, json.dumps(found), flush=True)
        save_so_far()
    # Asked of the model that ran: a setting that has no effect would go unnoticed
    parts["checkpointed"] = {
        kind: any(getattr(module, "gradient_checkpointing", False) for module in bench.model.modules())
        for kind, bench in (("trl", trl), ("ours", ours))
    }
    parts["paths"] = ours.trainer.prefix_sharing.taken


def save(result: dict, folder: Path) -> None:
    (folder / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "speed.md").write_text(table(result))


if __name__ == "__main__":
    main()
