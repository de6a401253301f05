"""16 bits in training: what accelerate's and TRL's settings would lose, or could not train at all."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from trl import DPOConfig

from ..common.errors import AMAError


_HALF = (torch.float16, torch.bfloat16)


def keep_output_precision(accelerator: Accelerator) -> None:
    """Let a model that FSDP2 shares out give back what it computed, instead of all in 16 bits.

    Accelerate asks FSDP2 to cast the outputs, too. Log-probs of tokens are float32, and TRL sums them in the type that they come in:
    in bfloat16, a sum of 256 nats and more has steps of 2.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype in _HALF:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def check_full_fp16(args: DPOConfig, dtype: Any, trains_all: bool) -> None:
    """Raise an `AMAError` if `fp16` is to train weights that are held in 16 bits themselves.

    Args:
        args (`DPOConfig`): The training arguments.
        dtype (`str` or `torch.dtype`): Of the weights; what is not known yet (`"auto"`) passes.
        trains_all (`bool`): Whether the weights are trained themselves, and no adapter on them.
    """
    name = str(dtype).removeprefix("torch.")
    if args.fp16 and trains_all and name in [str(half).removeprefix("torch.") for half in _HALF]:
        raise AMAError(
            f"fp16 is set and dtype is {name}, without an adapter: fp16 scales the loss and has to unscale the gradients, which torch does "
            "for weights in 32 bits only. Set dtype: float32 (the forward pass is in 16 bits all the same), or use_peft: true."
        )


def prepare_for_fp16(model: torch.nn.Module, args: DPOConfig) -> None:
    """Hold an adapter's trained weights in float32 where `fp16` scales the loss: TRL puts those on a quantised base into bfloat16,
    whose gradients torch cannot unscale on a GPU.

    Raises:
        AMAError: If the weights of the model itself are trained in 16 bits.
    """
    if not args.fp16:
        return
    half = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype in _HALF]
    if half and not is_peft_model(model):
        check_full_fp16(args, half[0].dtype, trains_all=True)
    for weight in half:
        weight.data = weight.data.float()
