"""Quantised bases: what is checked before a run, and two things about bitsandbytes' layers that would change numbers.

A base in 4 or 8 bits is loaded once per stage, as TRL loads it; everything else here is about the layers being the same ones
whenever they are used: in training, in evaluation, and when an adapter is merged.
"""

import importlib.util
from collections.abc import Iterator

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from ..common.errors import AMAError, first_line, sentence


logger = get_logger(__name__)

_INSTALL = 'Install it with `pip install "trl-ama[quantization]"`'
_OF_BITSANDBYTES = ("8bit", "paged", "bnb", "ademamix")  # in the names of `optim`
_LAYERS = ("Linear4bit", "Linear8bitLt")
_TRIED = 2**14  # parameters of a trial: bitsandbytes holds smaller ones in 32 bits


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model, or the base of a PEFT model, is held in 4 or 8 bits by bitsandbytes; as TRL asks."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


def quantized_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers that bitsandbytes holds in 4 or 8 bits, by name; not PEFT's around them, whose classes have the same names."""
    for name, module in model.named_modules():
        if type(module).__name__ in _LAYERS and type(module).__module__.startswith("bitsandbytes"):
            yield name, module


def keep_weights(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew when a model is evaluated on a CPU.

    Where the CPU knows AVX512-BF16, bitsandbytes (0.50) packs each weight at the first forward pass in evaluation mode, and
    rounds its scales to bf16 by that. It does not unpack it for training: from then on no gradient passes through the layer,
    so that adapters in front of it get a wrong one, or none; and whoever dequantises the weight (merging, DoRA) reads noise.

    Raises:
        AMAError: If that has happened to the model already.
    """
    for _, layer in quantized_layers(model):
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise AMAError(
                "The 4-bit model was run in evaluation mode on the CPU before, and bitsandbytes has packed its weights for that, so "
                "it cannot be trained or compared any more. Load it again, or pass its name."
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def dequantized_weight(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer of 4 or 8 bits multiplies with, as `torch.nn.Linear` holds it. # (out, in)"""
    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))


def check_quantization(config: BitsAndBytesConfig | None, uses_peft: bool) -> None:
    """Find out before anything is trained whether a quantisation runs on this machine.

    Args:
        config (`BitsAndBytesConfig`, *optional*): Of the base model; `None` if it is not quantised.
        uses_peft (`bool`): Whether an adapter is trained on it.

    Raises:
        AMAError: If it does not: bitsandbytes is missing, or has nothing for this device, or there is no adapter to train.
    """
    if config is None:
        return
    asked = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AMAError(f"{asked} needs bitsandbytes, which is not installed. {_INSTALL}, or set {asked}: false.")
    from transformers.integrations import validate_bnb_backend_availability  # which loads the optional bitsandbytes

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (RuntimeError, ImportError) as error:
        raise AMAError(f"{asked} does not run here: {sentence(error)} Set {asked}: false.") from error
    if not uses_peft:
        raise AMAError(
            f"{asked} is set without use_peft, and weights of so few bits cannot be trained themselves. Set use_peft: true, or "
            f"{asked}: false."
        )


def check_optimizer(args: TrainingArguments) -> None:
    """Find out before anything is trained whether an optimizer of bitsandbytes runs on this machine, by a step of it.

    On a CPU they do run, slowly, and paged ones are not paged; that is left to the user, with a warning.

    Raises:
        AMAError: If it does not run; the message names the optimizer and one that does.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if not any(part in name for part in _OF_BITSANDBYTES) or "torch" in name or "galore" in name:
        return
    device = args.device
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AMAError(f"optim is '{name}', which needs bitsandbytes. {_INSTALL}, or set optim: adamw_torch.")
    layer = torch.nn.Linear(_TRIED // 64, 64, bias=False, device=device)
    before = layer.weight.detach().clone()
    try:
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        layer.weight.grad = torch.ones_like(layer.weight)
        make(layer.parameters(), **{**kwargs, "lr": 1.0}).step()
        if torch.equal(before, layer.weight.detach()):
            raise RuntimeError("its step changes nothing")
    except Exception as error:  # whatever a library says that has no kernel for a device
        raise AMAError(
            f"optim is '{name}', which does not run on this machine's {device.type} ({type(error).__name__}: {first_line(error)}). Set "
            "optim: adamw_torch."
        ) from error
    if device.type == "cpu":
        logger.warning(
            f"optim is '{name}': on a CPU, bitsandbytes' 8-bit steps are slow and its paged states are not paged. --optim adamw_torch "
            "is faster there; an adapter's states are small."
        )
