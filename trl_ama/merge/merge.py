"""Merges an adapter into a full checkpoint: into the base as it is saved, or into the quantised base that it was trained on.

An adapter that was trained on a 4-bit base has learned to correct those very weights. Added to the 16-bit originals it makes
another model than the one that was trained and evaluated; added to 4-bit weights and rounded to 4 bits again, most of it is
lost. What gives the trained model is the dequantised base: the weights that the 4-bit layers multiply with, in 16 or 32 bits.
"""

import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config

from ..common.errors import AMAError, sentence
from ..common.files import write_json
from ..common.fingerprint import package_versions
from ..common.run_folder import STAGE_FILE
from ..common.secrets import public_name
from ..common.versions import VERSIONS, check_version
from ..policies.adapter_keys import saved_shapes
from ..policies.checks import check_policy_source
from ..policies.files import ADAPTER_WEIGHTS, PolicySource, capital, policy_source
from .card import write_merged_card
from .check import check_sequences, distances, hold_to_effect, hold_to_training, in_32_bits, log_probs
from .folder import NOTE_FILE, whole_or_not
from .weights import Merged, Training, merged_model


INTO = ("base", "dequantized")
DTYPES = ("auto", "bfloat16", "float16", "float32")
_WHO = "the adapter to merge"
_NOTED = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "dtype")


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

    The sums are made in 32 bits, a layer at a time, and rounded once. The checkpoint is read back and held to what the adapter
    does on its base before it is put into its place.

    Args:
        adapter (`str`): Adapter folder, or Hub id with an optional `@revision`.
        output (`str` or `Path`): The new folder.
        base_model (`str`, *optional*): Path or Hub id of the base; the adapter's own by default.
        base_revision (`str`, *optional*): Its revision.
        training ([`Training`], *optional*): What the adapter was trained on, unless its folder says (`stage.json`).
        into (`str`, *optional*): `"base"`, or `"dequantized"`: the weights of the quantised base. The latter is the default for
            an adapter that is known to be trained on one.
        save_dtype (`str`): `"auto"` is the base checkpoint's, unless that would round much of the adapter away, which is an error.
        overwrite (`bool`): Whether to replace what an earlier merge wrote to `output`.
        trust_remote_code (`bool`): Whether code that the base brings may run.

    Returns:
        The note that is saved as `ama_merge.json`.

    Raises:
        AMAError: If the adapter cannot be read, does not fit the base or cannot be merged, or `output` is in use. Nothing is
            written then.
    """
    for name, value, known in (("into", into or INTO[0], INTO), ("save_dtype", save_dtype, DTYPES)):
        if value not in known:
            raise AMAError(f"{name} is '{value}', but must be one of {list(known)}.")
    place = policy_source(_WHO, adapter, check_again=True)
    if place.adapter_config is None:
        several = sorted(path.parent.name for path in Path(place.name).glob("*/adapter_config.json"))
        raise AMAError(
            f"{capital(_WHO)} ('{adapter}') has no adapter_config.json, so there is nothing to merge. "
            + (
                f"It holds adapters in folders of its own: name one of {several}."
                if several
                else "A full model can be used as it is."
            )
        )
    base_model = base_model or place.adapter_config.get("base_model_name_or_path")
    if not base_model:
        raise AMAError(
            f"{capital(_WHO)} ('{adapter}') does not name its base model. Name it with --model_name_or_path."
        )
    if base_revision is None and base_model == place.adapter_config.get("base_model_name_or_path"):
        base_revision = place.adapter_config.get("revision")
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
        sequences = check_sequences(tokenizer, config.get_text_config().vocab_size, place.adapter_config)
        merged = merged_model(
            place, base_model, loading, training if into == "dequantized" else None, dtype, sequences
        )
        model = merged.model
        if tokenizer.pad_token_id is not None and model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        try:
            model.save_pretrained(folder)
        except ValueError as error:  # a generation configuration that contradicts itself, for one
            raise AMAError(
                f"The merged model cannot be saved: {sentence(error)} Mend that in '{base_model}'."
            ) from error
        tokenizer.save_pretrained(folder)
        merged = dataclasses.replace(merged, model=None)
        del model
        gc.collect()
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        note = {
            "version": VERSIONS[NOTE_FILE],
            "adapter": adapter if place.commit else public_name(adapter),
            "adapter_commit": place.commit,
            "base_model": public_name(base_model) if os.path.isdir(base_model) else base_model,
            "base_revision": base_revision,
            "into": into,
            "trained_on": training.words,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": saved.num_parameters(),
            **_differences(place, merged, saved, sequences),
            "versions": package_versions(),
        }
        hold_to_effect(place, note, note["dtype"], save_dtype != "auto")
        if merged.quantized is not None:
            hold_to_training(place, note)
        del saved
        gc.collect()
        write_json(folder / NOTE_FILE, note)
        write_merged_card(folder, Path(os.path.abspath(output)).name, place, base_model, note)
    return note


def _differences(
    place: PolicySource, merged: Merged, saved: torch.nn.Module, sequences: list[list[int]]
) -> dict[str, float | int | None]:
    with in_32_bits(saved):
        after = log_probs(saved, sequences)
    with in_32_bits(saved, moved=[""] if saved.dtype == torch.float32 else merged.changed):
        moved = log_probs(saved, sequences)
    found = distances(merged.base, merged.adapted, after, moved)
    if merged.quantized is not None:
        base, adapted = merged.quantized
        found["quantized_base_difference"] = (merged.base - base).abs().mean().item()
        found["quantized_difference"] = (after - adapted).abs().mean().item()
    return found


def training_of(place: PolicySource) -> Training | None:
    """What a folder of the pipeline says about the base that its adapter was trained on; `None` if it says nothing."""
    note = place.json(STAGE_FILE)
    if note is not None:
        check_version(STAGE_FILE, note, f"name an adapter that this trl-ama trained; this one is '{place.given}'")
    noted = (note or {}).get("fingerprint")
    if not isinstance(noted, dict) or "load_in_4bit" not in noted:
        return None
    if note.get("result") is None:
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') is not trained to its end yet. Run its `trl ama` command again, which goes on from "
            "the last checkpoint."
        )
    return training_from(noted)


def training_from(arguments: dict[str, Any]) -> Training:
    """What `ModelConfig`'s arguments, as the recipe gives them, say about the base in training."""
    try:
        model_args = ModelConfig(**{name: arguments[name] for name in _NOTED if arguments.get(name) is not None})
        training = Training(get_quantization_config(model_args), model_args.dtype or "float32")
        if training.quantization is not None and training.dtype not in DTYPES[1:]:
            raise ValueError(f"dtype is '{training.dtype}', but must be one of {list(DTYPES[1:])}.")
        if model_args.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type is '{model_args.bnb_4bit_quant_type}', but must be nf4 or fp4.")
        return training
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise AMAError(f"These settings of the quantisation do not go together: {sentence(error)}") from error


# ---- Before ----


def _base_config(base_model: str, loading: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(base_model, **loading)
    except (OSError, ValueError) as error:
        raise AMAError(
            f"The base model '{base_model}' cannot be read: {sentence(error)} Name it with --model_name_or_path."
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
    try:
        shapes = saved_shapes(os.path.join(place.adapter_folder(), ADAPTER_WEIGHTS))
    except SafetensorError:  # `check_policy_source` says what is wrong
        return
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
        raise AMAError(f"The tokenizer of '{place.given}' cannot be read: {sentence(error)}") from error
