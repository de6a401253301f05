"""Pairs about images as the tokens that `DPOTrainer` makes of them, batch by batch, in its collator."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from ..common.errors import AMAError


_BATCH = ("input_ids", "attention_mask", "completion_mask")


def check_takes_images(processor: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Raise an `AMAError` if a model has no processor, and so takes text alone."""
    if not isinstance(processor, ProcessorMixin):
        raise AMAError(
            f"There are pairs with images, and the base model '{processor.name_or_path}' has no processor for them: it takes text "
            "alone. Choose a vision-language model, or leave the images out with `columns: [prompt, chosen, rejected]`."
        )


def image_pair_ids(processor: ProcessorMixin, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """A pair's `prompt_ids`, with a token for every patch of its images, `chosen_ids` and `rejected_ids`; nothing is cut."""
    batch = DataCollatorForVisionPreference(processor)([dict(row)])
    ids, read, answers = (batch[name].bool() if "mask" in name else batch[name] for name in _BATCH)
    return {
        "prompt_ids": ids[0][read[0] & ~answers[0]].tolist(),
        "chosen_ids": ids[0][answers[0]].tolist(),
        "rejected_ids": ids[1][answers[1]].tolist(),
    }
