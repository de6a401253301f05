"""Whether tokens of a packed row meet where they must not, seen without a tolerance that rounding could hide in.

The tokens of one branch of every pair are replaced (the chosen one, the rejected one, in turns), and nothing else of the row: not
its length, nor any shape of what is computed. So each kernel does for the other branches what it did before, and their log-probs stay the same *bit by bit*, in 16
bits as in 32; if one moves at all, something was read where it must not be.

Rounding may depend on the other tokens in three cases, and then log-probs may move by as much as rounding: experts, whose
matrix products have as many rows as tokens are sent to them; kernels that do not give the same bits twice; and what depends on
its whole batch on the plain path as well (scales or outliers of 8-bit activations), where rows are known not to meet.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .packing import PackedPairs


EXACT = 1e-3  # of a token's log-prob, in 32 bits
# Nats, mean over tokens, in 16 bits: by what a sequence may move where it may move by rounding. Positions that do not start
# again would move it by 0.2 to 1.7
ROUNDED_ALIKE = 0.05
# The same where shapes of kernels are the same, but not where in the row their tokens are
MOVED = 0.02


def first_known(reason: str | None) -> str | None:
    """What a process by itself makes of its reason; several that must be of one mind ask each other."""
    return reason


def why_tokens_meet(
    packed: Callable[[PackedPairs], Tensor],
    plain: Callable[[dict[str, Any]], Tensor],
    call: dict[str, Any],
    pairs: PackedPairs,
    config: Any,
    exact: bool,
    agree: Callable[[str | None], str | None] = first_known,
    known: Tensor | None = None,
) -> str | None:
    """Replace one branch of every pair, and say by how much the other one moved if it did.

    Args:
        packed, plain (`Callable`): Log-probs, nats in 32 bits, of a packed batch and of a call. # -> (2B, L-1)
        call (`dict`): A call of the plain path, to ask it the same; not necessarily the same batch.
        pairs ([`PackedPairs`]): The batch.
        config: The model's.
        exact (`bool`): Whether the model computes in 32 bits.
        agree (`Callable`, *optional*): Makes one of what several processes found: all must run the model equally often.
        known (`torch.Tensor`, *optional*): Log-probs of `pairs` that are there already. Where none moves from them the question is
            answered; where one does, it may be for how they were computed (with gradients), and they are computed again.
            # (2B, L-1)
    """
    vocabulary, count = config.get_text_config().vocab_size, len(pairs.lengths)
    odd = torch.arange(count, device=pairs.scored.device) % 2 == 1  # (B,): where the rejected branch is replaced
    after = packed(with_other_tokens(pairs, vocabulary))  # (2B, L-1)
    others = (torch.cat([odd, ~odd])[:, None] & pairs.scored).to(after.device)  # (2B, L-1)

    def nothing_moved(before: Tensor) -> bool:
        return agree("they moved" if bool((after != before)[others].any()) else None) is None

    if known is not None and nothing_moved(known):
        return None
    before = packed(pairs)
    if nothing_moved(before):
        return None
    moved, size = (after - before).abs()[others], before.abs()[others]
    again, rows_meet = packed(pairs), _rows_meet(plain, call, vocabulary)
    if not bool((moved != 0).any()):  # but on another process
        return None
    if routes_tokens(config) or rows_meet or not torch.equal(again, before):
        small = (moved <= EXACT * size.clamp(min=1)).all() if exact else moved.mean() <= ROUNDED_ALIKE
        if bool(small):
            return None
    return (
        f"in a trial log-probs of one answer moved by up to {moved.max().item():.2g} nats a token with the tokens of another: tokens "
        "meet elsewhere than in attention"
    )


def with_other_tokens(pairs: PackedPairs, vocabulary: int) -> PackedPairs:
    """The same batch with other tokens in the chosen branch of the first pair, the rejected one of the second, and so on; what is
    scored stays.

    Args:
        pairs ([`PackedPairs`]): A batch.
        vocabulary (`int`): How many tokens there are.
    """
    row, start = pairs.input_ids.clone(), pairs.common  # (1, T)
    for number, (prefix, chosen, rejected) in enumerate(pairs.lengths):
        begin, size = (start + prefix, chosen) if number % 2 == 0 else (start + prefix + chosen, rejected)
        row[:, begin : begin + size] = (row[:, begin : begin + size] + 1) % vocabulary
        start += prefix + chosen + rejected
    other = copy.copy(pairs)
    other.input_ids, other.cache = row, {}
    return other


def _rows_meet(plain: Callable[[dict[str, Any]], Tensor], call: dict[str, Any], vocabulary: int) -> bool:
    """Whether chosen rows of the plain path move at all with the tokens of the rejected answers."""
    ids, half = call["input_ids"].clone(), len(call["input_ids"]) // 2
    ids[half:] = torch.where(call["labels"][half:] != -100, (ids[half:] + 1) % vocabulary, ids[half:])
    scored = call["labels"][:half, 1:] != -100
    before, after = (plain({**call, "input_ids": given})[:half] for given in (call["input_ids"], ids))
    return bool((before != after)[scored.to(before.device)].any())


def routes_tokens(config: Any) -> bool:
    """Whether a model sends its tokens to experts, by its config: no two families name them alike."""
    sizes = {**vars(config), **vars(config.get_text_config())}
    return any("expert" in name and type(size) is int and size > 1 for name, size in sizes.items())


def why_positions_count_on(before: Tensor, after: Tensor, scored: tuple[Tensor, Tensor], config: Any) -> str | None:
    """Whether log-probs of the rejected answers moved when the chosen ones got other lengths: they must start where these do.

    Args:
        before, after (`torch.Tensor`): Log-probs, with rows as long as each batch's longest. # (2B, L-1), (2B, M-1)
        scored (`tuple[torch.Tensor, torch.Tensor]`): Which tokens of each are scored. # (2B, L-1), (2B, M-1)
        config: The model's.
    """
    half = len(before) // 2
    one, other = (
        values[half:][mask[half:].to(values.device)] for values, mask in zip((before, after), scored, strict=True)
    )
    moved = (one - other).abs()
    if bool(moved.mean() > (ROUNDED_ALIKE if routes_tokens(config) else MOVED)):
        return (
            f"in a trial log-probs of rejected answers moved by up to {moved.max().item():.2g} nats a token with the length of chosen "
            "ones: positions are not read from position_ids"
        )
    return None
