"""Models without weights: their tensors have shapes and types, and no contents."""

import torch
from torch import Tensor

from .quantized import quantized_layers


class _Dequantised(torch.autograd.Function):
    """A product with a weight that is made for it. # (…, in) -> (…, out)"""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*([x] if keeps_input else []))
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None


def _stand_in(module: torch.nn.Module) -> None:
    shape, bias = (module.out_features, module.in_features), module.bias
    four_bits = type(module).__name__ == "Linear4bit"
    compute = getattr(module, "compute_dtype", None) if four_bits else torch.float16

    def forward(x: Tensor) -> Tensor:
        inner = x if compute is None or not four_bits else x.to(compute)
        output = _Dequantised.apply(inner, shape, not four_bits)
        return (output if bias is None else output + bias.to(output.dtype)).to(x.dtype)

    module.forward = forward


def fill_with_fakes(model: torch.nn.Module) -> None:
    """Put fake tensors in place of a model's parameters, which are on the meta device; what is tied stays so.

    A layer of bitsandbytes makes its weight in its compute type for each product, forward and backward, and frees it after it. 4
    bits keep nothing of the input, 8 bits keep the input.
    """
    weights = set()
    for _, module in quantized_layers(model):
        weights.add(module.weight)
        _stand_in(module)
    made: dict[Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                shape = (0,) if parameter in weights else parameter.shape
                empty = torch.empty(shape, dtype=parameter.dtype, device="cpu")
                made[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
