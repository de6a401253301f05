"""Policies on one base model: adapters are switched on it and never copied, and it is left as it was."""

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import transformers
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from .adapter_keys import ADAPTER, changes_base, loading_problem, result_problem, saved_shapes, saved_types
from .errors import AMAError, sentence
from .policy_files import ADAPTER_WEIGHTS, PolicySource, capital, policy_source
from .policy_sources import check_kind, damaged, misfit
from .processes import whole_models
from .quantized import is_quantized, keep_weights


# Gives a policy's model for the time of a context: for one batch, or for all of them
Policy = Callable[[], AbstractContextManager[torch.nn.Module]]
_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"
# Kinds of adapters that were seen to leave, when PEFT disables them, the base bit by bit
_EXACT_WHEN_DISABLED = {
    PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR, PeftType.IA3, PeftType.VERA
}  # fmt: skip


@contextlib.contextmanager
def reference_policy(trainer: DPOTrainer) -> Iterator[torch.nn.Module]:
    """The reference policy that `DPOTrainer` would use: a reference model, the `ref` adapter, or no adapter at all."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
    elif is_peft_model(trainer.model):
        with use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None):
            yield trainer.model
    else:
        yield trainer.model


@contextlib.contextmanager
def trained_policy(
    trainer: DPOTrainer, who: str, source: "str | PreTrainedModel | PeftModel"
) -> Iterator[torch.nn.Module]:
    """A policy trained from the trainer's base model (a specialist, a generalist), for the time of the context.

    Args:
        trainer (`DPOTrainer`): Holds the base model; if `source` is an adapter, it is put on that model and taken off
            again.
        who (`str`): For messages, e.g. `"the specialist of task 'code'"`.
        source: Adapter or model folder, Hub id with an optional `@revision`, or a loaded model.

    Raises:
        AMAError: If the policy belongs to another base model or cannot be read.
    """
    with trained_policy_and_reference(trainer, who, source) as (model, _):
        yield model


@contextlib.contextmanager
def trained_policy_and_reference(
    trainer: DPOTrainer, who: str, source: "str | PreTrainedModel | PeftModel"
) -> Iterator[tuple[torch.nn.Module, Policy | None]]:
    """As [`trained_policy`], with the way to the reference policy while it is there.

    That is `None` if there is none: the adapter writes to weights of the base itself (biases, PiSSA's residual), is of a kind
    that was not seen to be exact when it is disabled, or stands where an adapter is the reference. The reference then has
    to be run before or after.
    """
    if not isinstance(source, str):
        _check_vocabulary(trainer, who, source)
        keep_weights(source)
        add_fused_lm_head(source.get_base_model() if is_peft_model(source) else source)
        yield source.to(trainer.accelerator.device), functools.partial(reference_policy, trainer)
        return
    init_kwargs = trainer.args.model_init_kwargs or {}
    place = policy_source(who, source)
    is_adapter = check_kind(
        get_config_model_id(trainer.model.config),
        place,
        base_revision=init_kwargs.get("revision"),
        trust_remote_code=init_kwargs.get("trust_remote_code", trainer.args.trust_remote_code),
    )
    with (_adapter if is_adapter else _full_model)(trainer, place) as model_and_reference:
        yield model_and_reference


@contextlib.contextmanager
def _adapter(trainer: DPOTrainer, place: PolicySource) -> Iterator[tuple[torch.nn.Module, Policy | None]]:
    model, folder, config = trainer.model, place.adapter_folder(), place.peft_config()
    try:
        keys = list(saved_shapes(os.path.join(folder, ADAPTER_WEIGHTS)))
    except SafetensorError as error:
        raise damaged(place, error) from error
    base = model.get_base_model() if is_peft_model(model) else model
    changed = changes_base(config, base, keys)
    is_exact = not changed and config.peft_type in _EXACT_WHEN_DISABLED
    with _left_as_it_was(base, changed):
        _take_adapters_off(base)
        wrapped = load_adapter(base, config, place, folder)
        if isinstance(base.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):
            wrapped.unload()
            raise AMAError(
                f"{capital(place.who)} ('{place.given}') adapts the LM head itself, and TRL's fused head would leave its adapter "
                "out (DPOTrainer refuses such a policy, too). Merge it into a model and name that instead."
            )
        reference = None
        if trainer.ref_model is not None:
            reference = functools.partial(reference_policy, trainer)
        elif is_exact and "ref" not in getattr(model, "peft_config", ()):
            reference = functools.partial(_disabled, wrapped)
        try:
            yield wrapped.to(trainer.accelerator.device), reference
        finally:
            wrapped.unload()


@contextlib.contextmanager
def _disabled(model: PeftModel) -> Iterator[PeftModel]:
    with model.disable_adapter():
        yield model


def load_adapter(base: torch.nn.Module, config: PeftConfig, place: PolicySource, folder: str) -> PeftModel:
    """Put an adapter on a base model by PEFT, which only warns about weights that it finds no place for, or does not find.

    Args:
        base (`torch.nn.Module`): The bare base model; adapted in place.
        config (`PeftConfig`): The adapter's.
        place ([`PolicySource`]): Where it comes from, for messages.
        folder (`str`): Holds its weights.

    Raises:
        AMAError: If it does not fit.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
        try:
            model = get_peft_model(base, config, adapter_name=ADAPTER)
            result = model.load_adapter(
                folder, adapter_name=ADAPTER, key_mapping=getattr(base, "_checkpoint_conversion_mapping", None)
            )
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            problem = loading_problem(error)
            name = get_config_model_id(base.config)
            if problem is not None:
                raise misfit(place, name, problem) from error
            raise AMAError(
                f"PEFT cannot put {place.who} ('{place.given}') on the base model '{name}': {sentence(error)} Use an adapter "
                "of another kind, or merge it into a model and name that instead."
            ) from error
    problem = result_problem(result.missing_keys, result.unexpected_keys)
    if problem is not None:
        raise misfit(place, get_config_model_id(base.config), problem)
    if is_quantized(base) and "BF16" in saved_types(os.path.join(folder, ADAPTER_WEIGHTS)):
        _compute_as_trained(model)
    return model


def _compute_as_trained(model: PeftModel) -> None:
    """Give an adapter's weights the type that DPOTrainer trains and saves them in on a quantised base.

    PEFT loads them in 32 bits, and the same numbers multiplied in another type are other log-probs.
    """
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}" in name and parameter.is_floating_point() and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def _take_adapters_off(model: torch.nn.Module) -> None:
    """Leave the bare base model: PEFT can load one kind of adapter beside another only if they are much alike."""
    for name, module in dict(model.named_modules()).items():
        bare = module
        while isinstance(bare, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
            bare = bare.original_module if isinstance(bare, AuxiliaryTrainingWrapper) else bare.get_base_layer()
        if bare is not module:
            model.set_submodule(name, bare)
    vars(model).pop("peft_config", None)


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module, changed: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put back what an adapter did to a model: modules, hooks, which weights are trainable, and contents of `changed`."""
    modules = dict(model.named_modules())
    hooks = [(module, list(module._forward_hooks)) for module in modules.values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    contents = [(parameter, parameter.detach().clone()) for parameter in changed]
    peft_config = vars(model).get("peft_config")
    try:
        yield
    finally:
        for name, module in modules.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        for module, names in hooks:  # for gradient checkpointing
            for name in [name for name in module._forward_hooks if name not in names]:
                # transformers puts its own on layers once, at the first call, and they belong to the model
                if getattr(module._forward_hooks[name], "__module__", None) != _CAPTURES_OUTPUTS:
                    del module._forward_hooks[name]
        for parameter, content in contents:
            parameter.data = content
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        vars(model).pop("peft_config", None)
        if peft_config is not None:
            model.peft_config = peft_config


@contextlib.contextmanager
def _full_model(trainer: DPOTrainer, place: PolicySource) -> Iterator[tuple[torch.nn.Module, Policy]]:
    trust = trainer.args.trust_remote_code
    kwargs = {"dtype": trainer.model.dtype, "trust_remote_code": trust, **(trainer.args.model_init_kwargs or {})}
    kwargs |= {"revision": place.commit, "use_safetensors": True}
    config = AutoConfig.from_pretrained(
        place.name, revision=place.commit, trust_remote_code=kwargs["trust_remote_code"]
    )
    # By TRL from the main branch's configuration otherwise
    architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    with whole_models():
        model = create_model_from_path(place.name, architecture, **kwargs)
    _check_vocabulary(trainer, place.who, model)
    keep_weights(model)
    add_fused_lm_head(model)
    try:
        yield model.to(trainer.accelerator.device), functools.partial(reference_policy, trainer)
    finally:
        del model
        gc.collect()


def _check_vocabulary(trainer: DPOTrainer, who: str, model: PreTrainedModel) -> None:
    theirs = model.get_input_embeddings().weight.shape[0]
    ours = trainer.model.get_input_embeddings().weight.shape[0]
    if theirs != ours:
        raise AMAError(
            f"{capital(who)} has a vocabulary of {theirs} tokens, this run's base model has {ours}. It must come from the "
            "same base model."
        )
