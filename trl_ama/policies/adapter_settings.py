"""What is wrong with an adapter's settings for a model, by the names of its modules: PEFT says that nothing fits, not what would."""

import re
import warnings

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper

from ..common.errors import AMAError, nearest


_MOST_SHOWN = 12
_LAYERS = (torch.nn.Linear, torch.nn.Embedding)
_OTHER_LAYERS = ("Conv1D", "Linear4bit", "Linear8bitLt")


def leaf_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of the layers that adapters are for, in their order, each once; adapted ones under their own name."""
    found: dict[str, None] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{layer}.") for layer in adapted[-1:]):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            adapted.append(name)
        last = name.rpartition(".")[2]
        if (
            is_adapted or isinstance(module, _LAYERS) or type(module).__name__ in _OTHER_LAYERS
        ) and not last.isdigit():
            found[last] = None
    return [name for name in found if name]


def check_adapter(model: torch.nn.Module, config: PeftConfig, is_on: bool = False) -> None:
    """Find names in an adapter's settings that nothing in the model has.

    Some of a list is a warning, as PEFT then adapts the others without a word.

    Args:
        model (`torch.nn.Module`): The model.
        config (`PeftConfig`): The adapter's.
        is_on (`bool`): Whether the adapter is on the model already, which PEFT has then found a place for.

    Raises:
        AMAError: If none of `target_modules` fits, or `target_parameters` goes with dropout.
    """
    targets = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None)
    if parameters and not is_on:
        alone = targets is not None and not targets
        _check_parameters(model, list(parameters), getattr(config, "lora_dropout", 0), alone)
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return
        _check_expression(model, targets, names, bool(parameters))
        return
    if targets:
        unknown = [target for target in targets if not any(_matches(name, target) for name in names)]
        if len(unknown) == len(targets) and not parameters:
            raise AMAError(_not_there(model, sorted(unknown)))
        if unknown:
            _warn(f"{_not_there(model, sorted(unknown))} Only the others are adapted.")
    saved = getattr(config, "modules_to_save", None) or []
    unknown = [name for name in saved if not any(_matches(module, name) for module in names)]
    if unknown:
        _warn(
            f"lora_modules_to_save names {sorted(unknown)}, which the model has no module of, so nothing is trained for it."
        )


def check_head(model: torch.nn.Module) -> None:
    """Raise an `AMAError` if the LM head is one that DPOTrainer's fused head cannot read, with an adapter on."""
    if isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise AMAError(
            "trainable_token_indices trains rows of the embeddings that are the LM head's, too (tie_word_embeddings), and DPOTrainer's "
            "fused head reads its weight as it was. Leave trainable_token_indices out, or untie the model and save it."
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_expression(model: torch.nn.Module, targets: str, names: list[str], optional: bool) -> None:
    try:
        found = any(re.fullmatch(targets, name) for name in names)
    except re.error as error:
        raise AMAError(
            f"lora_target_modules '{targets}' is one name, which PEFT takes as a regular expression, and it is none ({error}). Give a list "
            f"of names: {leaf_names(model)[:_MOST_SHOWN]}."
        ) from error
    if not found and not optional:
        raise AMAError(_not_there(model, [targets]))


def _not_there(model: torch.nn.Module, unknown: list[str]) -> str:
    known = leaf_names(model)
    first = unknown[0]
    separate = [part for part in re.split(r"[,\s]+", first) if part]
    if len(separate) > 1:
        hint = f" Give them one by one: lora_target_modules: [{', '.join(separate)}], or --lora_target_modules {' '.join(separate)}."
    else:
        hint = nearest(first, known)
    return (
        f"lora_target_modules names {unknown if len(unknown) > 1 else repr(first)}, and the model '{model.name_or_path}' has no such "
        f"module; it has {known[:_MOST_SHOWN]}.{hint}"
    )


def _check_parameters(model: torch.nn.Module, targets: list[str], dropout: float, alone: bool) -> None:
    known = [name for name, _ in model.named_parameters()]
    unknown = [target for target in targets if not any(_matches(name, target) for name in known)]
    if len(unknown) < len(targets) and dropout:
        raise AMAError(
            f"lora_target_parameters goes with no dropout in PEFT, and lora_dropout is {dropout}. Set lora_dropout: 0."
        )
    if unknown:
        ends = list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in known if "." in name))
        said = (
            f"lora_target_parameters names {unknown}, and the model '{model.name_or_path}' has no such parameter; it has, for "
            f"example, {ends[:_MOST_SHOWN]}."
        )
        if alone and len(unknown) == len(targets):
            raise AMAError(said)
        _warn(f"{said} Only the others are adapted.")


def explain_adapter(error: Exception, model: torch.nn.Module | None) -> str | None:
    """The sentence that goes on after an error of PEFT's, with the keys that it is about; `None` if it is not PEFT's."""
    trace = error.__traceback__
    while trace is not None:
        if "/peft/" in trace.tb_frame.f_code.co_filename.replace("\\", "/"):
            has = "" if model is None else f"; the model has the layers {leaf_names(model)[:_MOST_SHOWN]}"
            return f"Look at the lora_* keys (peft_config){has}."
        trace = trace.tb_next
    return None


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
