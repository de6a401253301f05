"""Policies on one base model: adapters are switched on it and never copied, and it is left as it was."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import transformers
from accelerate.utils import is_peft_model, release_memory
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from ..common.errors import AMAError, sentence
from ..common.processes import whole_models
from .adapter_keys import ADAPTER, loading_problem, result_problem, saved_shapes, saved_types
from .base_weights import BaseWeights, drawn_anew
from .checks import check_kind, damaged, misfit
from .files import ADAPTER_WEIGHTS, PolicySource, capital, policy_source
from .own_adapter import reference_base, started_by, true_base
from .parameter_order import restore_parameter_order
from .placement import device_map_like, on_device, spread
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
    """The reference policy: a reference model, the `ref` adapter, or no adapter at all, on a base that is as it was."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
    elif is_peft_model(trainer.model):
        with (
            reference_base(trainer),
            use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None),
        ):
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

    That is `None` if there is none: the adapter writes to weights of the base itself (biases, PiSSA's residual; told by their
    checksums), is of a kind that was not seen to be exact when it is disabled, or stands where an adapter is the reference. The
    reference then has to be run before or after.
    """
    if not isinstance(source, str):
        _check_vocabulary(trainer, who, source)
        keep_weights(source)
        add_fused_lm_head(source.get_base_model() if is_peft_model(source) else source)
        yield on_device(source, trainer.accelerator.device), functools.partial(reference_policy, trainer)
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
    places = spread(model, trainer.accelerator.device)
    if {"cpu", "disk"} & set(places):
        raise AMAError(
            f"The base model does not fit onto the GPU: it is spread over {', '.join(places)}, where PEFT cannot put {place.who} on it. Free "
            "the GPU's memory, load the base in 4 bits (load_in_4bit), or take a larger one."
        )
    try:
        saved_shapes(os.path.join(folder, ADAPTER_WEIGHTS))
    except SafetensorError as error:
        raise damaged(place, error) from error
    base = model.get_base_model() if is_peft_model(model) else model
    with true_base(trainer), _left_as_it_was(base, place) as weights:
        wrapped, changed = put_on(weights, base, config, place, folder)
        is_exact = not changed and config.peft_type in _EXACT_WHEN_DISABLED
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
            yield on_device(wrapped, trainer.accelerator.device), reference
        finally:
            with weights.watched():
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
        AMAError: If it does not fit, or is another model whenever it is loaded.
    """
    return put_on(BaseWeights(base), base, config, place, folder)[0]


def put_on(
    weights: BaseWeights, base: torch.nn.Module, config: PeftConfig, place: PolicySource, folder: str
) -> tuple[PeftModel, bool]:
    """As [`load_adapter`], with whether it changes the base; `weights`, what that held before, can undo it."""
    with weights.watched():
        model = _loaded(base, config, place, folder)
    changed = weights.changed()
    if changed and drawn_anew(base, config, changed):
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') starts from random numbers that are drawn anew at every load "
            f"({started_by(config)}) and taken out of the base model's weights, so nobody can load the model that was trained. Save it "
            "from the run that trained it as a plain adapter: `save_pretrained(…, path_initial_model_for_weight_conversion=…)` (PEFT's "
            "guide to LoRA says how)."
        )
    return model, bool(changed)


def _loaded(base: torch.nn.Module, config: PeftConfig, place: PolicySource, folder: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
        try:
            restore_parameter_order(base, config)
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
    problem = result_problem(model, result.missing_keys, result.unexpected_keys)
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
    last = None
    for name, module in dict(model.named_modules()).items():  # a module, then all that is inside of it
        if last is not None and name.startswith(f"{last}."):
            continue  # went with it, as a wrapper of `target_parameters` that another one is around
        bare = module
        while isinstance(bare, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
            bare = bare.original_module if isinstance(bare, AuxiliaryTrainingWrapper) else bare.get_base_layer()
        if bare is not module:
            model.set_submodule(name, bare)
            last = name
    vars(model).pop("peft_config", None)


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module, place: PolicySource) -> Iterator[BaseWeights]:
    """The bare base model for the time of the context; afterwards, all that an adapter did to the model is undone.

    That is: modules, parameters, hooks, which weights are trainable, and what they hold.
    """
    modules = [
        (module, type(module), dict(module._modules), dict(module._parameters), _hooks(module))
        for module in model.modules()
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_config = vars(model).get("peft_config")
    _take_adapters_off(model)
    weights = BaseWeights(model)
    try:
        yield weights
    finally:
        for module, kind, children, parameters, hooks in modules:
            module.__class__ = kind  # a parametrized module is of a class of its own
            for now, before in ((module._modules, children), (module._parameters, parameters)):
                now.clear()  # their order, too
                now.update(before)
            for now, before in zip(_hooks(module, live=True), hooks, strict=True):  # for gradient checkpointing
                for key in [key for key in now if key not in before]:
                    # transformers puts its own on layers once, at the first call, and they belong to the model
                    if getattr(now[key], "__module__", None) != _CAPTURES_OUTPUTS:
                        del now[key]
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        vars(model).pop("peft_config", None)
        if peft_config is not None:
            model.peft_config = peft_config
        weights.restore(f"{capital(place.who)} ('{place.given}')")


def _hooks(module: torch.nn.Module, live: bool = False) -> tuple[dict, ...]:
    found = (module._forward_hooks, module._forward_pre_hooks)
    return found if live else tuple(dict(hooks) for hooks in found)


@contextlib.contextmanager
def _full_model(trainer: DPOTrainer, place: PolicySource) -> Iterator[tuple[torch.nn.Module, Policy]]:
    trust = trainer.args.trust_remote_code
    kwargs = {"dtype": trainer.model.dtype, "trust_remote_code": trust, **(trainer.args.model_init_kwargs or {})}
    kwargs |= {"revision": place.commit, "use_safetensors": True}
    kwargs["device_map"] = device_map_like(trainer.model, trainer.accelerator.device)
    config = AutoConfig.from_pretrained(
        place.name, revision=place.commit, trust_remote_code=kwargs["trust_remote_code"]
    )
    # By TRL from the main branch's configuration otherwise
    architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    release_memory()  # of the one before, which whoever opened it held until now
    with whole_models():
        model = create_model_from_path(place.name, architecture, **kwargs)
    _check_vocabulary(trainer, place.who, model)
    keep_weights(model)
    add_fused_lm_head(model)
    yield on_device(model, trainer.accelerator.device), functools.partial(reference_policy, trainer)


def _check_vocabulary(trainer: DPOTrainer, who: str, model: PreTrainedModel) -> None:
    theirs = model.get_input_embeddings().weight.shape[0]
    ours = trainer.model.get_input_embeddings().weight.shape[0]
    if theirs != ours:
        raise AMAError(
            f"{capital(who)} has a vocabulary of {theirs} tokens, this run's base model has {ours}. It must come from the "
            "same base model."
        )
