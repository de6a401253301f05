"""How many tokens the pairs of a run have: counted by the recipe's tokenizer, or assumed where the data cannot be had."""

import zlib
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .errors import AMAError, first_line
from .run_settings import RunSettings
from .task_loading import _tokens


SAMPLE = 2000  # pairs of a task and split that are counted; beyond, a longer one may be among those that are not
_HALF = 2  # an assumed pair's prompt fills so much of max_length, its answers the rest


@dataclass
class Lengths:
    """Tokens of the pairs of one task and split as they reach the model.

    Args:
        pairs (`np.ndarray`): Prompt, chosen and rejected answer of those that were counted, cut to `max_length`. # (n, 3)
        count (`int`, *optional*): How many pairs there are; `None` if unknown.
        assumed (`bool`): Whether the lengths were not counted.
    """

    pairs: np.ndarray
    count: int | None
    assumed: bool = False

    @property
    def longest(self) -> np.ndarray:
        """Tokens of each pair's longer sequence. # (n,)"""
        return self.pairs[:, 0] + self.pairs[:, 1:].max(axis=1)

    @property
    def packed(self) -> np.ndarray:
        """Tokens of each pair in a packed row. # (n,)"""
        return self.pairs.sum(axis=1)

    def padded_mean(self, batch_size: int) -> float:
        """Mean length of the rows of padded batches that are drawn at random."""
        longest = np.random.default_rng(0).permutation(self.longest)
        whole = longest[: len(longest) // batch_size * batch_size].reshape(-1, batch_size)
        return float(whole.max(axis=1).mean()) if len(whole) else float(longest.max())


def count_lengths(settings: RunSettings, max_length: int | None) -> tuple[dict[str, dict[str, Lengths]], list[str]]:
    """Lengths of all tasks, split → task → lengths, and what to tell the user about them.

    Raises:
        AMAError: If the tokenizer cannot be read, or a chat template cannot render a pair.
    """
    tokenizer = settings.tokenizer
    try:
        data, notes = settings.data, []
    except AMAError as error:
        if max_length is None:
            raise
        prompt = max_length // _HALF
        pairs = np.array([[prompt, max_length - prompt, max_length - prompt]])
        counts = {"train": settings.task_args.max_train_pairs, "test": settings.task_args.max_eval_pairs}
        assumed = {
            split: {task: Lengths(pairs, count, assumed=True) for task in settings.task_names}
            for split, count in counts.items()
        }
        return assumed, [
            f"The data cannot be loaded, so every pair is taken to fill max_length ({max_length}), half of it with the prompt: "
            f"{first_line(error)}"
        ]
    lengths: dict[str, dict[str, Lengths]] = {split: {} for split in data}
    sampled, dropped = [], 0
    for split in data:
        for task in settings.task_names:
            rows = settings.pairs_of(task, split)
            if rows is None:
                continue
            counted = token_lengths(tokenizer, _sample(rows, task))
            kept = cut(counted, max_length)
            if len(rows) > SAMPLE:
                sampled.append(task)
            count = round(len(rows) * len(kept) / len(counted))
            dropped += len(rows) - count
            if len(kept):
                lengths[split][task] = Lengths(kept, count)
    if sampled:
        names = ", ".join(dict.fromkeys(sampled))
        notes.append(f"Lengths are those of {SAMPLE:,} pairs drawn of each larger task ({names}).")
    if dropped:
        notes.append(f"About {dropped:,} pairs are not counted: DPOTrainer drops those whose prompts fill max_length.")
    if not lengths["train"]:
        raise AMAError(
            f"The prompts of all training pairs fill max_length ({max_length}) alone. Raise max_length, or choose other data."
        )
    return lengths, notes


def _sample(rows: Dataset, task: str) -> Dataset:
    return rows.shuffle(seed=zlib.crc32(task.encode())).select(range(SAMPLE)) if len(rows) > SAMPLE else rows


def token_lengths(tokenizer, rows: Dataset) -> np.ndarray:
    """Tokens of prompt, chosen and rejected answer of each pair, as DPOTrainer renders it. # (n, 3)"""
    result = np.zeros((len(rows), 3), dtype=np.int64)
    for index, row in enumerate(rows):
        prompt = _tokens(tokenizer, row, row["prompt"], is_prompt=True)
        whole = [_tokens(tokenizer, row, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        result[index] = prompt, *(max(1, total - prompt) for total in whole)
    return result


def cut(pairs: np.ndarray, max_length: int | None) -> np.ndarray:
    """What `max_length` leaves: answers are cut at the end, and pairs whose prompts fill it are dropped. # (n, 3) -> (m, 3)"""
    if max_length is None:
        return pairs
    kept = pairs[pairs[:, 0] < max_length].copy()
    kept[:, 1:] = np.minimum(kept[:, 1:], max_length - kept[:, :1])
    return kept


def largest_batch(parts: list[Lengths], size: int) -> list[tuple[int, int, int]]:
    """The `size` pairs with the most tokens, of several tasks; fewer if there are no more."""
    pairs = np.concatenate([part.pairs for part in parts])
    if all(part.assumed for part in parts):
        pairs = np.repeat(pairs[:1], size, axis=0)
    order = np.argsort(pairs.sum(axis=1), kind="stable")[::-1][:size]
    return [tuple(map(int, pairs[row])) for row in order]


def scoring_batch(parts: list[Lengths], size: int, packed: bool) -> list[tuple[int, int, int]]:
    """The first and largest batch of a sweep; see `_Sweep.batches` in scoring.py: as many pairs as hold no more tokens, packed,
    than the `size` longest have, padded."""
    longest = max(int(part.longest.max()) for part in parts)
    budget = 2 * size * longest
    if not packed:
        return largest_batch(parts, size)
    batch, total = [], 0
    for pair in largest_batch(parts, max(size, budget // 2)):
        if batch and total + sum(pair) > budget:
            break
        batch.append(pair)
        total += sum(pair)
    return batch
