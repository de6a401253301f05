"""The sums of a merge, and how far their result is from the adapter on its base."""

import gc
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .adapter_keys import saved_shapes
from .errors import AMAError, sentence
from .policies import load_adapter
from .policy_files import ADAPTER_WEIGHTS, PolicySource
from .quantized import dequantized_weight, keep_weights, quantized_layers


# What adapter and merged model are compared on; a little of several kinds
_PROBE = (
    "The river was quiet that night. She asked: how many apples are in three baskets of seven? Twenty-one, he said, and lit "
    "the lamp.\n\ndef mean(values):\n    return sum(values) / len(values)\n\nDie Antwort ist nicht immer einfach."
)
_TOO_DIFFERENT = 0.5  # nats a token, mean: far above what rounding does


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


def merged_model(
    place: PolicySource,
    base_model: str,
    loading: dict[str, Any],
    training: Training | None,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """The merged model on the CPU, and the log-probs of what it is merged from."""
    before = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        model = load_model(base_model, dtype=dtype, device_map={"": "cpu"}, **loading)
        if training is not None:
            quantized = load_model(
                base_model, dtype=getattr(torch, training.dtype), quantization_config=training.quantization, **loading
            )
            keep_weights(quantized)
            _copy_weights(quantized, model)
            wrapped = load_adapter(quantized, place.peft_config(), place, place.adapter_folder())
            before = log_probs(wrapped, tokenizer)
            del quantized, wrapped
            gc.collect()
        _untie(model, place)
        wrapped = load_adapter(model, place.peft_config(), place, place.adapter_folder())
        if before is None:
            before = log_probs(wrapped, tokenizer)
        return _merge_layers(wrapped, place), before


def load_model(base_model: str, **kwargs: Any) -> PreTrainedModel:
    try:
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


def _untie(model: PreTrainedModel, place: PolicySource) -> None:
    """Give the head weights of its own if the adapter changes the embeddings or the head, and not both alike.

    A layer of LoRA changes what one of the two computes; merged into the weights that both share, it would change the other
    one too.
    """
    if any(place.adapter_config.get(name) for name in ("ensure_weight_tying", "trainable_token_indices")):
        return  # PEFT then changes both
    shapes = saved_shapes(os.path.join(place.adapter_folder(), ADAPTER_WEIGHTS))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = {id(module): name for name, module in model.named_modules()}
    changed = {names[id(head)], names[id(embeddings)]}
    if not any(f"{name}." in key for key in shapes for name in changed):
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {
        id(model.config): model.config,
        id(model.config.get_text_config()): model.config.get_text_config(),
    }.values():
        config.tie_word_embeddings = False


@torch.no_grad()
def _merge_layers(wrapped: PeftModel, place: PolicySource) -> PreTrainedModel:
    """Merge by PEFT, each layer in 32 bits: in 16, adding what an adapter learned rounds much of it away twice."""
    try:
        for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
            base = layer.get_base_layer()
            types = {name: parameter.dtype for name, parameter in base.named_parameters()}
            base.float()
            layer.merge(safe_merge=True)
            for name, parameter in base.named_parameters():
                parameter.data = parameter.data.to(types[name])
        return wrapped.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kind = place.adapter_config.get("peft_type")
        raise AMAError(
            f"PEFT cannot merge {place.who} ('{place.given}'), an adapter of the kind {kind}: {sentence(error)} Use it as an adapter."
        ) from error


@torch.no_grad()
def log_probs(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Log-probs of the tokens of a short text; `None` if it has none in this vocabulary. # (T,)"""
    ids = tokenizer(_PROBE, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]  # (1, T+1)
    if ids.shape[1] < 2:
        return None
    device = next(model.parameters()).device
    model.eval()
    logits = model(input_ids=ids.to(device), use_cache=False).logits[0, :-1].float()  # (T, V)
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None].to(device)).squeeze(1).cpu()


def difference_from(
    place: PolicySource, before: torch.Tensor | None, after: torch.Tensor | None
) -> dict[str, float | int | None]:
    """How far the checkpoint is from the adapter on its base. # nats a token

    Raises:
        AMAError: If it is another model.
    """
    if before is None or after is None:
        return {"mean_difference": None, "largest_difference": None, "compared_tokens": 0}
    distance = (after - before).abs()
    mean, largest = distance.mean().item(), distance.max().item()
    if not math.isfinite(mean) or mean > _TOO_DIFFERENT:
        raise AMAError(
            f"Merged, {place.who} ('{place.given}') gives other log-probs than on its base, by {mean:.2g} nats a token: PEFT merges this "
            f"adapter ({place.adapter_config.get('peft_type')}) into something else. Use it as an adapter."
        )
    return {"mean_difference": mean, "largest_difference": largest, "compared_tokens": len(distance)}
