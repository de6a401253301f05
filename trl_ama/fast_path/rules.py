"""Rules of prefix sharing: what is known to make a difference between a packed row and padded ones, or may come to make one."""

from types import FunctionType
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from trl import DPOConfig

from .attention import KNOWN_ATTENTION, is_flash, knows_attention
from .forward import causal_lm, unwrapped


_MIXES_TOKENS = {"LILY"}
_SHARED_LAYERS = {"full_attention", "sliding_attention"}


def _kind(adapter: Any) -> str:
    kind = getattr(adapter, "peft_type", None)
    return str(getattr(kind, "value", kind))


def broken_rule(
    model: torch.nn.Module, args: DPOConfig, parallelism: ParallelismConfig | None = None, training: bool = True
) -> str | None:
    """The first rule that a model breaks, as half a sentence; `None` if it breaks none and is left to the trial.

    Args:
        model (`torch.nn.Module`): The model in all its wrappers; it is looked at, not run, and may be on the meta device.
        args (`DPOConfig`): The training arguments.
        parallelism (`ParallelismConfig`, *optional*): The accelerator's.
        training (`bool`, *optional*): Whether it is trained, or only scored.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    if getattr(inner.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if config is not inner.config:
        return "it is a multimodal model"
    if not knows_attention(config._attn_implementation):
        return unknown_attention(config._attn_implementation)
    if is_flash(config._attn_implementation) and flash_attn_supports_top_left_mask():
        return "this version of flash attention aligns causal masks at the start of the keys"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _SHARED_LAYERS)
    if unknown:
        return f"it has layers of type {unknown}, which are not plain attention"
    adapters = getattr(unwrapped(model), "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "its adapter learns a prompt, which would come before every pair"
    mixing = [name for name in map(_kind, adapters.values()) if name in _MIXES_TOKENS]
    if mixing:
        return f"its adapter ({mixing[0]}) averages over all tokens of a batch, padding among them"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        return (
            "its adapter (aLoRA) acts from where its invocation tokens are in each row, which a packed row has many of"
        )
    if training and getattr(args, "neftune_noise_alpha", None):
        return "neftune_noise_alpha adds noise, drawn for each row and scaled by its length"
    if getattr(args, "n_gpu", 1) > 1:
        return "DataParallel splits a batch by its rows, and a packed batch has one (launch a process for each GPU instead)"
    if args.torch_compile:
        return "torch_compile compiles for shapes, and a packed row has another one at every step"
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        return "context or sequence parallelism splits sequences"
    return None


def unknown_attention(name: str) -> str:
    """Why a model with such an attention is not shared, as half a sentence."""
    return f"attn_implementation='{name}' is not one of {list(KNOWN_ATTENTION)}, nor a flash attention of the Hub"


def modules_that_may_draw(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Modules, and their attributes, that decide whether they draw random numbers in training; not all are a `Dropout`, which
    TRL turns off."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            found.append((module, "p"))
        else:
            names = [name for name, value in vars(module).items() if isinstance(value, (float, dict))]
            found += [(module, name) for name in names if "drop" in name or "jitter" in name]
    return found


def level(value: Any) -> float:
    """How much is drawn: a number, or one for each adapter, as PEFT has them."""
    values = value.values() if isinstance(value, dict) else [value]
    return max((float(one) for one in values if isinstance(one, (int, float))), default=0.0)


def hook_kind(hook: Any) -> Any:
    """What two hooks of a module share that do the same. With gradient checkpointing transformers sets one more at each step of an
    adapter's training: a new function each time, but of the same code, and with nothing of its own."""
    if not isinstance(hook, FunctionType):
        return id(hook)
    return hook.__code__, id(hook.__defaults__), id(hook.__kwdefaults__), tuple(map(id, hook.__closure__ or ()))


def computes_in_32_bits(model: torch.nn.Module) -> bool:
    """Whether a model without autocast computes in float32, and not in what a processor may make of it in matrix products: TF32
    (`tf32: true`), or bfloat16 (`torch.set_float32_matmul_precision("medium")`)."""
    devices = set()
    for parameter in model.parameters():
        if parameter.dtype != torch.float32:
            return False
        devices.add(parameter.device.type)
    return not any(map(_rounds_products, devices))


def _rounds_products(device: str) -> bool:
    if device == "cuda":
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9
        # Where there is the new way to ask, the old one raises if the new one was used
        return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision not in ("none", "ieee")
    if hasattr(torch.backends.mkldnn, "matmul"):
        return torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "medium"
