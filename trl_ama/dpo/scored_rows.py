"""What of prepared pairs a sweep over them runs on, and how much that is."""

import numpy as np
from datasets import Dataset

from ..common.arrays import list_lengths
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS
from ..tasks.images import has_images


_INPUTS = ("prompt_ids", "chosen_ids", "rejected_ids")


def count_tokens(dataset: Dataset, max_length: int | None) -> int:
    """Tokens that pass through a model when a dataset is scored on the fast path, for a bar over several sweeps.

    Of pairs with images, which are tokenised batch by batch, sequences instead.
    """
    return int(sequence_lengths(dataset, max_length)[1].sum())


def scored_columns(dataset: Dataset) -> list[str]:
    """The columns of prepared pairs from which log-probs are computed."""
    if not has_images(dataset):
        return list(_INPUTS)
    return [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS) if name in dataset.column_names]


def unit_of(dataset: Dataset) -> str:
    """What [`count_tokens`] counts, for a bar."""
    return "seq" if has_images(dataset) else "tok"


def sequence_lengths(dataset: Dataset, max_length: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each pair's longer sequence, and of prompt and both answers. # (N,), (N,)

    As if every sequence were one token if the pairs have images, which say how many tokens they are when they are processed.
    """
    if has_images(dataset):
        return np.ones(len(dataset), dtype=np.int64), np.full(len(dataset), 2, dtype=np.int64)
    prompt, chosen, rejected = (list_lengths(dataset, name).astype(np.int64) for name in _INPUTS)
    longest = np.minimum(prompt + np.maximum(chosen, rejected), max_length or np.iinfo(np.int64).max)
    return longest, np.minimum(prompt + chosen + rejected, 2 * longest)
