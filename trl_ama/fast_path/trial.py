"""Runs pairs both ways, packed and plain, and says how long sequences may be for the fast path to be exact.

The longest pair of a trial is as long as pairs of the run can be, and masks are compared as well as log-probs. So a model that
no rule knows takes the plain path too if tokens meet elsewhere than in attention (state-space, linear attention, convolution),
if its attention sees other keys than it says (windows, chunks, biases), or if it reads something else than position ids.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import install
from .failures import FAILURES, as_text, is_out_of_memory, says_nothing
from .forward import causal_lm, packed_forward
from .leak import EXACT, first_known, why_positions_count_on, why_tokens_meet
from .packing import CannotShare, PackedPairs, pack_call


# In 16 bits, mean over tokens. Both paths are about 0.04 nats from 32 bits (SmolLM2-135M) and as far from each other, and more
# on unlikely tokens: this is relative to their log-prob, if that is above 1
ROUNDED = 0.1
_SHORT, _ALIKE = 24, 8  # tokens of a pair in the part of the trial that several pairs share, and how many begin alike
_ROPE_OF_LENGTH = {"dynamic", "longrope"}  # frequencies that depend on the longest sequence of the batch
_NO_LIMIT = 2**62
_ROWS = 512  # of a mask that are looked at together
Agree = Callable[[str | None], str | None]


@dataclass
class Tried:
    """What a trial found out: sequences of up to `length` tokens are the same on both paths; those beyond were not tried, or
    differ for the reason `beyond`."""

    length: int
    beyond: str | None = None


def try_model(
    model: torch.nn.Module,
    kwargs: dict[str, Any],
    longest: int,
    exact: bool,
    needed: int = 0,
    agree: Agree = first_known,
) -> Tried:
    """Try a model on sequences of up to `longest` tokens, or of as many as it can take and there is memory for.

    Args:
        model (`torch.nn.Module`): The model as it is trained, in all its wrappers.
        kwargs (`dict`): A call of it, of whose tokens the trial's pairs are made.
        longest (`int`): Tokens of the longest sequence of the run.
        exact (`bool`): Whether it computes in 32 bits.
        needed (`int`, *optional*): Tokens without which the trial is of no use.
        agree (`Callable`, *optional*): Makes one reason of those that processes found, where all must run the model equally often.
            The lengths must be the same on all, then.

    Raises:
        CannotShare: If the two paths differ on sequences of any length.
    """
    while isinstance(model, DistributedDataParallel):  # which would talk to other processes
        model = model.module
    config = causal_lm(model).config
    limit, beyond = sequence_limit(config)
    try:
        fits = _trial_that_fits(model, kwargs, min(longest, limit), exact, needed, agree)
        if fits < min(longest, limit):
            return Tried(fits)
    except CannotShare as reason:
        window = _window(config)
        if window is None or window >= min(longest, limit):
            raise
        limit, beyond = window, str(reason)
        fits = _trial_that_fits(model, kwargs, limit, exact, min(needed, limit), agree)
        if fits < limit:
            return Tried(fits)
    return Tried(min(longest, limit), beyond if longest >= limit else None)


def _trial_that_fits(
    model: torch.nn.Module, kwargs: dict[str, Any], length: int, exact: bool, needed: int, agree: Agree
) -> int:
    """The length of the longest trial for which there is memory: `max_length` may be far above any pair's. # tokens"""
    while True:
        try:
            _trial(model, kwargs, length, exact, agree)
            return length
        except RuntimeError as error:
            # Without memory for a pair of the batch there is none for the step, on either path
            if length <= needed or not is_out_of_memory(error):
                raise
        length = max(needed, length // 2)
        clear_device_cache(garbage_collection=True)


def sequence_limit(config: Any) -> tuple[int, str | None]:
    """How long a sequence may be, and why. # tokens"""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]  # one set for each type of layer
    for rope in [parameters, *nested]:
        if rope.get("rope_type") in _ROPE_OF_LENGTH:
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            # A packed row ends a token early, and where the change is, even the plain path depends on the batches before
            return min(original, config.max_position_embeddings) - 1, (
                f"its rotary embedding ('{rope['rope_type']}') has frequencies that depend on the longest sequence of a batch"
            )
    # Learned positions end with their table, and on a GPU an index beyond it cannot be caught
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        return positions, f"it has {positions} positions"
    return _NO_LIMIT, None


def _window(config: Any) -> int | None:
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _invented(kwargs: dict[str, Any], lengths: list[int], shift: int = 0) -> dict[str, torch.Tensor]:
    """A call with pairs whose chosen sequences have these lengths, made of the tokens of a batch; all are padded but one.

    With `shift`, the first chosen answer is so many tokens shorter, and the second one longer.
    """
    stream = kwargs["input_ids"][kwargs["attention_mask"].bool()].tolist()
    rows, prompts = [], []
    for tokens, shorter, shifts in ((stream, 0, (-shift, shift)), (stream[::-1], 1, (0, 0))):
        for number, (length, more) in enumerate(zip(lengths, shifts, strict=False)):
            alike = min(_ALIKE, length // 2)
            prompt = [*islice(cycle(stream), alike), *islice(cycle(stream), alike + number, length // 2 + number)]
            rows.append([*prompt, *islice(cycle(tokens), max(1, length - length // 2 - shorter + more))])
            prompts.append(len(prompt))
    sizes = [len(row) for row in rows]
    input_ids = kwargs["input_ids"].new_zeros(len(rows), max(sizes))
    labels = torch.full_like(input_ids, -100)
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = input_ids[row, prompt : len(tokens)]
    ends = torch.tensor(sizes, device=input_ids.device)
    mask = torch.arange(max(sizes), device=input_ids.device) < ends[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.to(kwargs["attention_mask"].dtype), "labels": labels}


def _trial(model: torch.nn.Module, kwargs: dict[str, Any], length: int, exact: bool, agree: Agree) -> None:
    """Run pairs both ways: short ones in one row, and one of the longest sequences there may be.

    Nothing is raised between forward passes but what a forward pass raises: other processes may be in the next one.

    Raises:
        CannotShare: If anything differs, with what; on all processes that agree, if it does on one.
    """
    config = causal_lm(model).config
    install(config._attn_implementation)
    if any(isinstance(module, torch.nn.Conv1d) for module in causal_lm(model).modules()):
        raise CannotShare("it has convolutions, in which neighbouring tokens of the row would meet")
    size, found = min(_SHORT, length), None
    short, shift = [size, max(2, size - max(3, size // 4))], size // 4  # of which none is longer than `length` then
    calls = [(_invented(kwargs, short), _invented(kwargs, short, shift))]
    if length > _SHORT:
        calls.append((_invented(kwargs, [length]), None))
    try:
        with torch.no_grad():
            for call, moved in calls:
                reason = _compare(model, call, moved, exact, agree)
                found = found or reason
    except FAILURES as error:
        if says_nothing(error):
            raise
        found = str(error) if isinstance(error, CannotShare) else f"a trial failed ({as_text(error)})"
    reason = agree(found)
    if reason is not None:
        raise CannotShare(reason)


def _compare(
    model: torch.nn.Module,
    call: dict[str, torch.Tensor],
    moved: dict[str, torch.Tensor] | None,
    exact: bool,
    agree: Agree,
) -> str | None:
    """Why the two paths differ on a call, if they do; `moved` are the same pairs with chosen answers of other lengths."""
    config = causal_lm(model).config

    def packed(pairs: PackedPairs) -> torch.Tensor:
        return packed_forward(model, pairs, use_cache=False).log_probs.float()

    def plain(call: dict[str, Any]) -> torch.Tensor:
        return model(**call, use_cache=False, fused_lm_head=True).log_probs.float()

    pairs = pack_call(call)
    pairs.cache["layers"] = 0
    shared = packed(pairs)
    layers = pairs.cache.pop("layers")
    with _watched(config._attn_implementation) as masks:
        expected = plain(call)
    counted_on = None
    if moved is not None and not exact:  # in 32 bits, both paths' log-probs tell as much
        other = pack_call(moved)
        counted_on = why_positions_count_on(shared, packed(other), (pairs.scored, other.scored), config)
    meets = why_tokens_meet(packed, plain, call, pairs, config, exact, agree, known=shared)

    if layers != config.num_hidden_layers:
        return f"{layers} of its {config.num_hidden_layers} layers compute attention in a way that can be shared"
    try:
        _check_masks(masks, call["attention_mask"].bool())
    except CannotShare as error:
        return str(error)
    scored = pairs.scored.to(expected.device)
    expected = expected[scored]
    difference = (shared[scored] - expected).abs()
    if exact:
        wrong = bool((difference > EXACT * expected.abs().clamp(min=1)).any())
    else:
        wrong = bool(difference.mean() > ROUNDED * expected.abs().mean().clamp(min=1))
    if wrong or not bool(torch.isfinite(difference).all()):
        return (
            meets
            or counted_on
            or f"in a trial its log-probs differed by up to {difference.max().item():.2g} nats a token: tokens meet elsewhere than "
            "in attention, or positions are not read from position_ids"
        )
    return meets or counted_on


@contextlib.contextmanager
def _watched(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """While open, writes down the mask and the sliding window that each attention layer is given."""
    seen: list[tuple[Any, ...]] = []
    attention = ALL_ATTENTION_FUNCTIONS[name]

    def watching(module, query, key, value, attention_mask, *args, **kwargs):
        seen.append((type(module).__name__, attention_mask, kwargs.get("sliding_window")))
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, watching)
    try:
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, attention)


def _check_masks(seen: list[tuple[Any, ...]], real: torch.Tensor) -> None:
    """Raise unless every layer's mask is the one of causal attention in the sliding window that the layer is told.

    Log-probs alone would not do: in 16 bits, what a few tokens more or less in sight change is lost in rounding.
    """
    columns = torch.arange(real.shape[1], device=real.device)
    checked = set()
    for name, mask, window in seen:
        if (id(mask), window) in checked or (
            mask is not None and mask.dim() != 4
        ):  # flash attention reads none of four
            continue
        checked.add((id(mask), window))
        for rows in columns.split(_ROWS):  # of the queries: all at once would take L² numbers of 8 bytes
            distance = rows[:, None] - columns  # (rows, L)
            causal = distance >= 0
            given, expected = causal[None, None], causal if window is None else causal & (distance < window)
            if mask is not None:
                given = mask[:, :, rows]
                if given.dtype != torch.bool:
                    scores, given = given, given > torch.finfo(given.dtype).min / 2
                    if bool((given & (scores != 0)).any()):
                        raise CannotShare(f"the mask of {name} is more than a mask, it adds something to the scores")
            if bool(((given != expected) & real[:, None, rows, None]).any()):
                raise CannotShare(
                    f"{name} sees other tokens than causal attention does"
                    + ("" if window is None else f" in a window of {window}")
                )
