"""Pairs about images as the tokens that `DPOTrainer` makes of them, batch by batch, in its collator."""

from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference


def image_pair_ids(processor: ProcessorMixin, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """A pair's `prompt_ids`, with a token for every patch of its images as the processor makes them, `chosen_ids` and
    `rejected_ids`.
    """
    batch = DataCollatorForVisionPreference(processor)([dict(row)])
    ids, read, answers = (batch[name].bool() if "mask" in name else batch[name] for name in _BATCH)
    return {
        "prompt_ids": ids[0][read[0] & ~answers[0]].tolist(),
        "chosen_ids": ids[0][answers[0]].tolist(),
        "rejected_ids": ids[1][answers[1]].tolist(),
    }


_BATCH = ("input_ids", "attention_mask", "completion_mask")
