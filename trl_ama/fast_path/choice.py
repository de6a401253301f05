"""Where prefix sharing is exact, and where it is no slower. Exact: rules, a trial of every model, and a proof on real pairs; detect,
never guess. No slower: a rule from shapes and the device, in `fast_path/worth.py`.

The rules, in `fast_path/rules.py`, name what is known to make a difference, or may come to make one later. The trial of every model, in
`fast_path/trial.py`, finds what no rule knows, on pairs of all lengths; the proof, in `fast_path/proof.py`, what no trial shows, on the
first batch of a training, of an evaluation and of a sweep.

What several processes must be of one mind about (a model that is shared out runs on all of them or on none) they agree on before
and after the trial, and never inside of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from trl import DPOTrainer

from ..common.errors import AMAError
from ..common.processes import is_sharded, of_all
from .collating import ReadyPairs, in_one_row
from .forward import causal_lm, unwrapped
from .leak import first_known
from .packing import CannotShare, PackedPairs
from .proof import DRAWS, NoVerdict, RandomState, kept_random_state, prove
from .rules import broken_rule, computes_in_32_bits, hook_kind, level, modules_that_may_draw
from .stand_in import CALL, SharedForward
from .trial import Tried, try_model
from .worth import has_varlen, is_worth_it, slower, why_slow


logger = get_logger(__name__)

_LATER = "the first batch says nothing"  # its numbers are not finite, or another process has none that can be packed


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
        self._hooks: WeakKeyDictionary[torch.nn.Module, list[dict]] = WeakKeyDictionary()
        # What each model was found to be on its first batch, by how it is called: `None` if both paths are the same
        self._proofs: WeakKeyDictionary[torch.nn.Module, dict[tuple, str | None]] = WeakKeyDictionary()
        self._drew: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
        self._said: set[str] = set()
        self.taken = {"fast": 0, "plain": 0}  # how many calls took which path

    def forward(
        self, model: torch.nn.Module, metrics: bool = True, ready: ReadyPairs | None = None, graph: bool = True
    ) -> SharedForward:
        """A stand-in for the model where it is only called, as `DPOTrainer` calls it; without `metrics`, for log-probs; without
        `graph`, for numbers of which some pairs are then run `again`."""
        return SharedForward(self, model, metrics, ready, graph)

    def pack(
        self, model: torch.nn.Module, kwargs: dict[str, Any], use: str | None = None, ready: ReadyPairs | None = None
    ) -> PackedPairs | None:
        """The batch of a call as packed pairs; `None` if the call goes to the model as it is.

        Args:
            model (`torch.nn.Module`): The model as it is called.
            kwargs (`dict`): The call.
            use (`str`, *optional*): What for. The first call for it is run both ways, on all processes at the same time.
            ready ([`ReadyPairs`], *optional*): Of [`ready_pairs`], of the batch whose answers are labelled in this call.
        """
        if self.mode is False or not kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            return None
        rule = self._broken_rule(model, kwargs)
        pairs, reason = (None, rule) if rule else in_one_row(kwargs, ready)
        slow = self._why_slow(model, kwargs, pairs)
        # Other processes, with other batches, may be at the proof, unless all do the same
        if slow is None or (_several_processes() and not is_sharded(self._trainer.accelerator)):
            reason = self._tried(model, kwargs, pairs, reason, together=use is not None and rule is None)
            if use is not None:
                reason = self._proven(model, kwargs, pairs if reason is None else None, reason, use)
        if reason is None and slow is None:
            self.taken["fast"] += 1
            return pairs
        if reason is None:
            self._leave(model, slow)
        else:
            self._refuse(model, reason)
        return None

    def _tried(
        self,
        model: torch.nn.Module,
        kwargs: dict[str, Any],
        pairs: PackedPairs | None,
        reason: str | None,
        together: bool,
    ) -> str | None:
        """Why the call may not run as a row, if it may not, by the trial as well."""
        try:
            if reason is None or (together and self._agrees(model)):
                self.check(model, pairs, kwargs, together)
        except CannotShare as error:
            return reason or str(error)
        return reason

    # ---- Whether it is worth it ----

    def _why_slow(self, model: torch.nn.Module, kwargs: dict[str, Any], pairs: PackedPairs | None) -> str | None:
        """Why the plain path is taken although it may not have to be; of a model that is shared out, the same for all processes."""
        device, inner = _device_of(kwargs), causal_lm(model)
        if self.mode is True or device.type == "cpu":
            return None
        # Nor may a window decide by the lengths of one process
        longest = None if is_sharded(self._trainer.accelerator) else pairs and pairs.longest
        if has_varlen(inner, device, self._trainer.accelerator.mixed_precision, longest):
            return None
        trains = model.training and torch.is_grad_enabled()
        # By their own batches, processes that share a model out would take different paths
        is_slow = is_sharded(self._trainer.accelerator) or (
            pairs and not is_worth_it(device.type, False, inner.config, pairs, kwargs["input_ids"].numel(), trains)
        )
        return why_slow(device.type) if is_slow else None

    def _leave(self, model: torch.nn.Module, slow: str, counts: bool = True) -> None:
        self.taken["plain"] += counts
        if slow not in self._said:
            self._said.add(slow)
            logger.warning(slower(type(causal_lm(model)).__name__, slow))

    # ---- Proof on the batch at hand ----

    def forget(self) -> None:
        """Prove everything again: another training begins, or one that was interrupted."""
        if getattr(self._trainer.args, "use_liger_kernel", False):
            self._trials.clear()  # the Trainer has just put other layers into the model
        self._proofs.clear()
        self._drew.clear()

    def may_draw(self, model: torch.nn.Module) -> bool:
        """Whether training draws random numbers in the forward pass; also if that is not known yet."""
        return self._drew.get(model, True) or self._draws(model)

    def note_draws(self, model: torch.nn.Module, drew: bool) -> None:
        """Remember whether a forward pass in training drew random numbers."""
        self._drew[model] = drew

    def knows_draws(self, model: torch.nn.Module) -> bool:
        """Whether that was noted."""
        return model in self._drew

    def _proven(
        self, model: torch.nn.Module, kwargs: dict[str, Any], pairs: PackedPairs | None, reason: str | None, use: str
    ) -> str | None:
        """Why this call takes the plain path, if it does; by a proof if the model was not called like this before."""
        if pairs is None and not _several_processes():
            return reason
        verdicts = self._proofs.setdefault(model, {})
        # A hook that is set later, or another adapter, is another case
        adapter = getattr(unwrapped(model), "active_adapter", None)
        key = (use, model.training, self._count_hooks(model), str(adapter))
        if key not in verdicts:
            reasons = of_all(reason)
            if None not in reasons:
                verdicts[key] = reason  # and no process asks the others again
            elif any(reasons):
                return reason or _LATER
            else:
                found = self.prove(model, kwargs, pairs)
                if found == _LATER:
                    return found
                verdicts[key] = found
        return verdicts[key] if reason is None else reason

    def prove(
        self, model: torch.nn.Module, kwargs: dict[str, Any], pairs: PackedPairs, at_once: int | None = None
    ) -> str | None:
        """What all processes agree on after each has run a batch both ways; `None` if the fast path is right everywhere."""
        if is_sharded(self._trainer.accelerator):
            return None  # every process would have to run the layers as often as the others, whatever it finds
        try:
            prove(model, kwargs, pairs, self._is_exact(causal_lm(model)), at_once)
            found = None
        except CannotShare as error:
            found = str(error)
        except NoVerdict:
            found = _LATER
        others = [other for other in of_all(found) if other is not None]
        return next((other for other in others if other != _LATER), others[0] if others else None)

    def plain_policies(
        self,
        policies: dict[str, Callable[[], AbstractContextManager[torch.nn.Module]]],
        kwargs: dict[str, Any],
        at_once: int,
    ) -> set[str]:
        """Which policies of a sweep must be scored on the plain path, by its first batch; the same on every process.

        Args:
            policies (`dict`): Name → opens the policy's model.
            kwargs (`dict`): The call of the batch that the sweep begins with.
            at_once (`int`): Pairs of it that the plain path takes at a time.
        """
        plain = set()
        for name, policy in ({} if self.mode is False else policies).items():
            with torch.no_grad(), policy() as model, self._trainer.accelerator.autocast():
                rule = self._broken_rule(model, kwargs)
                pairs, reason = (None, rule) if rule else in_one_row(kwargs)
                slow = self._why_slow(model, kwargs, pairs)
                if slow is not None:  # on every process, which all begin with this batch
                    plain.add(name)
                    self._leave(model, slow, counts=False)
                    continue
                reason = self._tried(model, kwargs, pairs, reason, together=rule is None)
                if any(other is not None for other in of_all(reason)):
                    continue  # `pack` says it again
                reason = self.prove(model, kwargs, pairs, at_once)
                if reason is not None:
                    plain.add(name)
                    self._refuse(model, reason, counts=False)
        return plain

    def _count_hooks(self, model: torch.nn.Module) -> int:
        """Different hooks of all modules; which modules there are is looked up once."""
        if model not in self._hooks:
            self._hooks[model] = [
                hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
            ]
        return sum(len(set(map(hook_kind, hooks.values()))) for hooks in self._hooks[model] if hooks)

    # ---- Rules and trial ----

    def _agrees(self, model: torch.nn.Module) -> bool:
        """Whether the trial of this model needs all processes, and is to come."""
        return _several_processes() and is_sharded(self._trainer.accelerator) and causal_lm(model) not in self._trials

    def check(
        self, model: torch.nn.Module, pairs: PackedPairs | None, kwargs: dict[str, Any], together: bool = False
    ) -> None:
        """Raise `CannotShare` unless these pairs get the same log-probs on both paths.

        Args:
            model (`torch.nn.Module`): The model as it is called.
            pairs ([`PackedPairs`]): The batch; `None` if this process has none that can be packed, and others wait for it.
            kwargs (`dict`): The call.
            together (`bool`, *optional*): Whether all processes are here.
        """
        inner, length = causal_lm(model), pairs and pairs.longest + 1  # the last token of a sequence is not in the row
        if self._agrees(model):
            if not together:
                raise CannotShare("it is shared out, and was not tried on all processes at the same time")
            lengths = of_all(length)
            if None in lengths:
                raise CannotShare(_LATER)
            length = max(lengths)  # of the trial: it has as many calls on all
        known = self._trials.get(inner)
        if known is None or (isinstance(known, Tried) and length > known.length and known.beyond is None):
            try:
                self._trials[inner] = self._try(model, kwargs, length, first=known is None)
                logger.info(f"Prefix sharing is on for {type(inner).__name__}: each prompt runs through it once.")
            except CannotShare as reason:
                # Of a model that passed before, what was tried then still holds
                self._trials[inner] = str(reason) if known is None else Tried(known.length, str(reason))
        result, length = self._trials[inner], pairs.longest + 1
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
        # Truncation lets no pair of the run be longer than max_length. Without it, or without the memory for such a pair, the
        # trial is repeated for longer ones, seldom, as it goes further than they ask
        longest = max(length, getattr(self._trainer.args, "max_length", None) or 2 * length)
        if not first:
            longest = min(longest, 2 * length)
        needed = longest if is_sharded(self._trainer.accelerator) else length  # one process must not try again alone
        with kept_random_state(kwargs["input_ids"].device) as before:
            try:
                agree = _first_of_all if self._agrees(model) else first_known
                return try_model(model, kwargs, longest, self._is_exact(causal_lm(model)), needed, agree)
            except CannotShare as error:
                drew = RandomState(kwargs["input_ids"].device) != before
                if drew:
                    raise CannotShare(DRAWS) from error
                raise

    def _is_exact(self, inner: torch.nn.Module) -> bool:
        return self._trainer.accelerator.mixed_precision == "no" and computes_in_32_bits(inner)

    def _broken_rule(self, model: torch.nn.Module, kwargs: dict[str, Any]) -> str | None:
        """The rule that a call breaks, on all processes alike."""
        if kwargs.get("output_router_logits"):
            return "its load-balancing loss (router_aux_loss_coef) counts every token of both sequences"
        args, accelerator = self._trainer.args, self._trainer.accelerator
        reason = broken_rule(model, args, accelerator.parallelism_config, model.training)
        other = sorted(
            name for name, given in kwargs.items() if name not in CALL and given is not None and given is not False
        )
        if reason is None and other:
            reason = f"the batch also has {other}, which prefix sharing does not know"
        if reason is None and model.training and self._draws(model):
            reason = "dropout is on, and it would draw other numbers (disable_dropout=True turns it off)"
        return reason

    def _draws(self, model: torch.nn.Module) -> bool:
        """Whether anything draws random numbers; which modules could is looked up once, as a walk takes milliseconds."""
        if model not in self._may_draw:
            self._may_draw[model] = modules_that_may_draw(model)
        return any(level(getattr(module, name)) > 0 for module, name in self._may_draw[model])

    def _refuse(self, model: torch.nn.Module, reason: str, counts: bool = True) -> None:
        self.taken["plain"] += counts
        if reason == _LATER:
            return
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


def _device_of(kwargs: dict[str, Any]) -> torch.device:
    return kwargs["input_ids"].device


def _first_of_all(reason: str | None) -> str | None:
    return next((other for other in of_all(reason) if other is not None), None)


def _several_processes() -> bool:
    return PartialState().num_processes > 1
