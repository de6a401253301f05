"""Pairs as the tokens that DPOTrainer makes of them, without a trainer: what `ama-plan` counts and `ama-check` shows."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOTrainer

from ..common.arrays import list_lengths
from ..common.errors import AMAError, first_line
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS
from ..tasks.image_tokens import check_takes_images, image_pair_ids
from ..tasks.images import has_images
from ..tasks.rows import first_failure
from .config import AMAConfig


PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# In which respect chosen and rejected are the same, the first that holds
SAME_TEXT, SAME_TOKENS, SAME_AFTER_CUT = "same_text", "same_tokens", "same_after_cut"


def tokenise(
    pairs: Dataset,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    args: AMAConfig,
    rows: Sequence[int] | None = None,
) -> Dataset:
    """Pairs as `DPOTrainer` prepares them, none dropped and none cut: `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        pairs (`Dataset`): `prompt`, `chosen`, `rejected`, and what else travels with a pair.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): The base model's.
        args ([`AMAConfig`]): The recipe's training arguments.
        rows (`Sequence[int]`, *optional*): The pairs' numbers, for messages; from 0 on by default.

    Raises:
        AMAError: If a pair cannot be tokenised, with the first such row: a chat template is a program, which fails in its
            own ways.
    """
    if has_images(pairs):
        check_takes_images(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    columns = [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS) if name in pairs.column_names]
    pairs = pairs.select_columns(columns)
    # In memory, so that nothing of a sample is left in the cache of `datasets`
    held = pairs if has_images(pairs) else Dataset.from_list(pairs.to_list(), features=pairs.features)
    # Its own method, of which the trainer itself is only asked for the end-of-sequence token: no model is needed
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = replace(args, max_length=None, dataset_num_proc=None)

    def prepare(part: Dataset) -> Dataset:
        if has_images(part):  # which DPOTrainer does not prepare
            return Dataset.from_list([image_pair_ids(processor, row) for row in part])
        return DPOTrainer._prepare_dataset(trainer, part, processor, args, "sampled")

    try:
        return prepare(held)
    except Exception as error:
        row, error = first_failure(prepare, held, error)
        raise AMAError(
            f"Row {row if rows is None else rows[row]} cannot be tokenised ({type(error).__name__}: {first_line(error)}). Mend the "
            f"row, or use a model whose chat template takes it ('{tokenizer.name_or_path}' is asked)."
        ) from error


def token_counts(tokenised: Dataset) -> np.ndarray:
    """Tokens of each pair's prompt, chosen and rejected answer. # (N, 3)"""
    return np.stack([list_lengths(tokenised, f"{column}_ids").astype(np.int64) for column in PAIR_COLUMNS], axis=1)


def equal_answers(tokenised: Dataset, pairs: Iterable[dict[str, Any]], args: AMAConfig) -> list[str | None]:
    """For each pair, in which respect a model cannot tell its answers apart, so that it sends no gradient; `None` if it can.

    Args:
        tokenised (`Dataset`): As [`~trl_ama.dpo.tokens.tokenise`] returns it.
        pairs (`Iterable[dict]`): The same pairs before that.
        args ([`AMAConfig`]): `max_length` and `truncation_mode`.
    """
    kinds: list[str | None] = []
    for row, pair in zip(tokenised.select_columns(list(PAIR_IDS)), pairs, strict=True):
        if row["chosen_ids"] == row["rejected_ids"]:
            kinds.append(SAME_TEXT if pair["chosen"] == pair["rejected"] else SAME_TOKENS)
        else:
            kinds.append(SAME_AFTER_CUT if _cut(row, "chosen_ids", args) == _cut(row, "rejected_ids", args) else None)
    return kinds


def _cut(row: dict[str, list[int]], side: str, args: AMAConfig) -> tuple[list[int], int]:
    """The sequence as DPOTrainer's collator cuts it, and how many of its tokens belong to the answer."""
    prompt, answer = row["prompt_ids"], row[side]
    ids, limit = prompt + answer, args.max_length
    if limit is None or len(ids) <= limit:
        return ids, len(answer)
    if args.truncation_mode == "keep_start":
        return ids[:limit], max(0, limit - len(prompt))
    return ids[-limit:], min(limit, len(answer))
