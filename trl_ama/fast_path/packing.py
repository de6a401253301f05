"""One forward pass for `prompt, chosen, rejected`: the prompt is computed once, nothing is padded.

`DPOTrainer` runs a batch of B pairs as 2B padded rows, so a prompt goes through the model twice. Here the batch is one row:

    tokens     s0 s1 || p2 p3 | c4 c5 | r4 r5 r6 || p2 | c3 | r3 …    what all begin with, then pair by pair
    positions   0  1     2  3    4  5    4  5  6     2    3    3

Attention is the only place where tokens meet, so it alone has to know: a *chosen block* (the rest of the pair's prefix, and the
chosen branch) continues the common beginning, a *rejected branch* the beginning and its pair's prefix. The branches begin where
the two sequences begin to differ, which may be later than the prompt's end (two programs with the same first lines); the
common beginning is most of all the chat template's system prompt; and the last token of an answer predicts nothing, so it is
left out.

Everything else is a change of inputs: the wrapped model itself is called (DDP, PEFT, quantisation and gradient checkpointing
see nothing unusual), the pairs' lengths travel as a keyword argument (so they are there again when checkpointing recomputes a
layer in the backward pass), and TRL's own fused head scores the hidden states, of which a hook keeps those that predict an
answer token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .plan_of_batch import AttentionPlan, plan_attention


PAIRS_KEY = "packed_pairs"
WORTH_SHARING = 8  # tokens; attention to a common beginning needs masks, without one it does not


class CannotShare(ValueError):
    """Why a model or a batch cannot take the fast path, as half a sentence."""


class PackedPairs:
    """A batch of pairs as one row of T tokens, in which N hidden states are scored.

    Args:
        input_ids, position_ids (`torch.Tensor`): The row. # (1, T)
        labels (`torch.Tensor`): The tokens that the scored hidden states predict. # (1, N)
        score_positions (`torch.Tensor`): Where in the row the scored hidden states are. # (N,)
        slots (`torch.Tensor`): Which of the N scores belongs to each token of the padded batch. # (2B, L-1)
        scored (`torch.Tensor`): Which tokens of the padded batch have a score. # (2B, L-1)
        common (`int`): How many tokens all pairs begin with, which are in the row once. # ≤ T
        lengths (`list[tuple[int, int, int]]`): Of the rest of each pair's prefix, its chosen and its rejected branch. # B, sum
            T − common
    """

    # Not a dataclass: FSDP casts inputs, and makes another object of every dataclass among them at every unit
    def __init__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        score_positions: Tensor,
        slots: Tensor,
        scored: Tensor,
        common: int,
        lengths: list[tuple[int, int, int]],
    ):
        self.input_ids, self.position_ids, self.labels = input_ids, position_ids, labels
        self.score_positions, self.slots, self.scored = score_positions, slots, scored
        self.common, self.lengths = common, lengths
        self.cache: dict[Any, Any] = {}  # what the attention layers have in common, made by the first
        self._plans: dict[torch.device, AttentionPlan] = {}

    @property
    def longest(self) -> int:
        """Length of the longest sequence that a token of the row sees."""
        return self.common + max(prefix + max(chosen, rejected) for prefix, chosen, rejected in self.lengths)

    def plan(self, device: torch.device) -> AttentionPlan:
        """What variable-length attention has to know, on a layer's device; made once."""
        if device not in self._plans:
            made = next(iter(self._plans.values()), None) or plan_attention(self.common, self.lengths)
            self._plans[device] = made.map(lambda tensor: tensor.to(device, non_blocking=True))
        return self._plans[device]

    def on(self, device: torch.device, non_blocking: bool = False) -> "PackedPairs":
        """The same pairs on a device, with the plan if it was made; layers make anew what else they have in common.

        Not `to`: Accelerate, where it has split a model, calls that of every argument of every layer, which would each get another object.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedPairs":
        """The same pairs where a GPU can copy them from without anybody waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackedPairs":
        tensors = (self.input_ids, self.position_ids, self.labels, self.score_positions, self.slots, self.scored)
        moved = PackedPairs(*map(change, tensors), self.common, self.lengths)
        for plan in self._plans.values():
            plan = plan.map(change)
            moved._plans[plan.gather.device] = plan
        return moved

    def tokens_of(self, keep: Tensor) -> Tensor:
        """Which tokens of the row are of some pairs, or of what all begin with. # (B,) -> (T,), both bool"""
        sizes = torch.tensor([self.common, *map(sum, self.lengths)], device=keep.device)
        return torch.cat([keep.new_ones(1), keep]).repeat_interleave(sizes)

    def subset(self, keep: Tensor) -> "PackedPairs":
        """Some of the pairs, at least one, and the common beginning as it is; the scores go to those pairs' rows. # (B,) bool"""
        in_row = self.tokens_of(keep)  # (T,)
        scored, slots = self.scored[keep.repeat(2)], self.slots[keep.repeat(2)]  # (2b, L-1)
        used = torch.zeros_like(self.score_positions, dtype=torch.bool)  # (N,)
        used[slots[scored]] = True
        return PackedPairs(
            input_ids=self.input_ids[:, in_row],
            position_ids=self.position_ids[:, in_row],
            labels=self.labels[:, used],
            score_positions=(in_row.cumsum(dim=0) - 1)[self.score_positions[used]],
            slots=torch.where(scored, (used.cumsum(dim=0) - 1)[slots], 0),
            scored=scored,
            common=self.common,
            lengths=[lengths for lengths, stays in zip(self.lengths, keep.tolist(), strict=True) if stays],
        )

    def unpack(self, scores: Tensor | None) -> Tensor | None:
        """Per-score values (1, N) in the shape that `DPOTrainer` expects, zero outside the answers. # (2B, L-1)"""
        if scores is None:
            return None
        device = scores.device  # of a split model's head, not of the row
        values = scores.squeeze(0)[self.slots.to(device)]  # (2B, L-1)
        return torch.where(self.scored.to(device), values, torch.zeros((), dtype=values.dtype, device=values.device))


def pack_call(call: Mapping[str, Any]) -> PackedPairs:
    """[`pack_pairs`] of what a model is called with: TRL's `input_ids`, `attention_mask` and `labels`. # (2B, L) each"""
    return pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


def pack_pairs(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> PackedPairs:
    """Pack a padded batch, chosen rows first. # three of (2B, L)

    Raises:
        CannotShare: If the rows are not pairs padded on the right, or there is nothing to score.
    """
    if input_ids.dim() != 2 or len(input_ids) % 2 or input_ids.shape[1] < 2:
        raise CannotShare(f"the batch is of shape {tuple(input_ids.shape)} and not 2B rows of at least 2 tokens")
    device, pairs = input_ids.device, len(input_ids) // 2
    columns = torch.arange(input_ids.shape[1], device=device)  # (L,)
    real = attention_mask.bool()  # (2B, L)
    ends = real.sum(dim=1)  # (2B,)
    chosen, rejected = input_ids.chunk(2)  # (B, L) each
    same = (chosen == rejected) & real[:pairs] & real[pairs:]
    agree = same.long().cumprod(dim=1).sum(dim=1)  # (B,): the first so many tokens are the same
    chosen_end, rejected_end = (ends - 1).clamp(min=0).chunk(2)  # without the last token, which predicts nothing
    prefix = torch.minimum(agree, torch.maximum(chosen_end, rejected_end))
    chosen_end = torch.maximum(chosen_end, prefix)  # (B,): shared prefix and chosen branch
    rejected_length = (rejected_end - prefix).clamp(min=0)  # (B,)
    begins_alike = ((input_ids == input_ids[0]) & real).all(dim=0).long().cumprod(dim=0).sum()
    numbers = torch.stack(
        [
            prefix,
            chosen_end - prefix,
            rejected_length,
            torch.minimum(begins_alike, prefix.min()).expand_as(prefix),
            (real != (columns < ends[:, None])).any(dim=1).view(2, -1).any(dim=0).long(),
        ]
    )
    prefixes, *branches, (common, *_), ragged = numbers.tolist()
    if any(ragged):
        raise CannotShare("its rows are not padded on the right")
    if pairs == 1 or common < WORTH_SHARING:
        common = 0
    lengths = [[size - common for size in prefixes], *branches]
    total = chosen_end + rejected_length - common
    starts = (
        total.cumsum(dim=0) - total
    )  # (B,): where each pair would begin in the row, if its first tokens were there

    # Where each token of the padded batch stands in the row
    places = torch.where(columns < common, columns, starts[:, None] + columns)  # (B, L): prefix and chosen branch
    branch = places + (chosen_end - prefix)[:, None]  # (B, L): rejected branch
    places = torch.cat([places, torch.where(columns < prefix[:, None], places, branch)])  # (2B, L)
    in_row = torch.cat(
        [columns < chosen_end[:, None], (columns >= prefix[:, None]) & (columns < (prefix + rejected_length)[:, None])]
    )
    row = input_ids.new_zeros(common + sum(map(sum, lengths)))  # (T,)
    positions = torch.zeros_like(row)
    row[places[in_row]] = input_ids[in_row]
    positions[places[in_row]] = columns.expand_as(input_ids)[in_row]

    # A token of both answers that has the same past in both is scored once
    scored = (completion_mask.bool() & real)[:, 1:]  # (2B, L-1)
    own = scored.clone()
    own[pairs:] &= ~(scored[:pairs] & (columns[1:] < agree[:, None]))
    slots = own.flatten().cumsum(dim=0).view_as(own) - 1  # (2B, L-1)
    slots = torch.cat([slots[:pairs], torch.where(own[pairs:], slots[pairs:], slots[:pairs])])
    score_positions = places[:, :-1][own]  # (N,)
    if len(row) == 0 or len(score_positions) == 0:
        raise CannotShare("none of its tokens is scored")
    return PackedPairs(
        input_ids=row[None],
        position_ids=positions[None],
        labels=input_ids[:, 1:][own][None],
        score_positions=score_positions,
        slots=torch.where(scored, slots, 0),
        scored=scored,
        common=common,
        lengths=list(zip(*lengths, strict=True)),
    )
