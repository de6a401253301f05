"""Real material of the benchmarks: a model and a folder of preference pairs, from the command line or the environment."""

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


TASKS = ("helpful", "harmless", "honesty", "coding")
MODEL, DATA = "TRL_AMA_BENCH_MODEL", "TRL_AMA_BENCH_DATA"
ANSWERS = ("chosen", "rejected")


def add_material(parser: argparse.ArgumentParser) -> None:
    """The options `--model` and `--data`."""
    parser.add_argument("--model", default=os.environ.get(MODEL), help=f"folder or Hub id; ${MODEL} by default")
    data = os.environ.get(DATA)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(data) if data else None,
        help=f"folder of <task>_train.jsonl and <task>_test.jsonl (or .gz) for {', '.join(TASKS)}; ${DATA} by default",
    )


def why_not(options: argparse.Namespace) -> str | None:
    """Why a benchmark of a real model on real pairs cannot run; `None` if it can."""
    if not options.model:
        return f"no model: pass --model, or set {MODEL} (e.g. HuggingFaceTB/SmolLM2-135M-Instruct)"
    if options.data is None or not options.data.is_dir():
        return f"no pairs: pass --data, or set {DATA} to a folder of <task>_train.jsonl and <task>_test.jsonl (or .gz)"
    return None


def read_rows(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of a task's file, in their order."""
    name = f"{task}_{split}.jsonl"
    path = next((folder / entry for entry in (name, f"{name}.gz") if (folder / entry).exists()), None)
    if path is None:
        raise SystemExit(f"There is no {name} (or .gz) in '{folder}'.")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_pairs(folder: Path, task: str, split: str, tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
    """The pairs of a file that `max_length` tokens hold whole, in a fixed random order."""
    rows = read_rows(folder, task, split)
    for index in np.random.default_rng(0).permutation(len(rows)):
        row = rows[index]
        texts = (tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False) for key in ANSWERS)
        if all(len(tokenizer(text)["input_ids"]) <= max_length for text in texts):
            yield {key: row[key] for key in ("prompt", *ANSWERS)}


def measured_before(path: Path, result: dict[str, Any], key: str = "dtypes") -> dict[str, Any]:
    """The parts, under `key`, of a result that was written before with the same settings."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(before.get(name) == value for name, value in result.items() if name != key)
    return before.get(key, {}) if same else {}
