"""What stands in for a model where it is only called."""

from typing import TYPE_CHECKING

import torch

from .collating import ReadyPairs
from .forward import packed_forward
from .proof import RandomState


if TYPE_CHECKING:
    from .choice import PrefixSharing


class SharedForward:
    """Forwards calls to the model, on the fast path where it is exact."""

    def __init__(
        self, sharing: "PrefixSharing", model: torch.nn.Module, metrics: bool, ready: ReadyPairs | None = None
    ):
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
