"""Bytes that an optimizer holds, and those that an update needs for itself; as read in torch 2.13 and bitsandbytes 0.50."""

import math
from collections.abc import Iterable

import torch


# Of bitsandbytes' 8-bit optimizers: elements to a scale, and how many a tensor must have; smaller ones stay in 32 bits
BLOCK_8BIT, MIN_8BIT = 256, 4096
# States of the size of the parameter, by `optim`; bitsandbytes' 32-bit ones are in 32 bits whatever the parameter's are
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}


def optimizer_family(optim: str) -> str | None:
    """The family of an `optim` of which we know the states; `None` for others, which are taken for AdamW."""
    plain = optim.removeprefix("paged_")
    if any(plain.startswith(name) for name in ("galore", "apollo", "lomo", "adalomo", "grok", "schedule", "stable")):
        return None
    return next((family for family in _STATES if plain.startswith(family)), None)


def is_paged(optim: str) -> bool:
    """Whether bitsandbytes may move the states to the host's memory when the device's runs short."""
    return optim.startswith("paged_")


def optimizer_bytes(parameters: Iterable[torch.Tensor], optim: str) -> int:
    """Bytes of the optimizer's states.

    - `adamw_torch…`, `adagrad`, `rmsprop`: states like the parameter (`torch.zeros_like`). SGD without momentum has none.
    - `…_8bit`: a byte an element, and a scale in 32 bits for 256; parameters of fewer than 4,096 elements in 32 bits.
    - bitsandbytes' other ones, `lion` and `paged_adamw` among them: 32 bits.
    - `adafactor`: a row and a column for each matrix, like the gradient; other parameters whole.
    """
    family = optimizer_family(optim) or "adamw"
    states = _STATES[family]
    is_torch = optim.startswith(("adamw_torch", "adamw_apex", "adagrad")) or optim == "rmsprop"
    total = 0
    for parameter in parameters:
        count, size = parameter.numel(), parameter.element_size()
        if family == "adafactor":
            shape = parameter.shape
            rows = count // shape[-1] + count // shape[-2] if len(shape) > 1 else count
            total += rows * size
        elif "8bit" in optim and (count >= MIN_8BIT or "torch" in optim):
            total += states * (count + 4 * math.ceil(count / BLOCK_8BIT))
        elif is_torch or optim.endswith("anyprecision"):
            total += states * count * size
        else:
            total += states * count * 4
    return total


def update_bytes(parameters: Iterable[torch.Tensor], optim: str, device: str) -> int:
    """Bytes that an update needs for itself.

    torch's fused AdamW, the default, and bitsandbytes' kernels need none. `adamw_torch` takes all parameters at once on a GPU
    (`foreach`), with a denominator of their size, and one after the other on a CPU; Adafactor makes an update in 32 bits.
    """
    sizes = [parameter.nbytes for parameter in parameters]
    if optim == "adamw_torch" and device != "cpu":
        return sum(sizes)
    return 2 * max(sizes, default=0) if optim in ("adamw_torch", "adafactor") else 0
