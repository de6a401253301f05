"""What stands in for a model where it is only called."""

from typing import Any

import torch

from .collating import ReadyPairs
from .forward import packed_forward
from .proof import RandomState


CALL = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}  # what DPOTrainer gives a text model


class SharedForward:
    """Forwards calls to the model, on the path that a [`PrefixSharing`] chooses."""

    def __init__(self, sharing: Any, model: torch.nn.Module, metrics: bool, ready: ReadyPairs | None = None):
        self._sharing, self._model, self._metrics, self._ready = sharing, model, metrics, ready

    def __call__(self, *args, **kwargs):
        use = "policy" if self._metrics else "reference"
        pairs = None if args else self._sharing.pack(self._model, kwargs, use, self._ready)
        is_new = self._metrics and self._model.training and not self._sharing.knows_draws(self._model)
        before = RandomState(next(self._model.parameters()).device) if is_new else None
        if pairs is None:
            outputs = self._model(*args, **kwargs)
        else:
            outputs = packed_forward(self._model, pairs, self._metrics, use_cache=False)
        if is_new:
            self._sharing.note_draws(self._model, RandomState(next(self._model.parameters()).device) != before)
        return outputs
