"""Preference pairs with rules that a tiny model learns."""

import json
from itertools import cycle

import numpy as np
from datasets import Dataset


WORDS = (
    "apple bread cloud dance earth flame grape house input jelly knife lemon mango night ocean piano quiet river"
).split()


def make_rows(task: str, count: int, seed: int) -> list[dict]:
    """Conversational preference pairs; each task's rule can be told from the first word of the prompt.

    `list` prefers the words as given over shuffled ones, `sort` prefers them sorted over as given, `brief` prefers the
    first word alone over all.
    """
    rng = np.random.default_rng([seed, sum(map(ord, task))])
    rows = []
    while len(rows) < count:
        words = [str(word) for word in rng.choice(WORDS, size=int(rng.integers(3, 6)), replace=False)]
        shuffled = [str(word) for word in rng.permutation(words)]
        if words == sorted(words) or words == shuffled:
            continue
        chosen, rejected = {
            "list": (words, shuffled),
            "sort": (sorted(words), words),
            "brief": (words[:1], words),
        }[task]
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join([task, *words])}],
                "chosen": [{"role": "assistant", "content": " ".join(chosen)}],
                "rejected": [{"role": "assistant", "content": " ".join(rejected)}],
            }
        )
    return rows


def make_dataset(sizes: dict[str, int], seed: int = 0, labelled: bool = True):
    """A dataset with a `task` column: `sizes` pairs of each task."""

    rows = [{**row, "task": task} for task, size in sizes.items() for row in make_rows(task, size, seed)]
    dataset = Dataset.from_list(rows)
    return dataset if labelled else dataset.remove_columns("task")


def with_reference_columns(dataset, seed=0):
    """Made-up log-probs: enough to give every task its own excess."""
    rng = np.random.default_rng(seed)
    count = len(dataset)
    values = {
        "ref_chosen_logps": -20 + rng.normal(size=count),
        "ref_rejected_logps": -20 + rng.normal(size=count),
        "specialist_chosen_logps": -19 + rng.normal(size=count),
        "specialist_rejected_logps": -21 + rng.normal(size=count),
    }
    for name, column in values.items():
        dataset = dataset.add_column(name, column.astype(np.float32))
    return dataset


def write_pairs(folder, tasks, train, test):
    """Files with so many pairs of each task."""
    for number, (task, kind) in enumerate(zip(tasks, cycle(("list", "sort", "brief")), strict=False)):
        for split, count in (("train", train), ("test", test)):
            rows = make_rows(kind, count, seed=count + number)
            (folder / f"{task}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
