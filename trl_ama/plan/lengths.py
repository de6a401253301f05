"""How many tokens the pairs of a run have: counted by the recipe's tokenizer, or assumed where the data cannot be had."""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ..common.errors import AMAError, sentence
from ..dpo.tokens import token_counts, tokenise
from ..fast_path.packing import WORTH_SHARING
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..tasks.images import has_images


SAMPLE = 2000  # pairs of a task and split that are counted; beyond, a longer one may be among those that are not
_HALF = 2  # an assumed pair's prompt fills so much of max_length, its answers the rest
Pair = tuple[int, int, int]  # tokens of prompt, chosen and rejected answer


@dataclass(frozen=True)
class Lengths:
    """Tokens of the pairs of one task and split.

    Args:
        pairs (`np.ndarray`): Prompt, chosen and rejected answer of those that were counted. # (n, 3)
        count (`int`, *optional*): How many pairs there are; `None` if unknown.
        beginning (`tuple[int, ...]`): The tokens that all prompts begin with, such as a template's system prompt.
        assumed (`bool`): Whether the lengths were not counted.
    """

    pairs: np.ndarray
    count: int | None
    beginning: tuple[int, ...] = ()
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

    def cut(self, max_length: int | None, mode: str = "keep_start") -> "Lengths":
        """What reaches the model; without pairs if `max_length` leaves none.

        `keep_start` cuts answers at the end, and pairs whose prompts fill `max_length` are dropped. `keep_end` cuts prompts at the
        beginning, each answer's by its own length, so that a pair that is cut has nothing that its sequences share.
        """
        if max_length is None:
            return self
        if self.assumed:
            return assumed(max_length, self.count)
        prompt, answers = self.pairs[:, :1], self.pairs[:, 1:]
        if mode == "keep_end":
            over = self.longest > max_length
            apart = np.concatenate([np.zeros_like(prompt), np.minimum(prompt + answers, max_length)], axis=1)
            pairs = np.where(over[:, None], apart, self.pairs)
            return replace(self, pairs=pairs, beginning=() if over.any() else self.beginning)
        kept = self.pairs[:, 0] < max_length
        pairs = np.concatenate([prompt, np.minimum(answers, max_length - prompt)], axis=1)[kept]
        count = None if self.count is None else round(self.count * len(pairs) / len(self.pairs))
        return replace(self, pairs=pairs, count=count)


def assumed(max_length: int, count: int | None) -> Lengths:
    """Pairs that nobody has seen: all fill `max_length`."""
    prompt = max_length // _HALF
    return Lengths(np.array([[prompt, max_length - prompt, max_length - prompt]]), count, assumed=True)


def count_lengths(
    recipe: Recipe, inputs: RunInputs, max_length: int | None
) -> tuple[dict[str, dict[str, Lengths]], list[str]]:
    """Lengths of all tasks before anything is cut, split → task → lengths, and what to tell the user about them.

    Raises:
        AMAError: If the tokenizer cannot be read, or a pair cannot be tokenised or has images.
    """
    processor = inputs.processor
    try:
        data = inputs.data
    except AMAError as error:
        if max_length is None:
            raise
        counts = {"train": recipe.task_args.max_train_pairs, "test": recipe.task_args.max_eval_pairs}
        parts = {
            split: {task: assumed(max_length, count) for task in recipe.task_names} for split, count in counts.items()
        }
        unknown = (
            ""
            if counts["train"]
            else " How many pairs there are is unknown, too (max_train_pairs says at most how many)."
        )
        return parts, [
            f"The data cannot be loaded, so every pair is taken to fill max_length ({max_length} tokens), half of it with the "
            f"prompt.{unknown} {error} (`trl ama-check` looks at every task's data.)"
        ]
    if any(map(has_images, data.values())):
        raise AMAError(
            "The pairs have images, and what these need of memory and time is not planned. Try a few steps instead, e.g. with "
            "`max_steps: 3`."
        )
    lengths: dict[str, dict[str, Lengths]] = {split: {} for split in data}
    sampled = []
    for split in data:
        for task in recipe.task_names:
            rows = inputs.pairs_of(task, split)
            if rows is None:
                continue
            if len(rows) > SAMPLE:
                sampled.append(task)
            try:
                tokenised = tokenise(_sample(rows, task), processor, recipe.training_args)
            except AMAError as error:
                raise AMAError(f"Task '{task}', {split} pairs: {sentence(error)}") from error
            beginning = os.path.commonprefix(tokenised["prompt_ids"][:])
            lengths[split][task] = Lengths(token_counts(tokenised), len(rows), tuple(beginning))
    notes = []
    if sampled:
        names = ", ".join(dict.fromkeys(sampled))
        notes.append(
            f"Lengths are those of {SAMPLE:,} pairs drawn of each larger task ({names}); a longer pair may be among the others."
        )
    return lengths, notes


def _sample(rows: Dataset, task: str) -> Dataset:
    return rows.shuffle(seed=zlib.crc32(task.encode())).select(range(SAMPLE)) if len(rows) > SAMPLE else rows


def common_beginning(parts: Iterable[Lengths]) -> int:
    """How many tokens a packed row of these tasks' pairs has once for all: a lower bound, as a batch may share more."""
    common = len(os.path.commonprefix([part.beginning for part in parts]))
    return common if common >= WORTH_SHARING else 0


def _of_several(parts: list[Lengths], packed: bool, size: int) -> np.ndarray:
    """The pairs of several tasks, those first that take the most memory. # (n, 3)"""
    pairs = np.concatenate([part.pairs for part in parts])
    if all(part.assumed for part in parts):
        return np.repeat(pairs[:1], size, axis=0)
    total, longest = pairs.sum(axis=1), pairs[:, 0] + pairs[:, 1:].max(axis=1)
    return pairs[np.lexsort((longest, total) if packed else (total, longest))[::-1]]


def largest_batch(parts: list[Lengths], size: int, packed: bool = True) -> list[Pair]:
    """The `size` pairs of several tasks with the most tokens, packed or padded; fewer if there are no more."""
    return [tuple(map(int, pair)) for pair in _of_several(parts, packed, size)[:size]]


def scoring_batch(parts: list[Lengths], size: int, packed: bool) -> list[Pair]:
    """The first and largest batch of a sweep; see `Sweep.batches` in dpo/sweep.py: longest first, as many pairs as hold no more
    tokens, packed, than the `size` longest have, padded."""
    longest = max(int(part.longest.max()) for part in parts)
    budget = 2 * size * longest
    if not packed:
        return largest_batch(parts, size, packed=False)
    pairs = _of_several(parts, False, budget // 2)
    count = max(1, int(np.searchsorted(pairs.sum(axis=1).cumsum(), budget, side="right")))
    return [tuple(map(int, pair)) for pair in pairs[:count]]
