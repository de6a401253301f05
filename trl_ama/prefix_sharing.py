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

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .frozen_head import frozen_head


PAIRS_KEY = "packed_pairs"
WORTH_SHARING = 8  # tokens; attention to a common beginning needs masks, without one it does not
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's FusedCausalLMOutput


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

    @property
    def longest(self) -> int:
        """Length of the longest sequence that a token of the row sees."""
        return self.common + max(prefix + max(chosen, rejected) for prefix, chosen, rejected in self.lengths)

    def unpack(self, scores: Tensor | None) -> Tensor | None:
        """Per-score values (1, N) in the shape that `DPOTrainer` expects, zero outside the answers. # (2B, L-1)"""
        if scores is None:
            return None
        values = scores.squeeze(0)[self.slots]  # (2B, L-1)
        return torch.where(self.scored, values, torch.zeros((), dtype=values.dtype, device=values.device))


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


# ---- Attention ----

_KNOWN_ARGUMENTS = {"position_ids", "cache_position", "position_embeddings", "output_router_logits"}


def _visible(pairs: PackedPairs, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see. # (queries, keys)"""
    key = (queries, keys, window, device)
    if key not in pairs.cache:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        pairs.cache[key] = mask if window is None else mask.triu(keys - queries - window + 1)
    return pairs.cache[key]


def on_cpu(states: Tensor) -> bool:
    """Whether attention takes the way of a CPU. A plan for a GPU, on a machine without one, puts its own answer here."""
    return states.device.type == "cpu"


def _sdpa(query, key, value, pairs: PackedPairs, dropout: float, scaling: float | None, window: int | None):
    """Attention of the packed row, block by block: there are few blocks, and all of them are small. # (1, T, heads, D)"""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not on_cpu(query):
        # On a GPU, grouped heads with a mask fall back to the kernel that keeps every score
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        groups = 1
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
    sizes = [pairs.common, *(size for p, c, r in pairs.lengths for size in (p + c, r))]
    parts = [states.split(sizes, dim=2) for states in (query, key, value)]  # of (1, heads, size, D)
    blocks = iter(list(zip(*parts, strict=True)))

    def attend(q: Tensor, *seen: tuple[Tensor, Tensor]) -> Tensor:
        """Of queries that are the last ones of the keys and values seen. # (1, size, heads, D)"""
        k, v = seen[0] if len(seen) == 1 else (torch.cat(states, dim=2) for states in zip(*seen, strict=True))
        narrow = window if window is not None and k.shape[2] > window else None
        is_square = q.shape[2] == k.shape[2] and narrow is None
        mask = None if is_square else _visible(pairs, q.shape[2], k.shape[2], narrow, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_square, **settings).transpose(1, 2)

    q, *beginning = next(blocks)
    outputs = [attend(q, beginning)] if pairs.common else []
    before = [beginning] if pairs.common else []
    for prefix, chosen, rejected in pairs.lengths:
        (q, k, v), (q_rejected, *own) = next(blocks), next(blocks)
        if prefix + chosen:
            outputs.append(attend(q, *before, (k, v)))
        if rejected:
            outputs.append(attend(q_rejected, *before, (k[:, :, :prefix], v[:, :, :prefix]), own))
    return torch.cat(outputs, dim=1)


def _varlen(pairs: PackedPairs, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """For flash attention, which takes no mask: 2B (or 2B + 1) sequences, whose keys are gathered from the row, and their bounds.

    Its causal mask is aligned at the end of both sequences, so the R queries of a rejected branch see all that is before them.
    The queries are in order as they are; of the keys and values, the prefix and the common beginning are copied.
    """
    if "varlen" not in pairs.cache:
        beginning = range(pairs.common)
        blocks = [(pairs.common, [beginning])]
        start = pairs.common
        for prefix, chosen, rejected in pairs.lengths:
            middle, end = start + prefix + chosen, start + prefix + chosen + rejected
            blocks.append((prefix + chosen, [beginning, range(start, middle)]))
            blocks.append((rejected, [beginning, range(start, start + prefix), range(middle, end)]))
            start = end
        blocks = [(queries, [index for part in seen for index in part]) for queries, seen in blocks if queries]
        bounds = {
            f"cu_seq_lens_{name}": torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)
            for name, sizes in (("q", [q for q, _ in blocks]), ("k", [len(seen) for _, seen in blocks]))
        }
        bounds |= {"max_length_q": max(q for q, _ in blocks), "max_length_k": max(len(seen) for _, seen in blocks)}
        pairs.cache["varlen"] = torch.tensor([index for _, seen in blocks for index in seen], device=device), bounds
    return pairs.cache["varlen"]


class PairAttention:
    """An attention function of transformers that also knows packed pairs; of anything else it makes what it always made.

    It keeps no state: whether a row is packed is said by the call itself, in the backward pass of gradient checkpointing as
    well, and models keep the name of their implementation in their config, saved or not.
    """

    def __init__(self, name: str, plain: Callable):
        self._name, self._plain = name, plain

    def __call__(
        self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, packed_pairs=None, **kwargs
    ):
        if packed_pairs is None:
            return self._plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.packed(module, query, key, value, packed_pairs, dropout, scaling, **kwargs)

    def packed(
        self, module, query, key, value, pairs, dropout, scaling, sliding_window=None, is_causal=None, **kwargs
    ):
        """Attention of a packed row. # query (1, heads, T, D); key, value (1, kv heads, T, D) -> (1, T, heads, D)"""
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise CannotShare(f"the attention of {type(module).__name__} is not causal")
        if "layers" in pairs.cache:  # a trial counts them
            pairs.cache["layers"] += 1
        if self._name.startswith("flash_attention"):
            gather, bounds = _varlen(pairs, query.device)
            key, value = key.index_select(2, gather), value.index_select(2, gather)
            kwargs |= {"sliding_window": sliding_window, "is_causal": True, **bounds}
            return self._plain(module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs)
        unknown = [
            name
            for name, given in kwargs.items()
            if given is not None and given is not False and name not in _KNOWN_ARGUMENTS
        ]
        if unknown:
            raise CannotShare(
                f"the attention of {type(module).__name__} takes {unknown}, which prefix sharing does not know"
            )
        if not on_cpu(query):
            return _sdpa(query, key, value, pairs, dropout, scaling, sliding_window), None
        # A CPU's kernel is several times slower in 16 bits, above all backwards; in 32 it rounds less, too
        with torch.autocast("cpu", enabled=False):
            output = _sdpa(query.float(), key.float(), value.float(), pairs, dropout, scaling, sliding_window)
        return output.to(query.dtype), None


KNOWN_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def install() -> None:
    """Teach transformers' attention functions packed pairs. Doing it again changes nothing."""
    for name in KNOWN_ATTENTION:
        plain = ALL_ATTENTION_FUNCTIONS.get(name)
        if plain is not None and not isinstance(plain, PairAttention):
            ALL_ATTENTION_FUNCTIONS.register(name, PairAttention(name, plain))


# ---- The forward pass ----


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with its adapters, inside Accelerate's wrappers (`.module`)."""
    while hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
        model = model.module
    return model


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside wrappers of Accelerate and PEFT."""
    model = unwrapped(model)
    # PEFT's own method: `is_peft_model` asks the installed packages every time, milliseconds in every forward pass
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keep_scored(module, args, kwargs, outputs):
    """Forward hook of the backbone: of the hidden states, only those that predict an answer token go to the head."""
    pairs = kwargs.get(PAIRS_KEY)
    if pairs is not None:
        outputs.last_hidden_state = outputs.last_hidden_state[:, pairs.score_positions]  # (1, T, H) -> (1, N, H)
    return outputs


def packed_forward(model: torch.nn.Module, pairs: PackedPairs, metrics: bool = True, **kwargs) -> Any:
    """Run a model that has TRL's fused head on packed pairs.

    Args:
        model (`torch.nn.Module`): The model as it is trained, in all its wrappers.
        pairs ([`PackedPairs`]): The batch.
        metrics (`bool`): Whether more than log-probs is wanted.
        kwargs: For the model.

    Returns:
        `FusedCausalLMOutput` as for the padded batch; without `loss` and `label_mask`, which `DPOTrainer` does not read.
    """
    install()
    handle = causal_lm(model).base_model.register_forward_hook(_keep_scored, with_kwargs=True)
    try:
        with frozen_head(metrics):
            outputs = model(
                input_ids=pairs.input_ids,
                position_ids=pairs.position_ids,
                # A mask of four dimensions is passed on as it is, and the attention above looks at none
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pairs.input_ids.device),
                shift_labels=pairs.labels,
                fused_lm_head=True,
                **{PAIRS_KEY: pairs},
                **kwargs,
            )
    finally:
        handle.remove()
    fields = {name: pairs.unpack(outputs.get(name)) for name in _PER_TOKEN if outputs.get(name) is not None}
    return type(outputs)(**fields)
