"""Bytes of weights and gradients, of an optimizer's states, and of an update; as read in torch 2.13 and bitsandbytes 0.50."""

import math
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import is_peft_model
from peft.utils import get_peft_model_state_dict

from ..policies.quantized import quantized_layers


NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # weights to a scale, and scales to a scale of scales (bitsandbytes' defaults)
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


def nf4_bytes(elements: int, double_quant: bool = True) -> int:
    """Bytes of a weight in 4 bits: two to a byte, and its scales.

    A block of 64 shares a scale in 32 bits. Double quantisation stores a scale in 8 bits, with one in 32 bits for 256 of them, a
    table of 256 values and an offset. The table of the 16 levels is the weight's own.
    """
    blocks = math.ceil(elements / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + 4 * 256 + 4 if double_quant else 4 * blocks
    return math.ceil(elements / 2) + scales + 4 * 16


def int8_bytes(rows: int, columns: int) -> int:
    """Bytes of a weight in 8 bits: a byte each, and a scale in 32 bits for each row."""
    return rows * columns + 4 * rows


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as they are held in training; what is tied counts once."""
    quantised = {module.weight: module for _, module in quantized_layers(model)}
    total = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        module = quantised.get(parameter)
        if module is None:
            total += parameter.nbytes
        elif type(module).__name__ == "Linear4bit":
            elements = module.in_features * module.out_features
            total += nf4_bytes(elements, module.weight.compress_statistics)
        else:
            total += int8_bytes(module.out_features, module.in_features)
    return total


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters and those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights' file that a finished training leaves: PEFT's adapter, or the model. Without the file's header."""
    if is_peft_model(model):
        # PEFT would ask the Hub whether the vocabulary has grown, which it does not here
        return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values())
    return sum(parameter.nbytes for parameter in model.parameters())


def trained(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters that are trained."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def gradient_bytes(model: torch.nn.Module) -> int:
    """Bytes of the gradients: as their parameters."""
    return sum(parameter.nbytes for parameter in trained(model))
