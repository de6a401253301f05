"""Gradient checkpointing in two passes: the second computes a layer in its backward pass alone, as the first has its output.

Checkpointing keeps the input of each layer and computes the layer again in the backward pass. Where some of a batch run again
after a pass without a graph, what the layers gave then is known, so that the second pass costs what the backward pass of these
would have cost anyway.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .packing import PackedPairs


class KeptLayers:
    """The outputs of a model's checkpointed layers.

    Args:
        model (`torch.nn.Module`): In training mode, in its wrappers, which must not wait for its weights' gradients (DDP).
    """

    def __init__(self, model: torch.nn.Module):
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]
        self._outputs: dict[int, Tensor | None] = {}  # `None` of a layer that was called again

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextlib.contextmanager
    def _calling(self, function: Callable) -> Iterator[None]:
        """While open, a layer's forward goes through `function`, which is told the layer's number and how it is checkpointed."""
        own = [layer._gradient_checkpointing_func for layer in self._layers]
        try:
            for number, layer in enumerate(self._layers):
                layer._gradient_checkpointing_func = _Call(function, number, own[number])
            yield
        finally:
            for layer, before in zip(self._layers, own, strict=True):
                layer._gradient_checkpointing_func = before

    def keep(self) -> contextlib.AbstractContextManager[None]:
        """While open, outputs are kept; for a pass without a graph."""

        def run(number: int, checkpoint: Callable, forward: Callable, *args: Any) -> Any:
            output = forward(*args)
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == output.shape:
                self._outputs[number] = None if number in self._outputs else output
            return output

        return self._calling(run)

    def use(self, select: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
        """While open, a layer returns what was kept, and is computed in the backward pass.

        Args:
            select (`Callable`): Takes from hidden states of the first pass those of the second.
        """

        def run(number: int, checkpoint: Callable, forward: Callable, *args: Any) -> Any:
            kept = self._outputs.pop(number, None)
            others = [*args[1:], *getattr(forward, "keywords", {}).values()]
            if kept is None or not _only_read(others):
                return checkpoint(forward, *args)
            hidden, *rest = args
            # A layer with trained weights has a graph, also if nothing before it has
            return _ComputedLater.apply(
                lambda states: forward(states, *rest), lambda: select(kept), hidden, _with_grad(hidden)
            )

        return self._calling(run)


class _Call:
    def __init__(self, function: Callable, number: int, checkpoint: Callable):
        self._function, self._number, self._checkpoint = function, number, checkpoint

    def __call__(self, forward: Callable, *args: Any) -> Any:
        return self._function(self._number, self._checkpoint, forward, *args)


class _ComputedLater(torch.autograd.Function):
    """A layer whose output is known: its forward is run in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, layer: Callable[[Tensor], Tensor], known: Callable[[], Tensor], hidden: Tensor, _: Tensor
    ) -> Tensor:
        device = hidden.device.type
        ctx.layer = layer
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        ctx.save_for_backward(hidden)
        return known()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            output = ctx.layer(hidden)
        if output.requires_grad:
            torch.autograd.backward(output, grad)
        return None, None, hidden.grad, None


def _with_grad(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device, requires_grad=True)


def _only_read(values: Any) -> bool:
    """Whether a layer can but read its arguments: not states that layers share, nor what has a gradient of its own."""
    if isinstance(values, (tuple, list)):
        return all(map(_only_read, values))
    if isinstance(values, Tensor):
        return not values.requires_grad
    return values is None or isinstance(values, (bool, int, float, str, PackedPairs))
