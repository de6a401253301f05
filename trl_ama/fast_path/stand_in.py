"""What stands in for a model where it is only called."""

from typing import Any

import torch

from .forward import packed_forward
from .proof import RandomState


class SharedForward:
    """Forwards calls to the model, on the fast path where the `PrefixSharing` that it is given chooses it."""

    def __init__(self, sharing: Any, model: torch.nn.Module, metrics: bool):
        self._sharing, self._model, self._metrics = sharing, model, metrics

    def __call__(self, *args, **kwargs):
        pairs = None if args else self._sharing.pack(self._model, kwargs, "policy" if self._metrics else "reference")
        is_new = self._metrics and self._model.training and not self._sharing.knows_draws(self._model)
        before = RandomState(next(self._model.parameters()).device) if is_new else None
        if pairs is None:
            outputs = self._model(*args, **kwargs)
        else:
            outputs = packed_forward(self._model, pairs, self._metrics, use_cache=False)
        if is_new:
            self._sharing.note_draws(self._model, RandomState(next(self._model.parameters()).device) != before)
        return outputs
