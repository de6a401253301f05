"""The first batch of a run or of a sweep, run both ways and compared pair by pair.

A trial (`fast_path/trial.py`) has invented pairs, before training has set its hooks. What acts on some tokens alone (an adapter that
waits for its invocation), on whole rows (noise scaled by their length) or in training alone shows only on real pairs, with the
model as it is trained. An adapter that was just made does nothing yet, wherever it acts: so it is moved a little, both ways are
compared again, and it is put back.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .failures import FAILURES, as_text, is_out_of_memory, says_nothing
from .forward import causal_lm, packed_forward, unwrapped
from .leak import EXACT, why_tokens_meet
from .packing import CannotShare, PackedPairs, pack_call
from .trial import ROUNDED


DRAWS = "it draws random numbers, and would draw others for a packed row"
_ADAPTED = 2  # pairs on which a moved adapter is compared
_MOVES = (0.02, 0.08, 0.32)  # standard deviations by which it is moved, until its effect is far above rounding
_EXACT_MEAN = 1e-4  # of the log-prob of a sequence, in 32 bits
_ROUNDED_32 = 1e-6  # nats a token, what log-probs in 32 bits differ by at least
_VISIBLE = 10  # times what the two paths differ by without it
# By what both paths may differ then: a share of the effect that moving the adapter has, and times what they differ by without.
# In 32 bits they were 1e-5 of the effect apart, and an adapter that mixes tokens of a batch (Lily) 2e-2; one that waits for its
# invocation (aLoRA), 0.5
_OF_EFFECT = {True: (1e-3, 30), False: (0.25, 3)}  # in 32 bits, in 16


class NoVerdict(Exception):
    """The batch says nothing of the two paths: its numbers are not finite on the plain one."""


def prove(
    model: torch.nn.Module, kwargs: dict[str, Any], pairs: PackedPairs, exact: bool, at_once: int | None = None
) -> None:
    """Compare both paths on a batch. Weights and the state of all random numbers are as before when it returns.

    Args:
        model (`torch.nn.Module`): The model as it is used, in all its wrappers; if it is in training mode and gradients are on, what
            an adapter adds is compared, too.
        kwargs (`dict`): The call that `DPOTrainer` makes.
        pairs ([`PackedPairs`]): The same batch, packed.
        exact (`bool`): Whether the model computes in 32 bits.
        at_once (`int`, *optional*): Pairs that fit into memory on the plain path; fewer are tried where they do not.

    Raises:
        CannotShare: If they differ, with what.
        NoVerdict: If the plain path's numbers are not finite.
    """
    while isinstance(model, DistributedDataParallel):  # whose gradients' exchange would begin
        model = model.module
    trains, device = model.training and torch.is_grad_enabled(), kwargs["input_ids"].device
    with kept_random_state(device) as before:
        with torch.no_grad():
            expected = _plain_log_probs(model, kwargs, at_once)  # (2B, L-1)
        drawn, scored = RandomState(device), pairs.scored.to(expected.device)  # the head may be elsewhere than the row
        if not bool(expected[scored].isfinite().all()):
            raise NoVerdict
        if drawn != before:
            with _moved(_trained_adapters(model) if trains else [], _MOVES[1]), torch.no_grad():
                _check_draws(model, kwargs, scored, at_once)
            before.restore()
        # With gradients, if the call has them: gradient checkpointing and a trained head are others without
        shared = _shared_log_probs(model, pairs)  # (2B, L-1)
        if RandomState(device) != drawn:
            raise CannotShare(DRAWS)
        difference = _check_pairs(shared, expected, scored, exact)
        with torch.no_grad():
            reason = why_tokens_meet(
                lambda batch: _shared_log_probs(model, batch),
                lambda call: _plain_log_probs(model, call, at_once),
                _rows(kwargs, 0, _ADAPTED),
                pairs,
                causal_lm(model).config,
                exact,
                known=shared,
            )
        if reason is not None:
            raise CannotShare(reason.replace("in a trial", "on the first batch"))
        if trains:
            del shared
            _check_adapter(model, kwargs, expected, exact, rounding=difference, at_once=at_once)


def _check_draws(model: torch.nn.Module, kwargs: dict[str, Any], scored: Tensor, at_once: int | None) -> None:
    """Raise `CannotShare` if it matters what is drawn; some modules draw whether to be left out, and never are."""
    one, other = (_plain_log_probs(model, kwargs, at_once) for _ in range(2))  # (2B, L-1)
    if not bool(((one - other).abs() <= _EXACT_MEAN * one.abs().clamp(min=1))[scored].all()):
        raise CannotShare(DRAWS)


def _rows(kwargs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The call of some pairs of a batch; everything with 2B rows has chosen ones first."""
    count = len(kwargs["input_ids"])
    rows = torch.arange(count, device=kwargs["input_ids"].device).view(2, -1)[:, start:end].flatten()
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
        for name, value in kwargs.items()
    }


def _plain_log_probs(model: torch.nn.Module, kwargs: dict[str, Any], at_once: int | None) -> Tensor:
    """Per-token log-probs on the plain path, of as many pairs at a time as fit into memory. # (2B, L-1)"""
    count = len(kwargs["input_ids"]) // 2
    size = min(at_once or count, count)
    while True:
        try:
            parts = [
                model(**_rows(kwargs, start, start + size))
                .log_probs.float()
                .view(2, -1, kwargs["labels"].shape[1] - 1)
                for start in range(0, count, size)
            ]
            return torch.cat(parts, dim=1).flatten(0, 1)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size = (size + 1) // 2
        clear_device_cache(garbage_collection=True)


def _shared_log_probs(model: torch.nn.Module, pairs: PackedPairs) -> Tensor:
    try:
        return packed_forward(model, pairs, use_cache=False).log_probs.detach().float()
    except CannotShare:
        raise
    except FAILURES as error:
        if says_nothing(error):  # out of memory is no verdict: a step needs at least as much
            raise
        raise CannotShare(f"its first batch failed ({as_text(error)})") from error


def _differs(nats: float, of: str = "token") -> str:
    return (
        f"on the first batch its log-probs differed by up to {nats:.2g} nats a {of}: something in it tells a packed row from padded "
        "ones (an adapter, a hook)"
    )


def _check_pairs(shared: Tensor, expected: Tensor, scored: Tensor, exact: bool) -> float:
    """Raise `CannotShare` if a sequence differs by more than rounding. # three of (2B, L-1) -> mean difference, nats a token"""
    difference = torch.where(scored, (shared - expected).abs(), 0.0)
    size = torch.where(scored, expected.abs(), 0.0)
    tokens = scored.sum(dim=1).clamp(min=1)  # (2B,)
    if exact:
        wrong = (difference > EXACT * size.clamp(min=1)).any(dim=1)  # (2B,)
        wrong |= difference.sum(dim=1) > _EXACT_MEAN * torch.maximum(size.sum(dim=1), tokens)
    else:
        limit = (
            ROUNDED * (size.sum(dim=1) / tokens).clamp(min=1) * (1 + 3 / tokens.sqrt())
        )  # the mean of few moves more
        wrong = difference.sum(dim=1) / tokens > limit
    if bool(wrong.any()) or not bool(difference.isfinite().all()):
        raise CannotShare(_differs(difference.max().item()))
    return difference[scored].mean().item()


# ---- What an adapter adds ----


def _check_adapter(
    model: torch.nn.Module,
    kwargs: dict[str, Any],
    unmoved: Tensor,
    exact: bool,
    rounding: float,
    at_once: int | None,
) -> None:
    """Raise `CannotShare` if an adapter that is moved a little acts on other tokens of a packed row.

    `unmoved` are the plain path's log-probs of the whole batch with the adapter as it is. # (2B, L-1)
    """
    adapters = _trained_adapters(model)
    if not adapters:
        return
    call = _rows(kwargs, 0, _ADAPTED)
    pairs = pack_call(call)
    with torch.no_grad():
        scored = pairs.scored.to(unmoved.device)
        # Of these pairs; that others were beside them is rounding, and the effect is far above it
        still = unmoved.view(2, -1, unmoved.shape[1])[:, :_ADAPTED].flatten(0, 1)[scored]
        for size in _MOVES:
            with _moved(adapters, size):
                expected = _plain_log_probs(model, call, at_once)[scored]
                shared = _shared_log_probs(model, pairs)[scored]
            effect, difference = (expected - still).abs().mean().item(), (shared - expected).abs()
            if not np.isfinite(effect):
                return
            if effect > _VISIBLE * max(rounding, EXACT if exact else ROUNDED / 4) or size == _MOVES[-1]:
                break
    share, times = _OF_EFFECT[exact]
    if not difference.mean().item() <= share * effect + times * max(rounding, _ROUNDED_32):
        raise CannotShare(
            f"on the first batch its adapter acts otherwise on a packed row (by {difference.max().item():.2g} nats a token, when it was "
            "moved a little)"
        )


def _trained_adapters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    inner = unwrapped(model)
    if not hasattr(inner, "peft_config"):
        return []
    copies = ("modules_to_save", "original_module")
    return [
        parameter
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and not any(f".{copy}." in name for copy in copies)
    ]


@contextlib.contextmanager
def _moved(parameters: list[torch.nn.Parameter], size: float) -> Iterator[None]:
    """While open, parameters have noise added to them; the same wherever and whenever it is done."""
    kept = [parameter.detach().clone() for parameter in parameters]
    generators: dict[torch.device, torch.Generator] = {}
    try:
        for parameter in parameters:
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
            parameter.data.add_((size * noise).to(parameter.dtype))
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


# ---- Random numbers ----


class RandomState:
    """State of the generators that a forward pass may draw from: Python's, NumPy's, torch's on the CPU and on the device."""

    def __init__(self, device: torch.device):
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._of_device = None if self._module is None else self._module.get_rng_state()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        same = self._python == other._python and torch.equal(self._torch, other._torch)
        same = same and self._numpy[2:] == other._numpy[2:] and np.array_equal(self._numpy[1], other._numpy[1])
        return same and (self._of_device is None or torch.equal(self._of_device, other._of_device))

    __hash__ = None

    def restore(self) -> None:
        """Draw on from here."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._of_device is not None:
            self._module.set_rng_state(self._of_device)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[RandomState]:
    """Whatever is drawn inside will be drawn again outside."""
    state = RandomState(device)
    try:
        yield state
    finally:
        state.restore()
