"""Where prefix sharing is exact: rules, and a trial of every model. Detect, never guess.

The rules, here, name what is known to make a difference. The trial of every model, in `prefix_trial.py`, finds what no rule
knows.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import ParallelismConfig
from accelerate.logging import get_logger
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from trl import DPOConfig, DPOTrainer

from .errors import AMAError
from .prefix_sharing import KNOWN_ATTENTION, CannotShare, PackedPairs, causal_lm, pack_pairs, packed_forward, unwrapped
from .prefix_trial import Tried, try_model
from .processes import is_sharded


logger = get_logger(__name__)

_CALL = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}  # what DPOTrainer gives a text model
_SHARED_LAYERS = {"full_attention", "sliding_attention"}


class PrefixSharing:
    """Chooses between the fast and the plain path, per model and per batch.

    Args:
        trainer (`DPOTrainer`): Says what else is asked of the model.
        mode (`str` or `bool`): `"auto"`, `True` (raise an [`AMAError`] where sharing is impossible) or `False`.
    """

    def __init__(self, trainer: DPOTrainer, mode: "str | bool"):
        self._trainer, self.mode = trainer, mode
        self._trials: WeakKeyDictionary[torch.nn.Module, str | Tried] = WeakKeyDictionary()
        self._may_draw: WeakKeyDictionary[torch.nn.Module, list[tuple[torch.nn.Module, str]]] = WeakKeyDictionary()
        self._said: set[str] = set()
        self.taken = {"fast": 0, "plain": 0}  # how many calls took which path

    def forward(self, model: torch.nn.Module, metrics: bool = True) -> "SharedForward":
        """A stand-in for the model where it is only called, as `DPOTrainer` calls it; without `metrics`, for log-probs."""
        return SharedForward(self, model, metrics)

    def pack(self, model: torch.nn.Module, kwargs: dict[str, Any]) -> PackedPairs | None:
        """The batch of a call as packed pairs; `None` if the call must go to the model as it is."""
        if self.mode is False or not kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            return None
        try:
            self._check_call(model, kwargs)
            pairs = pack_pairs(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"] != -100)
            self.check(model, pairs, kwargs)
        except CannotShare as reason:
            self._refuse(model, str(reason))
            return None
        self.taken["fast"] += 1
        return pairs

    def check(self, model: torch.nn.Module, pairs: PackedPairs, kwargs: dict[str, Any]) -> None:
        """Raise `CannotShare` unless these pairs get the same log-probs on both paths."""
        inner, length = causal_lm(model), pairs.longest + 1  # the last token of a sequence is not in the row
        known = self._trials.get(inner)
        if known is None or (isinstance(known, Tried) and length > known.length and known.beyond is None):
            try:
                self._trials[inner] = self._try(model, kwargs, length, first=known is None)
                logger.info(f"Prefix sharing is on for {type(inner).__name__}: each prompt runs through it once.")
            except CannotShare as reason:
                # Of a model that passed before, what was tried then still holds
                self._trials[inner] = str(reason) if known is None else Tried(known.length, str(reason))
        result = self._trials[inner]
        if isinstance(result, str):
            raise CannotShare(result)
        if length > result.length:
            raise CannotShare(f"for sequences of more than {result.length} tokens, {result.beyond}")

    def _try(self, model: torch.nn.Module, kwargs: dict[str, Any], length: int, first: bool) -> Tried:
        if is_sharded(self._trainer.accelerator) and not first:
            # Every process would have to run the layers at the same time, and another one may have shorter sequences
            raise CannotShare(
                "it was not tried, and a sharded model is tried only once: set max_length, and it is tried with that"
            )
        # Truncation lets no pair of the run be longer than max_length. Without it, the trial is repeated for longer ones,
        # seldom, as it goes further than they ask
        longest = max(length, getattr(self._trainer.args, "max_length", None) or 2 * length)
        return try_model(model, kwargs, longest, self._is_exact(causal_lm(model)))

    def _is_exact(self, inner: torch.nn.Module) -> bool:
        return self._trainer.accelerator.mixed_precision == "no" and all(
            parameter.dtype == torch.float32 for parameter in inner.parameters()
        )

    def _check_call(self, model: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_router_logits"):
            raise CannotShare("its load-balancing loss (router_aux_loss_coef) counts every token of both sequences")
        args, accelerator = self._trainer.args, self._trainer.accelerator
        reason = broken_rule(model, args, accelerator.parallelism_config)
        other = sorted(
            name for name, given in kwargs.items() if name not in _CALL and given is not None and given is not False
        )
        if reason is None and other:
            reason = f"the batch also has {other}, which prefix sharing does not know"
        if reason is None and model.training and self._draws(model):
            reason = "dropout is on, and it would draw other numbers (disable_dropout=True turns it off)"
        if reason is not None:
            raise CannotShare(reason)

    def _draws(self, model: torch.nn.Module) -> bool:
        """Whether anything draws random numbers; which modules could is looked up once, as a walk takes milliseconds."""
        if model not in self._may_draw:
            self._may_draw[model] = _may_draw(model)
        return any(getattr(module, name) > 0 for module, name in self._may_draw[model])

    def _refuse(self, model: torch.nn.Module, reason: str) -> None:
        self.taken["plain"] += 1
        name = type(causal_lm(model)).__name__
        if self.mode is True:
            raise AMAError(
                f"prefix_sharing=True, but {name} cannot run prompt, chosen and rejected as one sequence: {reason}. Set "
                "prefix_sharing to 'auto' (the plain path where sharing is not exact) or to False."
            )
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(
                f"Prefix sharing is off for {name}: {reason}. The plain path gives the same numbers, slower."
            )


class SharedForward:
    """Forwards calls to the model, on the fast path where it is exact."""

    def __init__(self, sharing: PrefixSharing, model: torch.nn.Module, metrics: bool):
        self._sharing, self._model, self._metrics = sharing, model, metrics

    def __call__(self, *args, **kwargs):
        pairs = None if args else self._sharing.pack(self._model, kwargs)
        if pairs is None:
            return self._model(*args, **kwargs)
        return packed_forward(self._model, pairs, self._metrics, use_cache=False)


def broken_rule(model: torch.nn.Module, args: DPOConfig, parallelism: ParallelismConfig | None = None) -> str | None:
    """The first rule that a model breaks, as half a sentence; `None` if it breaks none and is left to the trial.

    Args:
        model (`torch.nn.Module`): The model in all its wrappers; it is looked at, not run, and may be on the meta device.
        args (`DPOConfig`): The training arguments.
        parallelism (`ParallelismConfig`, *optional*): The accelerator's.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    if getattr(inner.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if config is not inner.config:
        return "it is a multimodal model"
    if inner.config._attn_implementation not in KNOWN_ATTENTION:
        return f"attn_implementation='{inner.config._attn_implementation}' is not one of {list(KNOWN_ATTENTION)}"
    if config._attn_implementation.startswith("flash") and flash_attn_supports_top_left_mask():
        return "this version of flash attention aligns causal masks at the start of the keys"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _SHARED_LAYERS)
    if unknown:
        return f"it has layers of type {unknown}, which are not plain attention"
    adapters = getattr(unwrapped(model), "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "its adapter learns a prompt, which would come before every pair"
    if getattr(args, "n_gpu", 1) > 1:
        return "DataParallel splits a batch by its rows, and a packed batch has one (launch a process for each GPU instead)"
    if args.torch_compile:
        return "torch_compile compiles for shapes, and a packed row has another one at every step"
    if args.use_liger_kernel:
        return "use_liger_kernel replaces layers by kernels that were not tried"
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        return "context or sequence parallelism splits sequences"
    return None


def _may_draw(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Modules, and their attributes, that decide whether they draw random numbers in training; not all are a `Dropout`, which
    TRL turns off."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            found.append((module, "p"))
        else:
            names = [name for name, value in vars(module).items() if isinstance(value, float)]
            found += [(module, name) for name in names if "drop" in name or "jitter" in name]
    return found
