"""Attention in a row of packed pairs, and the forward pass over it; see `fast_path/packing.py` for the row."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .frozen_head import frozen_head
from .packing import PAIRS_KEY, CannotShare, PackedPairs


_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's FusedCausalLMOutput
_KNOWN_ARGUMENTS = {"position_ids", "cache_position", "position_embeddings", "output_router_logits"}
_as_on_a_gpu = False


def _visible(pairs: PackedPairs, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see. # (queries, keys)"""
    key = (queries, keys, window, device)
    if key not in pairs.cache:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        pairs.cache[key] = mask if window is None else mask.triu(keys - queries - window + 1)
    return pairs.cache[key]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While open, a packed row takes the ways of a GPU on any machine: a plan is made for a card that is not there."""
    global _as_on_a_gpu
    before, _as_on_a_gpu = _as_on_a_gpu, True
    try:
        yield
    finally:
        _as_on_a_gpu = before


def _on_cpu(states: Tensor) -> bool:
    return states.device.type == "cpu" and not _as_on_a_gpu


def _sdpa(query, key, value, pairs: PackedPairs, dropout: float, scaling: float | None, window: int | None):
    """Attention of the packed row, block by block: there are few blocks, and all of them are small. # (1, T, heads, D)"""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _on_cpu(query):
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
        if not _on_cpu(query):
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
        with contextlib.nullcontext() if _as_on_a_gpu else frozen_head(metrics):  # which a GPU does not take
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
