"""The sums of a merge."""

import functools
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.errors import AMAError, sentence
from ..policies.files import PolicySource, capital
from ..policies.quantized import dequantized_weight, keep_weights, quantized_layers
from ..policies.switching import load_adapter
from .check import in_32_bits, is_wrapper, log_probs


@dataclass(frozen=True)
class Training:
    """What an adapter was trained on, as far as it is known.

    Args:
        quantization (`BitsAndBytesConfig`, *optional*): Of the base; `None` if it was not quantised.
        dtype (`str`, *optional*): The base's `dtype`: what its other weights were rounded to.
    """

    quantization: BitsAndBytesConfig | None = None
    dtype: str | None = None

    @property
    def words(self) -> str:
        """For cards and the screen: `NF4 with double quantisation`."""
        config = self.quantization
        if config is None:
            return "not quantised"
        if config.load_in_8bit:
            return "8 bits"
        double = " with double quantisation" if config.bnb_4bit_use_double_quant else ""
        return f"{config.bnb_4bit_quant_type.upper()}{double}"


@dataclass(frozen=True)
class Merged:
    """A merged model, and what it is held to.

    Args:
        model (`PreTrainedModel`): On the CPU, all of its weights in the type to save.
        changed (`list[str]`): Names of its modules that the adapter changed.
        base (`torch.Tensor`): Log-probs of the base that it was merged into. # (T,)
        adapted (`torch.Tensor`): Of that base with the adapter on it. # (T,)
        quantized (`tuple[torch.Tensor, torch.Tensor]`, *optional*): The same two of the quantised base, in its own arithmetic.
    """

    model: PreTrainedModel
    changed: list[str]
    base: torch.Tensor
    adapted: torch.Tensor
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None


def merged_model(
    place: PolicySource,
    base_model: str,
    loading: dict[str, Any],
    training: Training | None,
    dtype: torch.dtype,
    sequences: list[list[int]],
) -> Merged:
    """Merge an adapter into its base, or into the weights of its quantised base.

    Args:
        place ([`PolicySource`]): The adapter.
        base_model (`str`): Path or Hub id.
        loading (`dict`): For `from_pretrained`.
        training ([`Training`], *optional*): What to quantise the base by, if its quantised weights are what to merge into.
        dtype (`torch.dtype`): What to save in.
        sequences (`list[list[int]]`): Token ids to hold it to the adapter on.

    Raises:
        AMAError: If the adapter does not fit, or PEFT cannot merge it.
    """
    quantized = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        model = load_model(base_model, dtype=dtype, device_map={"": "cpu"}, **loading)
        if training is not None:
            trained = load_model(
                base_model, dtype=getattr(torch, training.dtype), quantization_config=training.quantization, **loading
            )
            keep_weights(trained)
            _copy_weights(trained, model)
            before = log_probs(trained, sequences)
            wrapped = load_adapter(trained, place.peft_config(), place, place.adapter_folder())
            quantized = (before, log_probs(wrapped, sequences))
            del trained, wrapped
            gc.collect()
        with in_32_bits(model):
            base = log_probs(model, sequences)
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        wrapped = load_adapter(model, place.peft_config(), place, place.adapter_folder())
        adapted = _adapted(wrapped, sequences, place)
        changed = [name for name, module in model.named_modules() if is_wrapper(module)]
        was_tied = _untie(model)
        merged = _merge_layers(wrapped, place)
        for name, parameter in merged.named_parameters():  # whole modules that were trained are in 32 bits
            parameter.data = parameter.data.to(types.get(name, dtype))
        if was_tied:
            _tie(merged)
        return Merged(merged, changed, base, adapted, quantized)


def _adapted(wrapped: PeftModel, sequences: list[list[int]], place: PolicySource) -> torch.Tensor:
    try:
        with in_32_bits(wrapped):
            return log_probs(wrapped, sequences)
    except (AttributeError, TypeError, ValueError) as error:  # Poly asks for a task with every text
        raise AMAError(
            f"{capital(place.who)} ('{place.given}'), an adapter of the kind {place.adapter_config.get('peft_type')}, gives no log-probs of "
            f"plain text that a merge could be held to: {sentence(error)} Use it as an adapter."
        ) from error


def load_model(base_model: str, **kwargs: Any) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(
            base_model, **{name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
        )
        if config.get_text_config() is not config:
            raise AMAError(
                f"'{base_model}' is a multimodal model ({config.model_type}), and only language models are merged. Use the adapter as it is, on its "
                "base."
            )
        return AutoModelForCausalLM.from_pretrained(base_model, use_safetensors=True, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise AMAError(f"The base model '{base_model}' cannot be loaded: {sentence(error)}") from error


@torch.no_grad()
def _copy_weights(quantized: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a model the weights that a quantised one computes with: a layer at a time, from any device."""
    layers = dict(quantized_layers(quantized))
    for name, layer in layers.items():
        target = model.get_submodule(name)
        weight = dequantized_weight(layer)
        target.weight.copy_(
            weight.t() if isinstance(target, Conv1D) else weight
        )  # GPT-2 holds them the other way round
    weights = {f"{name}.weight" for name in layers}
    for name, parameter in quantized.named_parameters():
        if name not in weights:  # rounded to the type of the training, all the same
            model.get_parameter(name).copy_(parameter)


def _untie(model: PreTrainedModel) -> bool:
    """Give a tied head weights of its own, under its adapter; whether it was tied.

    A layer of LoRA changes what one of head and embeddings computes, or both: merged into the weights that they share, it would change the
    other one, too, or be added twice.
    """
    head, embeddings = _bare(model.get_output_embeddings()), _bare(model.get_input_embeddings())
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _bare(module: torch.nn.Module | None) -> torch.nn.Module | None:
    while is_wrapper(module):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def _tie(model: PreTrainedModel) -> None:
    """Tie head and embeddings again if they are still the same, and say in the configuration if they are not."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = torch.equal(head.weight, embeddings.weight)
    if tied:
        head.weight = embeddings.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


@torch.no_grad()
def _merge_layers(wrapped: PeftModel, place: PolicySource) -> PreTrainedModel:
    """Merge by PEFT, each layer in 32 bits: in 16, adding what an adapter learned rounds much of it away twice.

    And each layer once: of some kinds (OSF), PEFT adds what was learned a second time if it is asked twice.
    """
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') is of the kind {place.adapter_config.get('peft_type')}, which works beside the base's "
            "layers and not on their weights, so it cannot be merged. Use it as an adapter."
        )
    if place.adapter_config.get("alora_invocation_tokens"):
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') is an aLoRA adapter, which works from its invocation tokens on; merged, it would work "
            "before them, too. Use it as an adapter."
        )
    try:
        for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
            layer.merge = functools.partial(_merge_in_32_bits, layer, layer.merge)
        return wrapped.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kind = place.adapter_config.get("peft_type")
        raise AMAError(
            f"PEFT cannot merge {place.who} ('{place.given}'), an adapter of the kind {kind}: {sentence(error)} Use it as an adapter."
        ) from error


def _merge_in_32_bits(layer: torch.nn.Module, merge: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    base = layer.get_base_layer()
    types = {name: parameter.dtype for name, parameter in base.named_parameters()}
    layer.float()
    merge(*args, **kwargs)
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
