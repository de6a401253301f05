"""Packing in the collator: where a batch is made it is still on the CPU, so nobody waits for a device to know its lengths.

The packed pairs travel with the batch and are no key of it: whoever reads a batch finds what the inner collator has put there. They belong to
the very tensors that were packed. Whatever becomes of the batch on its way (another process's part is put together with it, a tensor is
replaced or changed), either they still belong to its tensors, or there are none and the call is packed when it is made.
"""

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from .packing import CannotShare, PackedPairs, pack_call, pack_pairs


_PACKED_FROM = ("input_ids", "attention_mask", "completion_mask")  # what of a batch says how it is packed
_READY = "_trl_ama_packed"  # attribute of a batch's input ids


class PairBatch(dict):
    """A batch with its packed pairs, which a loader moves to a device together.

    Attributes:
        packed ([`PackedPairs`], *optional*): Of its tensors. What Accelerate makes of several batches, or of a part of one, has none.
    """

    packed: PackedPairs | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "PairBatch":
        """The batch on a device, as Accelerate would move it; from then on, [`ready_pairs`] finds its packed pairs."""
        moved = PairBatch(send_to_device(dict(self), device, non_blocking=non_blocking))
        if self.packed is not None and not any(moved[name].is_inference() for name in _PACKED_FROM):
            moved.packed = self.packed.on(device, non_blocking)
            setattr(moved[_PACKED_FROM[0]], _READY, ReadyPairs(moved.packed, moved))
        return moved

    def pin_memory(self) -> "PairBatch":
        """The batch where a GPU can copy it from."""
        pinned = PairBatch(
            {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in self.items()}
        )
        pinned.packed = None if self.packed is None else self.packed.pin_memory()
        return pinned


class ReadyPairs:
    """Packed pairs and the tensors that they were made of, which they hold only as long as these are as they were."""

    def __init__(self, pairs: PackedPairs, batch: Mapping[str, Any]):
        self._pairs = pairs
        # Its input ids hold this object, and must not be held by it
        self._tensors = {name: (weakref.ref(batch[name]), batch[name]._version) for name in _PACKED_FROM}

    def pairs_of(self, batch: Mapping[str, Any]) -> PackedPairs | None:
        """The packed pairs, if all tensors of theirs in the batch are the same objects, and nobody has written into them."""
        for name, (tensor, version) in self._tensors.items():
            if name in batch and (tensor() is not batch[name] or batch[name]._version != version):
                return None
        return self._pairs


def ready_pairs(batch: Mapping[str, Any]) -> ReadyPairs | None:
    """What a batch has brought with it, as far as it belongs to its tensors now; no device is waited for.

    Args:
        batch (`dict`): With TRL's `input_ids`, `attention_mask` and `completion_mask`, wherever it has been in between.
    """
    ready = getattr(batch.get(_PACKED_FROM[0]), _READY, None)
    if ready is None or any(name not in batch for name in _PACKED_FROM) or ready.pairs_of(batch) is None:
        return None
    return ready


def in_one_row(call: Mapping[str, Any], ready: ReadyPairs | None = None) -> tuple[PackedPairs | None, str | None]:
    """A batch as packed pairs, those that it has brought with it if they are its own, or the reason why it is none.

    Args:
        call (`dict`): What the model is called with: TRL's `input_ids`, `attention_mask` and `labels`. # (2B, L) each
        ready ([`ReadyPairs`], *optional*): What the batch has brought.
    """
    pairs = None if ready is None else ready.pairs_of(call)
    if pairs is not None:  # the batch lives until its optimizer step is over, and masks of layers need not
        pairs = copy.copy(pairs)
        pairs.cache = {}
    try:
        return pairs or pack_call(call), None
    except CannotShare as error:
        return None, str(error)


class PackingCollator:
    """Wraps a collator and packs its batches, where they are TRL's.

    Args:
        inner (`Callable`): The collator, TRL's or the user's own.
        device (`torch.device`): Where the batches will be used; attention that is one call a layer needs a plan.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], device: torch.device):
        self.inner = inner
        self._plans = device.type == "cuda"

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.inner(examples)
        if type(batch) is not dict or not _can_be_packed([batch.get(name) for name in _PACKED_FROM]):
            return batch
        input_ids, attention_mask, completion_mask = (batch[name] for name in _PACKED_FROM)
        try:
            packed = pack_pairs(input_ids, attention_mask, completion_mask)
        except CannotShare:  # it is said where the batch is used, if it matters there
            return batch
        if self._plans:
            packed.plan(input_ids.device)
        batch = PairBatch(batch)
        batch.packed = packed
        return batch


def _can_be_packed(tensors: list[Any]) -> bool:
    return all(
        isinstance(tensor, Tensor)
        and tensor.device.type == "cpu"
        and not tensor.is_inference()  # which does not tell whether it was written into
        and tensor.shape == tensors[0].shape
        for tensor in tensors
    )
