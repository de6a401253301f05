"""A stand-in for a model where it is only called: on the fast path where that is exact, and in two passes where that is cheaper."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from .collating import ReadyPairs
from .forward import packed_forward
from .kept_layers import KeptLayers
from .packing import PackedPairs
from .proof import RandomState


CALL = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}  # what DPOTrainer gives a text model


class SharedForward:
    """Forwards calls to the model, on the path that a [`PrefixSharing`] chooses.

    Attributes:
        graph (`bool`): Whether the last call's outputs have their graph. Without, a batch of anything but tokens and a model that
            draws random numbers have it nevertheless: a second pass would not be the same.
    """

    def __init__(
        self, sharing: Any, model: torch.nn.Module, metrics: bool, ready: ReadyPairs | None = None, graph: bool = True
    ):
        self._sharing, self._model, self._metrics, self._ready = sharing, model, metrics, ready
        self.graph = graph
        self._pairs: PackedPairs | None = None
        self._layers: KeptLayers | None = None
        self._call: dict[str, Any] = {}

    def __call__(self, *args, **kwargs):
        self._call = kwargs
        use = "policy" if self._metrics else "reference"
        self._pairs = pairs = None if args else self._sharing.pack(self._model, kwargs, use, self._ready)
        if args or any(kwargs[name] is not None and kwargs[name] is not False for name in kwargs.keys() - CALL):
            self.graph = True
        is_new = self._metrics and self._model.training and not self._sharing.knows_draws(self._model)
        before = RandomState(next(self._model.parameters()).device) if is_new else None
        outputs = self._first(pairs, args, kwargs)
        if is_new:
            drew = RandomState(next(self._model.parameters()).device) != before
            self._sharing.note_draws(self._model, drew)
            if drew and not self.graph:
                before.restore()
                self.graph, self._layers = True, None
                outputs = self._first(pairs, args, kwargs)
        return outputs

    def _first(self, pairs: PackedPairs | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.graph:
            return self._run(pairs, args, kwargs, self._metrics)
        # DDP is told of each weight's gradient by the graph, and knows nothing of a graph within
        self._layers = KeptLayers(self._model) if PartialState().num_processes == 1 else None
        with _no_graph(), self._layers.keep() if self._layers else contextlib.nullcontext():
            return self._run(pairs, args, kwargs, self._metrics)

    def _run(self, pairs: PackedPairs | None, args: tuple, kwargs: dict[str, Any], metrics: bool) -> Any:
        if pairs is None:
            return self._model(*args, **kwargs)
        return packed_forward(self._model, pairs, metrics, use_cache=False)

    def again(self, keep: Tensor) -> Any:
        """Run some pairs of the last call once more, on the same path and with their graph, for their log-probs.

        Args:
            keep (`torch.Tensor`): Which, at least one. # (B,) bool

        Returns:
            The outputs of those pairs' rows. # (2b, L-1) each
        """
        self.graph = True
        if self._pairs is not None:
            tokens = self._pairs.tokens_of(keep)
            with self._from_first(lambda hidden: hidden[:, tokens.to(hidden.device)]):  # (1, T, H) -> (1, t, H)
                return self._run(self._pairs.subset(keep), (), {}, metrics=False)
        rows = keep.repeat(2)  # (2B,)
        call = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self._call.items()}
        with self._from_first(lambda hidden: hidden[rows.to(hidden.device)]):  # (2B, L, H) -> (2b, L, H)
            return self._run(None, (), call, metrics=False)

    def _from_first(self, select: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
        return self._layers.use(select) if self._layers else contextlib.nullcontext()


@contextlib.contextmanager
def _no_graph() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        # Of gradient checkpointing (use_reentrant=True), which has nothing to do here
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield
    # An older torch would use casts of weights that were made without a graph in the pass that has one
    torch.clear_autocast_cache()
