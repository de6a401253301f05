"""The base stays the base: what its tensors held before an adapter was put on it, and how to undo what that wrote to them.

PEFT knows ways to start an adapter that write into the base itself (PiSSA, OLoRA, KaSA, …), saved biases are loaded into the
base's own place, and more will come. So no kind is known by its name here: tensors are compared by a checksum of their bits.

A pass of checksums reads the weights once, where they are and in the type they have: on one core 0.2 s for the 540 MB of
SmolLM2-135M in 32 bits (half of that in 16), 5 ms for the model of the quickstart. An adapter costs three: before, when it is
there, and when it is off again. Nothing is copied ahead: contents that are replaced are only held on to, and a tensor is copied
when something is about to write to it.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..common.errors import AMAError, first_line
from .quantized import quantized_layers


logger = get_logger(__name__)

_COLUMNS = 1024
_ODD = 0x9E3779B97F4A7C15 - 2**64  # so that equal values in other places make another sum


def checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits of a tensor, on its device. # () int64"""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8
    words = flat[: whole * 8].view(torch.int64)
    rows = whole // _COLUMNS
    factors = (torch.arange(1, _COLUMNS + 1, device=flat.device) * 2 + 1) * _ODD  # (C,)
    total = (words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(dim=0) * factors).sum()
    rest = words[rows * _COLUMNS :]
    total = total + (rest * factors[: len(rest)]).sum() * 3
    rest = flat[whole * 8 :].long()
    return total + (rest * factors[: len(rest)]).sum() * 5


def checksums(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Type, shape and checksum of each tensor; one wait for each device. Tensors without contents have the sum 0."""
    tensors = list(tensors)
    sums = [0] * len(tensors)
    devices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "meta" and tensor.numel():
            devices.setdefault(tensor.device, []).append(index)
    for indices in devices.values():
        values = torch.stack([checksum(tensors[index]) for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            sums[index] = value
    return [(tensor.dtype, tuple(tensor.shape), value) for tensor, value in zip(tensors, sums, strict=True)]


class BaseWeights:
    """What the tensors of a model hold: parameters, buffers, and the scales of quantised weights.

    Args:
        model (`torch.nn.Module`): The model as it should stay. Its tensors are looked up now, so adapters that come later are
            not among them.
    """

    def __init__(self, model: torch.nn.Module):
        self._tensors = list(_tensors_of(model))
        self._held = [tensor.data for _, tensor in self._tensors]  # stays if `tensor.data` becomes another one
        self._sums = checksums(self._held)
        self._copies: dict[int, Tensor] = {}
        self._places: dict[int, list[int]] = {}  # where contents are in memory → which tensors they are of
        for index, held in enumerate(self._held):
            if held.device.type != "meta" and held.numel():
                self._places.setdefault(held.untyped_storage().data_ptr(), []).append(index)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While open, a tensor is copied before PyTorch writes to it."""
        with _CopyBeforeWrite(self):
            yield

    def keep(self, tensor: Tensor) -> None:
        """Copy what a tensor that is about to be written to shares with this model."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        for index in self._places.get(tensor.untyped_storage().data_ptr(), ()):
            if index not in self._copies:
                self._copies[index] = self._held[index].clone()

    def changed(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """Of every tensor that holds something else by now: name, tensor, and what it held, or `None` if that is lost."""
        now = checksums(tensor.data for _, tensor in self._tensors)
        return [
            (name, tensor, self._original(index))
            for index, ((name, tensor), before, after) in enumerate(zip(self._tensors, self._sums, now, strict=True))
            if before != after
        ]

    def _original(self, index: int) -> Tensor | None:
        for kept in (self._copies.get(index), self._held[index]):
            if kept is not None and checksums([kept]) == [self._sums[index]]:
                return kept
        return None

    def restore(self, who: str) -> None:
        """Put back what was changed.

        Args:
            who (`str`): What changed it, for the message.

        Raises:
            AMAError: If a change cannot be undone.
        """
        changed = self.changed()
        for _, tensor, original in changed:
            if original is not None:
                tensor.data = original
        lost = [name for name, _, original in changed if original is None]
        if lost:
            raise AMAError(
                f"{who} wrote to {len(lost)} weights of the base model in a way that cannot be undone (the first is '{lost[0]}'), so "
                "nothing after it would be scored on the base. Merge it into a model and name that instead, or leave it out."
            )


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, layer in quantized_layers(model):
        weight = layer.weight
        state = getattr(weight, "quant_state", None)
        for part, owner in (("quant_state", state), ("state2", getattr(state, "state2", None)), ("weight", weight)):
            for key in ("absmax", "offset", "SCB"):
                value = getattr(owner, key, None)
                if isinstance(value, Tensor):
                    yield f"{name}.{part}.{key}", value


class _CopyBeforeWrite(TorchDispatchMode):
    def __init__(self, weights: BaseWeights):
        super().__init__()
        self._weights = weights

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    self._weights.keep(tensor)
        return func(*args, **kwargs)


def drawn_anew(base: torch.nn.Module, config: PeftConfig, changed: list[tuple[str, Tensor, Tensor | None]]) -> bool:
    """Whether what an adapter's start writes into the base is drawn at random, so that no two loads give the same model.

    Found by starting it twice on a copy of one layer that was changed.

    Args:
        base (`torch.nn.Module`): The model that `changed` was found on, adapted or not.
        config (`PeftConfig`): The adapter's.
        changed: What [`BaseWeights.changed`] returned.
    """
    found = [(name, original) for name, tensor, original in changed if original is not None and tensor.dim() > 1]
    if not found:
        return False
    name, original = found[0]
    path, _, weight = name.rpartition(".")
    results = []
    for seed in (0, 1):
        try:
            layer = base.get_submodule(path)
            layer = copy.deepcopy(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)
            getattr(layer, weight).data = original.clone()
            with torch.random.fork_rng(devices=[original.device] if original.is_cuda else []):
                torch.manual_seed(seed)
                inject_adapter_in_model(copy.deepcopy(config), _alone(path, layer))
        except Exception as error:  # whatever a kind of adapter needs beside the layer
            logger.warning(
                f"Whether the start of this adapter ({getattr(config, 'peft_type', type(config).__name__)}), which writes into the base, is drawn "
                f"at random could not be told ({type(error).__name__}: {first_line(error)}). If it is, no two loads of it are the same model."
            )
            return False
        results.append(getattr(layer, weight).detach().float() - original.float())
    return bool((results[0] - results[1]).norm() > 1e-3 * results[0].norm())


def _alone(path: str, layer: torch.nn.Module) -> torch.nn.Module:
    """A model that holds nothing but a layer, under the name that it has elsewhere."""
    for name in reversed(path.split(".")):
        holder = torch.nn.Module()
        holder.add_module(name, layer)
        layer = holder
    return layer
