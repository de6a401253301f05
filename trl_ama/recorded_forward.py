"""What `DPOTrainer` saw when it computed a loss: the policy's outputs, with their graph, and the log-probs in them."""

from typing import Any

import torch

from .preference_losses import PairLogProbs, sequence_logps


class RecordedForward:
    """Forwards calls to the model and keeps the outputs of the first, with their graph.

    `DPOTrainer` only ever calls the model that its loss is given, so this stands in for it.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self.outputs = None

    def __call__(self, *args, **kwargs):
        outputs = self._model(*args, **kwargs)
        if self.outputs is None:
            self.outputs = outputs
        return outputs

    def log_probs(self, inputs: dict[str, Any], ld_alpha: float | None) -> PairLogProbs:
        """Policy and reference on a batch that carries the reference's log-probs. # (B,) each"""
        mask = inputs["completion_mask"]
        policy = sequence_logps(self.outputs.log_probs, mask, ld_alpha)
        return PairLogProbs(
            *policy, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *mask.sum(dim=1).chunk(2)
        )
