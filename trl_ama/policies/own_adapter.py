"""The base under a policy's own adapter: what it held before the adapter was made, for whoever has to be scored on it.

Where PEFT starts an adapter from the base's weights (PiSSA, OLoRA, KaSA, …), it takes out of the base what it puts into the
adapter: with the adapter disabled, which is DPOTrainer's reference, a model is left that nobody trained on or ever saw. And
where biases are trained along (`bias="all"`), that reference moves with them. Here the reference, and what specialists are put
on, is the base as it was: the numbers of a DPOTrainer that is given it as `ref_model`.

A policy that leaves the base alone, as nearly all do, costs two passes of checksums when it is made. Otherwise the weights that
differ are kept twice, on the model's device once they were used: what a `ref_model` would take. With reference log-probs in the
dataset they are not used while training.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import trl.trainer.dpo_trainer
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from ..common.errors import AMAError, sentence
from ..common.processes import is_sharded, whole_models
from .base_weights import BaseWeights, checksums, drawn_anew
from .quantized import is_quantized


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import DPOTrainer

logger = get_logger(__name__)

_CREATE = "get_peft_model"  # DPOTrainer makes its policy with it


class OwnBase:
    """Keeps what differs between the base under a trainer's policy and the base as it was."""

    def __init__(self):
        self._base: dict[int, tuple[Tensor, Tensor]] = {}  # tensor, and what it held as a part of the base
        self._reference: dict[int, tuple[Tensor, Tensor]] = {}  # … and of the reference
        self._swapped: set[int] = set()
        self._given: PeftModel | None = None  # whose base nobody has compared yet

    @property
    def moves_reference(self) -> bool:
        """Whether the model with its adapter disabled is not, or will not stay, the reference."""
        return bool(self._reference)

    @contextlib.contextmanager
    def watched(self, model: "str | PreTrainedModel | PeftModel") -> Iterator[None]:
        """While open, DPOTrainer's adapters are made under this one's eyes.

        Args:
            model: The policy, as DPOTrainer is given it.

        Raises:
            AMAError: If an adapter is made in a way that leaves no base, or cannot be made.
        """
        given = model if isinstance(model, PeftModel) else None
        create = getattr(trl.trainer.dpo_trainer, _CREATE)
        setattr(trl.trainer.dpo_trainer, _CREATE, lambda *args, **kwargs: self._create(create, *args, **kwargs))
        if given is not None:
            self._given = given
            self._reference |= _copies(bare_tensors(given.get_base_model()).values())
            add = given.add_adapter
            given.add_adapter = lambda *args, **kwargs: _add(given, add, *args, **kwargs)
        try:
            yield
        finally:
            setattr(trl.trainer.dpo_trainer, _CREATE, create)
            if given is not None:
                vars(given).pop("add_adapter", None)

    def _create(
        self, create: Callable[..., PeftModel], model: "PreTrainedModel", config: PeftConfig, *args: Any, **kwargs: Any
    ) -> PeftModel:
        weights = BaseWeights(model)
        with weights.watched():
            policy = create(model, config, *args, **kwargs)
        changed = weights.changed()
        if any(original is None for _, _, original in changed):
            weights.restore(f"The policy's adapter ({started_by(config)})")
        if changed and drawn_anew(model, config, changed):
            raise AMAError(
                f"The policy's adapter ({started_by(config)}) starts from random numbers that are drawn anew at every load and taken "
                "out of the base model's weights, so the trained policy could not be loaded again. Choose a start that is the same "
                "every time, such as init_lora_weights='pissa'."
            )
        self._base = {id(tensor): (tensor, original) for _, tensor, original in changed}
        self._base = {**_copies(bare_tensors(model).values()), **self._base}
        self._reference = self._base
        if changed:
            size = sum(original.nbytes for _, _, original in changed) / 2**20
            logger.warning(
                f"The policy's adapter ({started_by(config)}) changes {len(changed)} weights of the base model. Reference and specialists "
                f"stay those of the base as it was, of which {size:,.0f} MiB are kept beside it; DPOTrainer's reference would be the "
                "changed base, unless it is given the base as ref_model."
            )
        return policy

    @contextlib.contextmanager
    def _holding(self, contents: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """While open, tensors hold these contents, those that already do excepted."""
        keys = [key for key in contents if key not in self._swapped]
        for key in keys:
            tensor, kept = contents[key]
            contents[key] = (tensor, kept.to(tensor.device))
        for key in keys:
            tensor, kept = contents[key]
            contents[key] = (tensor, tensor.data)
            tensor.data = kept
        self._swapped.update(keys)
        try:
            yield
        finally:
            self._swapped.difference_update(keys)
            for key in keys:
                tensor, before = contents[key]
                contents[key] = (tensor, tensor.data)
                tensor.data = before

    @contextlib.contextmanager
    def reference(self, trainer: "DPOTrainer") -> Iterator[None]:
        """While open, the policy's base is what it is in the reference policy.

        Raises:
            AMAError: If the model was shared out among processes, so that its weights cannot be exchanged.
        """
        if self._reference and is_sharded(trainer.accelerator) and not self._swapped:
            raise AMAError(
                "The policy's adapter changes or trains weights of the base model itself, and a model that is shared out among processes "
                "(FSDP, DeepSpeed) cannot be put back to it for the reference. Compute the reference columns first with "
                "`trl ama-losses`, pass ref_model, or use an adapter that leaves the base alone (bias='none', init_lora_weights=True)."
            )
        with self._holding(self._reference):
            yield

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """While open, the policy's base is the base that specialists belong to."""
        if self._given is not None:
            self._base |= _different(self._given)
            self._given = None
        with self._holding(self._base):
            yield


def true_base(trainer: "DPOTrainer") -> contextlib.AbstractContextManager[None]:
    """While open, the base under a trainer's policy is the base as it was; see [`OwnBase`]."""
    own = getattr(trainer, "own_base", None)
    return contextlib.nullcontext() if own is None else own.base()


def reference_base(trainer: "DPOTrainer") -> contextlib.AbstractContextManager[None]:
    """While open, the base under a trainer's policy is what the reference policy stands on; see [`OwnBase`]."""
    own = getattr(trainer, "own_base", None)
    return contextlib.nullcontext() if own is None else own.reference(trainer)


def started_by(config: PeftConfig) -> str:
    """What an adapter's start is called, for messages: `init_lora_weights='pissa'`."""
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str):
        return f"init_lora_weights='{init}'"
    if getattr(config, "kasa_config", None) is not None:
        return "kasa_config"
    return f"of the kind {getattr(config.peft_type, 'value', config.peft_type)}"


def bare_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a model has when its adapters are taken off, by the names that they then have."""
    found, seen = {}, set()

    def walk(module: torch.nn.Module, prefix: str) -> None:
        while isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
            is_copied = isinstance(module, AuxiliaryTrainingWrapper)
            module = module.original_module if is_copied else module.get_base_layer()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}{name}"] = tensor
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def _copies(tensors: Iterable[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """What those of the tensors hold that are going to be trained."""
    return {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors if tensor.requires_grad}


def _add(model: PeftModel, add: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Add the adapter that is the reference, which DPOTrainer gives the policy's weights, and leave the base alone."""
    weights = BaseWeights(model.get_base_model())
    try:
        with weights.watched():
            add(*args, **kwargs)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AMAError(
            f"DPOTrainer keeps the reference of a PeftModel as a second adapter, which PEFT refuses here: {sentence(error)} Merge the "
            "adapter into a model (`trl ama-merge`), and pass that with a new peft_config."
        ) from error
    weights.restore("The adapter of the reference")


def _different(policy: PeftModel) -> dict[int, tuple[Tensor, Tensor]]:
    """Where the base under a `PeftModel` of the user's is not the one that it is named after: tensors, and what that holds.

    Whether its adapter has changed the base is not to be seen in the object: the base is loaded once more, by its name.
    """
    base, name = policy.get_base_model(), get_config_model_id(policy.config)
    if is_quantized(base) or not name:
        return {}
    ours = bare_tensors(base)
    revision = getattr(policy.peft_config.get("default"), "revision", None)
    try:
        with whole_models():
            named = type(base).from_pretrained(name, dtype=base.dtype, revision=revision, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning(
            f"Whether the base of this PeftModel is '{name}', which the specialists belong to, is not known: {sentence(error)}"
        )
        return {}
    theirs = {key: tensor for key, tensor in bare_tensors(named).items() if key in ours}
    sums = zip(checksums(ours[key].data for key in theirs), checksums(theirs.values()), strict=True)
    found = {
        id(ours[key]): (ours[key], tensor.data)
        for (key, tensor), (one, other) in zip(theirs.items(), sums, strict=True)
        if one != other and one[:2] == other[:2]
    }
    if found:
        logger.warning(
            f"The base of this PeftModel differs from '{name}' in {len(found)} weights, as an adapter that changes its base leaves it. "
            "Specialists are scored on the base of that name."
        )
    return found
