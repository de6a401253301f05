"""LoRA on a CPU, added to its layer by the matrix product itself.

PEFT computes `layer(x) + lora_B(lora_A(x)) * scaling`: two visits to a matrix as large as the layer's output, and one more in the
backward pass, for a product that is a few hundred times smaller than the layer's. Here the scaled product is one operation with
the sum, so that what is scaled, forwards and backwards, has as many columns as the adapter has ranks. Under autocast the input is
handed over as it is: PEFT would make it 32 bits wide, and autocast 16 again.

It is hung in where PEFT keeps its own kinds of LoRA (DoRA and others), for one forward pass, on layers that are plain in every
respect: any other one computes what it always did. Not with gradient checkpointing, whose second forward pass comes later.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor


class _Added:
    """Stands among PEFT's kinds of LoRA; of a `LoraVariant` the forward pass asks this alone."""

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output with the adapter's. # x (…, in), result (…, out) -> (…, out)"""
        narrow = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (…, r)
        scaling, up = module.scaling[active_adapter], module.lora_B[active_adapter]
        if narrow.dtype != result.dtype:
            return result + up(narrow) * scaling
        weight = up.weight.to(result.dtype)
        summed = torch.addmm(result.flatten(0, -2), narrow.flatten(0, -2), weight.t(), alpha=scaling)
        return summed.view(result.shape)


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def _adapters(module: Linear) -> list[str]:
    """The active adapters of a layer that are two linear layers and nothing else."""
    if module.disable_adapters or module.merged or type(module.base_layer) is not torch.nn.Linear:
        return []
    return [
        name
        for name in module.active_adapters
        if name in module.lora_A
        and name not in module.lora_variant
        and isinstance(module.scaling[name], float | int)
        and _is_plain(module.lora_A[name])
        and _is_plain(module.lora_B[name])
        and module.lora_B[name].bias is None
    ]


@contextlib.contextmanager
def thin_products(model: torch.nn.Module) -> Iterator[None]:
    """While open, plain LoRA layers of a model on a CPU add their adapters in one operation."""
    modules = list(model.modules())
    if torch.is_grad_enabled() and any(getattr(module, "gradient_checkpointing", False) for module in modules):
        yield
        return
    casts = not torch.is_autocast_enabled("cpu")
    changed: list[tuple[Linear, list[str], bool]] = []
    try:
        for module in modules:
            if type(module) is not Linear or not hasattr(module, "lora_variant"):  # another PEFT: slower, and as right
                continue
            names = _adapters(module)
            if not names or module.base_layer.weight.device.type != "cpu":
                continue
            changed.append((module, names, module.cast_input_dtype_enabled))
            module.lora_variant.update(dict.fromkeys(names, _Added))
            if names == [
                name for name in module.active_adapters if name in module.lora_A
            ]:  # else another kind wants it
                module.cast_input_dtype_enabled = module.cast_input_dtype_enabled and casts
        yield
    finally:
        for module, names, cast in changed:
            module.cast_input_dtype_enabled = cast
            for name in names:
                module.lora_variant.pop(name, None)
