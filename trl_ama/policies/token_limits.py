"""Whether a model has an embedding for every token and every position of its pairs.

A tokenizer may have more tokens than the model's table has rows, as long as the pairs have none of them, and nothing of the kind is
looked at before the first batch that does: there, an index is out of range, or on a GPU the whole device is lost.
"""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..common.errors import AMAError


_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ROWS = 1000  # that are looked at at a time


class TokenLimits:
    """What a model's embeddings hold.

    Args:
        model (`torch.nn.Module`): The policy, with or without an adapter; without weights, too.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase):
        base = model.get_base_model() if is_peft_model(model) else model
        self.name, self.tokenizer = base.name_or_path, tokenizer
        table = base.get_input_embeddings()
        weight = getattr(table, "weight", None)
        self.tokens = weight.shape[0] if weight is not None and weight.dim() == 2 else None  # # rows
        self.positions = _learned_positions(base, table)

    def apply(self, max_length: int | None) -> bool:
        """Whether pairs may have something that the embeddings do not hold, so that all of them have to be looked at.

        Args:
            max_length (`int`, *optional*): Where sequences are cut.
        """
        has_more = self.tokens is not None and max(self.tokenizer.get_vocab().values(), default=-1) >= self.tokens
        return has_more or (self.positions is not None and (max_length is None or max_length > self.positions))

    def check(self, pairs: Dataset, where: str, max_length: int | None) -> None:
        """Raise an `AMAError` for the first pair that the embeddings do not hold.

        Args:
            pairs (`Dataset`): As DPOTrainer tokenises them; without its columns, nothing is checked.
            where (`str`): For the message, e.g. `"the training pairs of task 'code'"`.
            max_length (`int`, *optional*): Where sequences are cut.
        """
        if any(column not in pairs.column_names for column in _COLUMNS):
            return
        lengths: set[int] = set()
        for start in range(0, len(pairs), _ROWS):
            part = pairs.select(range(start, min(start + _ROWS, len(pairs)))).select_columns(list(_COLUMNS))
            for number, row in enumerate(part.to_list(), start):
                self._check_pair(row, number, where, max_length, lengths)
        pad = self.tokenizer.pad_token_id
        if self.tokens is not None and pad is not None and pad >= self.tokens and len(lengths) > 1:
            raise AMAError(self._said(f"its pad_token {self.tokenizer.pad_token!r} has the number {pad}"))

    def _check_pair(
        self, row: dict[str, list[int]], number: int, where: str, max_length: int | None, lengths: set[int]
    ) -> None:
        highest = max(max(row[column], default=0) for column in _COLUMNS)
        if self.tokens is not None and highest >= self.tokens:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise AMAError(self._said(f"row {number} of {where} has the token {token!r} with the number {highest}"))
        for side in ("chosen_ids", "rejected_ids"):
            length = len(row["prompt_ids"]) + len(row[side])
            length = length if max_length is None else min(length, max_length)
            lengths.add(length)
            if self.positions is not None and length > self.positions:
                raise AMAError(
                    f"'{self.name}' has learned {self.positions} positions, and row {number} of {where} is {length} tokens long. Set "
                    f"max_length: {self.positions}, or less."
                )

    def _said(self, found: str) -> str:
        return (
            f"'{self.name}' has embeddings for {self.tokens} tokens, and {found}. Use the tokenizer that the model was made with, or resize "
            "the model (resize_token_embeddings) and save it."
        )


def _learned_positions(base: torch.nn.Module, table: Any) -> int | None:
    """How many positions a model has a learned embedding for; `None` if it computes them."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    # OPT and its like begin to count at 2
    sizes = (positions, positions + 2)
    learned = (module for module in base.modules() if isinstance(module, torch.nn.Embedding) and module is not table)
    return positions if any(module.num_embeddings in sizes for module in learned) else None
