"""Pairs as the tokens that DPOTrainer makes of them, without a trainer: what `ama-plan` counts and `ama-check` shows."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from .columns import list_lengths
from .errors import AMAError, first_line
from .run_settings import RunSettings
from .tasks import EXTRA_COLUMNS, PAIR_COLUMNS


def tokenise(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, settings: RunSettings, rows: Sequence[int] | None = None
) -> Dataset:
    """Pairs as `DPOTrainer` prepares them, none dropped and none cut: `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        pairs (`Dataset`): `prompt`, `chosen`, `rejected`.
        tokenizer (`PreTrainedTokenizerBase`): The base model's.
        settings ([`RunSettings`]): The recipe.
        rows (`Sequence[int]`, *optional*): The pairs' numbers, for messages; from 0 on by default.

    Raises:
        AMAError: If a pair cannot be tokenised, with the first such row: a chat template is a program, which fails in its
            own ways.
    """
    columns = [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS) if name in pairs.column_names]
    pairs = pairs.select_columns(columns)
    # In memory, so that nothing of a sample is left in the cache of `datasets`
    held = Dataset.from_list(pairs.to_list(), features=pairs.features)
    # Its own method, of which the trainer itself is only asked for the end-of-sequence token: no model is needed
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = settings.with_arguments(max_length=None, dataset_num_proc=None)

    def prepare(part: Dataset) -> Dataset:
        return DPOTrainer._prepare_dataset(trainer, part, tokenizer, args, "sampled")

    try:
        return prepare(held)
    except Exception as error:
        row, error = _first_failure(prepare, held, error)
        raise AMAError(
            f"Row {row if rows is None else rows[row]} cannot be tokenised ({type(error).__name__}: {first_line(error)}). Mend the "
            f"row, or use a model whose chat template takes it ('{tokenizer.name_or_path}' is asked)."
        ) from error


def _first_failure(prepare, pairs: Dataset, error: Exception) -> tuple[int, Exception]:
    """The number of the first pair that fails, and its error: by halves, as each call takes its time."""
    start, end = 0, len(pairs)
    while end - start > 1:
        middle = (start + end) // 2
        try:
            prepare(pairs.select(range(start, middle)))
            start = middle
        except Exception as found:
            end, error = middle, found
    return start, error


def token_counts(tokenised: Dataset) -> np.ndarray:
    """Tokens of each pair's prompt, chosen and rejected answer. # (N, 3)"""
    return np.stack([list_lengths(tokenised, f"{column}_ids").astype(np.int64) for column in PAIR_COLUMNS], axis=1)
