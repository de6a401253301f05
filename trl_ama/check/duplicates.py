"""Pairs that occur twice, contradict each other, or are both in training and held out.

Every pair is looked at, not a sample: in a sample of a tenth, one of a hundred duplicates would be left. All that is kept in
memory is 24 bytes a pair.
"""

import hashlib
from typing import Any

import numpy as np
from datasets import Dataset

from ..tasks.forms import PAIR_COLUMNS
from ..tasks.images import content_of, has_images, stored_images
from .mistakes import text_of


_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def text_hashes(dataset: Dataset) -> np.ndarray:
    """A number for each pair's prompt (with its images), chosen and rejected text, equal where the words are. # (N, 3)"""
    hashes = np.empty((len(dataset), len(PAIR_COLUMNS)), dtype=np.uint64)
    row = 0
    for batch in dataset.select_columns(list(PAIR_COLUMNS)).iter(batch_size=1000):
        for column, name in enumerate(PAIR_COLUMNS):
            for offset, side in enumerate(batch[name]):
                words = " ".join(text_of(side).split())
                digest = hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=8).digest()
                hashes[row + offset, column] = int.from_bytes(digest, "little")
        row += len(batch["prompt"])
    return hashes if not has_images(dataset) else _with_images(hashes, dataset)


def _with_images(hashes: np.ndarray, dataset: Dataset) -> np.ndarray:
    """The same question about another image is another one: its file, as it is stored, counts in the prompt's number."""
    for row, images in enumerate(stored_images(dataset)):
        if images:
            digest = hashlib.blake2b(b"".join(map(content_of, images)), digest_size=8).digest()
            hashes[row, 0] ^= np.uint64(int.from_bytes(digest, "little"))
    return hashes


def _pairs(hashes: np.ndarray, swapped: bool = False) -> np.ndarray:
    """One number for each pair, or for the pair with its answers exchanged. # (N,)"""
    order = [0, 2, 1] if swapped else [0, 1, 2]
    return (hashes[:, order] * _FACTORS).sum(axis=1, dtype=np.uint64)


def duplicates(hashes: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Count, for each task, what occurs more than once.

    Args:
        hashes (`dict`): Task → split (`train` and, if any, `test`) → what [`text_hashes`] returns.

    Returns:
        Task → `pairs`, `held_out_pairs` (how many there are), `same_answers` (chosen is rejected), `repeated_pairs` and
        `repeated_prompts` (beyond the first, within the task), `contradictions` (the same answers the other way round, within
        the task or in another), `held_out_in_training` and `held_out_prompts_in_training` (held-out pairs that any task trains
        on), `shared_pairs` and `contradicted_by` (other task → how many of this one's training pairs it has, and has
        the other way round).
    """
    train = {task: splits["train"] for task, splits in hashes.items()}
    codes = {task: _pairs(part) for task, part in train.items()}
    # Pairs whose answers are the same are their own contradiction
    decided = {task: part[:, 1] != part[:, 2] for task, part in train.items()}
    every_pair = np.unique(np.concatenate(list(codes.values())))
    every_prompt = np.unique(np.concatenate([part[:, 0] for part in train.values()]))
    result = {}
    for task, splits in hashes.items():
        mine, swapped = codes[task], _pairs(train[task], swapped=True)
        others = [other for other in hashes if other != task]
        swapped = swapped[decided[task]]
        counts: dict[str, Any] = {
            "pairs": len(mine),
            "same_answers": int((~decided[task]).sum()),
            "repeated_pairs": len(mine) - len(np.unique(mine)),
            "repeated_prompts": len(mine) - len(np.unique(train[task][:, 0])),
            "contradictions": int(np.isin(swapped, every_pair).sum()),
            "shared_pairs": {other: int(np.isin(mine, codes[other]).sum()) for other in others},
            "contradicted_by": {other: int(np.isin(swapped, codes[other]).sum()) for other in others},
        }
        if "test" in splits:
            test = splits["test"]
            counts |= {
                "held_out_pairs": len(test),
                "held_out_in_training": int(np.isin(_pairs(test), every_pair).sum()),
                "held_out_prompts_in_training": int(np.isin(test[:, 0], every_prompt).sum()),
            }
        for name in ("shared_pairs", "contradicted_by"):
            counts[name] = {other: count for other, count in counts[name].items() if count}
        result[task] = counts
    return result
