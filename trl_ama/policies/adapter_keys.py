"""Whether an adapter's weights are the ones that PEFT looks for on a base model: found from names and shapes alone."""

import copy
import re
import warnings
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


ADAPTER = "specialist"  # the name under which it is put on a base model
# Kinds whose weights lie in the base model's layers, where the meta device shows them; others show when they are loaded
_IN_LAYERS = {"LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "LN_TUNING", "TRAINABLE_TOKENS"}
_SIZE = re.compile(r"size mismatch for (\S+): .*?\(\[(.*?)\]\).*?\(\[(.*?)\]\)")


def saved_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's weights, without reading them.

    Raises:
        SafetensorError: If it is cut off or no such file.
    """
    with safe_open(file, framework="pt") as weights:
        return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118


def saved_types(file: str) -> set[str]:
    """Types of a safetensors file's weights, as it names them: `F32`, `BF16`, ….

    Raises:
        SafetensorError: If it is cut off or no such file.
    """
    with safe_open(file, framework="pt") as weights:
        return {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118


def keys_problem(config: PeftConfig, shapes: dict[str, tuple[int, ...]], base_model: str, **kwargs: Any) -> str | None:
    """What is wrong with an adapter's weights for a base model, in words; `None` if nothing is, or if it cannot be told.

    The base is built from its configuration on the meta device, where tensors have shapes but no content.

    Args:
        config (`PeftConfig`): The adapter's.
        shapes (`dict`): Of [`saved_shapes`].
        base_model (`str`): Path or Hub id.
        kwargs: For `AutoConfig`: `revision`, `trust_remote_code`.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) not in _IN_LAYERS:
        return None
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some of these look into the base's weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _empty_model(base_model, **kwargs)
            with torch.device("meta"):
                model = get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    except Exception as error:  # whatever the base or a kind of adapter needs that the meta device does not have
        return _no_targets(error)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
    except Exception as error:
        return loading_problem(error)
    # As PeftModel.load_adapter does: the base's own weights are missing from every adapter
    missing = [key for key in result.missing_keys if prefix in key and ADAPTER in key]
    return result_problem(model, missing, result.unexpected_keys)


def _empty_model(base_model: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code, **kwargs)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError:  # text and images
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def _no_targets(error: Exception) -> str | None:
    text = " ".join(str(error).split())
    return (
        f"PEFT finds no place for it ({text[:200]})"
        if isinstance(error, ValueError) and "arget modules" in text
        else None
    )


def loading_problem(error: Exception) -> str | None:
    """An error of PEFT's loading in words; `None` if it does not come from the adapter's weights."""
    if isinstance(error, KeyError):  # a whole module that was trained is not in the file
        return f"'{error.args[0]}' is missing"
    sizes = _SIZE.findall(str(error))
    if isinstance(error, RuntimeError) and sizes:
        name, theirs, ours = sizes[0]
        return f"{len(sizes)} have another shape (the first: '{_plain(name)}' is [{theirs}], and should be [{ours}])"
    return _no_targets(error)


def result_problem(model: torch.nn.Module, missing: list[str], unexpected: list[str]) -> str | None:
    """What PEFT's load result says of a model, in words; `None` if every weight found its place.

    Two kinds of weights are saved under one name and looked for under several, or the other way round: those that layers share (VBLoRA's
    vector bank), and trained tokens of a head that is tied to the embeddings.
    """
    if missing:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        brought = {id(parameter) for name, parameter in parameters.items() if name not in missing}
        missing = [name for name in missing if id(parameters.get(name)) not in brought]
    modules = dict(model.named_modules()) if unexpected else {}
    unexpected = [
        name
        for name in unexpected
        if getattr(modules.get(name.partition(".trainable_tokens_delta")[0]), "tied_adapter", None) is None
    ]
    parts = [
        f"{len(names)} are {kind} (the first: '{_plain(names[0])}')"
        for kind, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
        if names
    ]
    return " and ".join(parts) or None


def _plain(key: str) -> str:
    return key.replace(f".{ADAPTER}", "").removeprefix("base_model.model.")
