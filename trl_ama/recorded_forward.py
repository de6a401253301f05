"""What `DPOTrainer` saw when it computed a loss: the policy's outputs, with their graph, and the log-probs in them."""

from collections.abc import Callable
from typing import Any

from .preference_losses import PairLogProbs, sequence_logps


class RecordedForward:
    """Forwards calls to the model and keeps the outputs of the first, with their graph.

    `DPOTrainer` only ever calls the model that its loss is given, so this stands in for it.

    Args:
        model (`Callable`): What is called.
        then (`Callable`, *optional*): What to do when the first call is done.
    """

    def __init__(self, model: Callable, then: Callable[[], None] | None = None):
        self._model, self._then = model, then
        self.outputs = None

    def __call__(self, *args, **kwargs):
        outputs = self._model(*args, **kwargs)
        if self.outputs is None:
            self.outputs = outputs
            if self._then is not None:
                self._then()
        return outputs

    def log_probs(self, inputs: dict[str, Any], ld_alpha: float | None) -> PairLogProbs:
        """Policy and reference on a batch that carries the reference's log-probs. # (B,) each"""
        mask = inputs["completion_mask"]
        policy = sequence_logps(self.outputs.log_probs, mask, ld_alpha)
        return PairLogProbs(
            *policy, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *mask.sum(dim=1).chunk(2)
        )
