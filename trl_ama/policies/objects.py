"""What is checked of policies that are given as loaded models, or in place of one: PEFT adapts a model in place, so that two
objects can be one model."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from ..common.errors import AMAError
from ..common.hub import split_revision
from .files import PolicySource, hub_commit


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def check_policy(model: "str | PreTrainedModel | PeftModel", has_reference_model: bool) -> None:
    """Raise an `AMAError` for a policy whose adapters DPOTrainer does not train, or mistakes.

    Args:
        model: The policy, as DPOTrainer is given it.
        has_reference_model (`bool`): Whether it is given a `ref_model`, too.
    """
    if isinstance(model, str):
        check_is_model(model)
        return
    if not is_peft_model(model):
        if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
            raise AMAError(
                f"There are adapters in this {type(model).__name__}, put there by its load_adapter or by a PeftModel that it is the base "
                "of, so it is not the base any more. Pass the PeftModel (`PeftModel.from_pretrained(base, adapter, is_trainable=True)`), "
                "or a base that is loaded anew."
            )
        return
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise AMAError(
            "The policy's adapter is merged into the base's weights, so training it would change nothing, and without it the base is not "
            "the base. Call `model.unmerge_adapter()`, or load it again."
        )
    if has_reference_model:
        return
    names, active = list(model.peft_config), list(model.active_adapters)
    if active != ["default"]:
        raise AMAError(
            f"The policy has the adapters {names}, of which {active} is active, and DPOTrainer trains one that is called 'default'. Load "
            "it without adapter_name and alone, `PeftModel.from_pretrained(base, adapter, is_trainable=True)`, or pass ref_model."
        )
    if "ref" in names:
        raise AMAError(
            "The policy has an adapter that is called 'ref', and DPOTrainer keeps the reference under that name. Take it off with "
            "`model.delete_adapter('ref')`, or pass ref_model."
        )


def check_is_model(model: str, revision: str | None = None, error: Exception | None = None) -> None:
    """Raise an `AMAError` if what a run is to start from is an adapter's folder or repository, not a model's.

    Args:
        model (`str`): Folder or Hub id. The Hub is only asked if the model could not be loaded.
        revision (`str`, *optional*): Of a Hub id.
        error (`Exception`, *optional*): Why it could not be loaded.
    """
    name, pinned = split_revision(model)
    config, who = None, f"the model '{model}'"
    if os.path.isdir(name):
        config = PolicySource(who, model, name).adapter_config
    elif error is not None:
        with contextlib.suppress(AMAError):  # the other error says more
            config = PolicySource(who, model, name, hub_commit(name, pinned or revision, who=who)).adapter_config
    if config is not None:
        raise AMAError(
            f"'{model}' is an adapter (of '{config.get('base_model_name_or_path')}'), and training starts from a model. Merge the two, "
            f"`trl ama-merge --adapter {model} --output merged`, and name the result. AMATrainer also takes the adapter as it is, which "
            f"is then the reference: `AutoPeftModelForCausalLM.from_pretrained('{model}', is_trainable=True)`."
        ) from error


def check_specialist_objects(
    model: "str | PreTrainedModel | PeftModel", specialists: dict[str, Any], peft_config: "PeftConfig | None" = None
) -> None:
    """Raise an `AMAError` for specialists that would not be scored with weights of their own.

    Args:
        model: The policy, as AMATrainer is given it.
        specialists (`dict`): Task to adapter path, Hub id or model.
        peft_config (`PeftConfig`, *optional*): The policy's.
    """
    if getattr(peft_config, "layer_replication", None) and any(isinstance(one, str) for one in specialists.values()):
        raise AMAError(
            "peft_config sets layer_replication, which makes another base model, and the specialists are adapters of the one it is made "
            "from. Save the model with its layers replicated, and train specialists on that."
        )
    objects = {task: source for task, source in specialists.items() if isinstance(source, torch.nn.Module)}
    weights = {task: {id(parameter) for parameter in source.parameters()} for task, source in objects.items()}
    own = set() if isinstance(model, str) else {id(parameter) for parameter in model.parameters()}
    for task, source in objects.items():
        adapters = list(getattr(source, "peft_config", ()))
        if own & weights[task]:
            raise AMAError(
                f"The specialist of task '{task}' and the policy share weights: they were made from one base object, which PEFT adapts in "
                f"place. {_apart(task)}"
            )
        for other, theirs in objects.items():
            if other == task or not weights[task] & weights[other]:
                continue
            if theirs is not source:
                raise AMAError(
                    f"The specialists of tasks '{task}' and '{other}' share weights: they were made from one base object, which PEFT adapts "
                    f"in place, so both are what was put on it last. {_apart(other)}"
                )
            if len(adapters) > 1:
                raise AMAError(
                    f"The specialists of tasks '{task}' and '{other}' are one object with the adapters {adapters}, and which is whose is not "
                    f"known. {_apart(other)}"
                )


def _apart(task: str) -> str:
    return f"Give the adapter's folder or Hub id, or load the specialist of '{task}' on a base of its own."
