"""Merges an adapter into a full checkpoint: into the base as it is saved, or into the quantised base that it was trained on.

An adapter that was trained on a 4-bit base has learned to correct those very weights. Added to the 16-bit originals it makes
another model than the one that was trained and evaluated; added to 4-bit weights and rounded to 4 bits again, most of it is
lost. What gives the trained model is the dequantised base: the weights that the 4-bit layers multiply with, in 16 or 32 bits.
"""

import gc
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from .adapter_keys import saved_shapes
from .errors import AMAError, first_line
from .fingerprint import package_versions, write_json
from .merged_card import write_merged_card
from .merged_folder import NOTE_FILE, whole_or_not
from .policies import load_adapter
from .policy_files import ADAPTER_WEIGHTS, PolicySource, capital, policy_source
from .policy_sources import check_policy_source
from .quantized import dequantized_weight, keep_weights, quantized_layers


INTO = ("base", "dequantized")
DTYPES = ("auto", "bfloat16", "float16", "float32")
_WHO = "the adapter to merge"
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


def merge_adapter(
    adapter: str,
    output: str | Path,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    training: Training | None = None,
    into: str | None = None,
    save_dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into a full checkpoint with tokenizer, chat template, generation configuration and card.

    The sums are made in 32 bits, a layer at a time, and rounded once. The checkpoint is read back and held against the
    adapter on its base before it is put into its place.

    Args:
        adapter (`str`): Adapter folder, or Hub id with an optional `@revision`.
        output (`str` or `Path`): The new folder.
        base_model (`str`, *optional*): Path or Hub id of the base; the adapter's own by default.
        base_revision (`str`, *optional*): Its revision.
        training ([`Training`], *optional*): What the adapter was trained on, where its folder does not say (`stage.json`).
        into (`str`, *optional*): `"base"`, or `"dequantized"`: the weights of the quantised base. The latter is the default for
            an adapter that is known to be trained on one.
        save_dtype (`str`): `"auto"` is the base checkpoint's.
        overwrite (`bool`): Whether to replace what an earlier merge wrote to `output`.
        trust_remote_code (`bool`): Whether code that the base brings may run.

    Returns:
        The note that is saved as `ama_merge.json`.

    Raises:
        AMAError: If the adapter cannot be read, does not fit the base or cannot be merged, or `output` is in use. Nothing is
            written then.
    """
    place = policy_source(_WHO, adapter, check_again=True)
    if place.adapter_config is None:
        raise AMAError(
            f"{capital(_WHO)} ('{adapter}') has no adapter_config.json, so there is nothing to merge. A full model can be used as it is."
        )
    base_model = base_model or place.adapter_config.get("base_model_name_or_path")
    if not base_model:
        raise AMAError(
            f"{capital(_WHO)} ('{adapter}') does not name its base model. Name it with --model_name_or_path."
        )
    if base_revision is None and base_model == place.adapter_config.get("base_model_name_or_path"):
        base_revision = place.adapter_config.get("revision")
    if training is None or training.quantization is None:
        training = training_of(place) or training or Training()
    into = into or ("dequantized" if training.quantization is not None else "base")
    if into == "dequantized" and training.quantization is None:
        raise AMAError(
            f"There is no quantised base to merge '{adapter}' into: neither its folder nor the command says that it was trained on one. "
            "Pass what it was trained with, e.g. --load_in_4bit --bnb_4bit_quant_type nf4 --use_bnb_nested_quant --dtype bfloat16, "
            "or leave --into out."
        )
    loading = {"revision": base_revision, "trust_remote_code": trust_remote_code}
    config = _base_config(base_model, loading)
    _check_embeddings(place, config)
    check_policy_source(base_model, _WHO, adapter, base_revision=base_revision, trust_remote_code=trust_remote_code)
    with whole_or_not(Path(output), overwrite, keep_off=[place.name, base_model]) as folder:
        tokenizer = _tokenizer(place, base_model, loading)
        dtype = config.dtype or torch.float32 if save_dtype == "auto" else getattr(torch, save_dtype)
        model, before = _merged(
            place, base_model, loading, training if into == "dequantized" else None, dtype, tokenizer
        )
        if tokenizer.pad_token_id is not None and model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        note = {
            "version": 1,
            "adapter": adapter,
            "adapter_commit": place.commit,
            "base_model": base_model,
            "base_revision": base_revision,
            "into": into,
            "trained_on": training.words,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": saved.num_parameters(),
            **_difference(place, before, _log_probs(saved, tokenizer)),
            "versions": package_versions(),
        }
        del saved
        gc.collect()
        write_json(folder / NOTE_FILE, note)
        write_merged_card(folder, Path(output).name, place, note)
    return note


def training_of(place: PolicySource) -> Training | None:
    """What a folder of the pipeline says about the base that its adapter was trained on; `None` if it says nothing."""
    note = place.json("stage.json")
    noted = (note or {}).get("fingerprint")
    if not isinstance(noted, dict) or "load_in_4bit" not in noted:
        return None
    if note.get("result") is None:
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') is not trained to its end yet. Run its `trl ama` command again, which goes on from "
            "the last checkpoint."
        )
    return training_from({name: noted.get(name) for name in _NOTED})


_NOTED = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "dtype")


def training_from(arguments: dict[str, Any]) -> Training:
    """What `ModelConfig`'s arguments, as the recipe gives them, say about the base in training."""
    from trl import ModelConfig, get_quantization_config

    try:
        model_args = ModelConfig(**{name: value for name, value in arguments.items() if value is not None})
        return Training(get_quantization_config(model_args), model_args.dtype or "float32")
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise AMAError(f"These settings of the quantisation do not go together: {first_line(error)}") from error


# ---- Before ----


def _base_config(base_model: str, loading: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(base_model, **loading)
    except (OSError, ValueError) as error:
        raise AMAError(
            f"The base model '{base_model}' cannot be read: {first_line(error)} Name it with --model_name_or_path."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise AMAError(
            f"The base model '{base_model}' is a quantised checkpoint, which an adapter cannot be merged into without rounding it away. "
            "Name the checkpoint that it was quantised from with --model_name_or_path, with --load_in_4bit for its weights in 4 bits."
        )
    return config


def _check_embeddings(place: PolicySource, config: Any) -> None:
    """Name the reason where an adapter brings embeddings for another vocabulary, which otherwise reads as a wrong base."""
    size = config.get_text_config().vocab_size
    shapes = saved_shapes(os.path.join(place.adapter_folder(), ADAPTER_WEIGHTS))
    for name, shape in shapes.items():
        whole = name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight"))
        if whole and shape[0] != size:
            raise AMAError(
                f"{capital(place.who)} ('{place.given}') was trained with embeddings of {shape[0]} tokens, and the base model has {size}: "
                "they were resized. Save a base with as many (`model.resize_token_embeddings`), and name it with "
                "--model_name_or_path."
            )


def _tokenizer(place: PolicySource, base_model: str, loading: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The adapter's own, which has the chat template of its training, or the base's."""
    try:
        if place.file("tokenizer_config.json") is not None:
            return AutoTokenizer.from_pretrained(place.name, revision=place.commit)
        return AutoTokenizer.from_pretrained(base_model, **loading)
    except (OSError, ValueError, KeyError) as error:
        raise AMAError(f"The tokenizer of '{place.given}' cannot be read: {first_line(error)}") from error


# ---- The merge ----


def _merged(
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
        model = _load(base_model, dtype=dtype, device_map={"": "cpu"}, **loading)
        if training is not None:
            quantized = _load(
                base_model, dtype=getattr(torch, training.dtype), quantization_config=training.quantization, **loading
            )
            keep_weights(quantized)
            _copy_weights(quantized, model)
            wrapped = load_adapter(quantized, place.peft_config(), place, place.adapter_folder())
            before = _log_probs(wrapped, tokenizer)
            del quantized, wrapped
            gc.collect()
        _untie(model, place)
        wrapped = load_adapter(model, place.peft_config(), place, place.adapter_folder())
        if before is None:
            before = _log_probs(wrapped, tokenizer)
        return _merge_layers(wrapped, place), before


def _load(base_model: str, **kwargs: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(base_model, use_safetensors=True, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise AMAError(f"The base model '{base_model}' cannot be loaded: {first_line(error)}") from error


@torch.no_grad()
def _copy_weights(quantized: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a model the weights that a quantised one computes with: a layer at a time, from any device."""
    layers = dict(quantized_layers(quantized))
    for name, layer in layers.items():
        target = model.get_submodule(name)
        weight = dequantized_weight(layer)
        target.weight.copy_(weight.t() if isinstance(target, Conv1D) and not isinstance(layer, Conv1D) else weight)
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
            f"PEFT cannot merge {place.who} ('{place.given}'), an adapter of the kind {kind}: {first_line(error)} Use it as an adapter."
        ) from error


# ---- After ----


@torch.no_grad()
def _log_probs(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Log-probs of the tokens of a short text; `None` if it has none in this vocabulary. # (T,)"""
    ids = tokenizer(_PROBE, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]  # (1, T+1)
    if ids.shape[1] < 2:
        return None
    device = next(model.parameters()).device
    model.eval()
    logits = model(input_ids=ids.to(device), use_cache=False).logits[0, :-1].float()  # (T, V)
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None].to(device)).squeeze(1).cpu()


def _difference(
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
