"""Attention of a packed row, behind transformers' attention functions; see `fast_path/packing.py` for the row."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing import CannotShare, PackedPairs
from .varlen import BLOCKS, card_of, gathered, kernel_for, on_cpu, varlen


_KNOWN_ARGUMENTS = {"position_ids", "cache_position", "position_embeddings", "output_router_logits"}


def _visible(pairs: PackedPairs, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see. # (queries, keys)"""
    key = (queries, keys, window, device)
    if key not in pairs.cache:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        pairs.cache[key] = mask if window is None else mask.triu(keys - queries - window + 1)
    return pairs.cache[key]


@contextlib.contextmanager
def _kernels_for_blocks(device: torch.device) -> Iterator[None]:
    """While open, cuDNN's attention is off: it builds a plan for every new shape, and nearly every block has one."""
    switches = torch.backends.cuda
    allowed = {
        SDPBackend.FLASH_ATTENTION: switches.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: switches.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: switches.math_sdp_enabled(),
    }
    allowed = [kernel for kernel, is_on in allowed.items() if is_on]  # what the user has turned off stays off
    with sdpa_kernel(allowed) if device.type == "cuda" and allowed else contextlib.nullcontext():
        yield


def blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: PackedPairs,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of the packed row, block by block: the reference for every other way, and the one of CPUs, whose blocks cost no launches.

    Args:
        query, key, value (`torch.Tensor`): Of the row. # (1, heads, T, D), (1, kv heads, T, D), (1, kv heads, T, Dv)
        pairs ([`PackedPairs`]): The row.
        dropout (`float`): Of attention's weights.
        scaling (`float`, *optional*): Of the scores; 1/√D if `None`.
        window (`int`, *optional*): How many keys a query sees, itself included.

    Returns:
        `torch.Tensor`. # (1, T, heads, Dv)
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not on_cpu(query.device):
        # On a GPU, grouped heads with a mask fall back to the kernel that keeps every score
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        groups = 1
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
    sizes = [pairs.common, *(size for p, c, r in pairs.lengths for size in (p + c, r))]
    parts = [states.split(sizes, dim=2) for states in (query, key, value)]  # of (1, heads, size, D)
    parts = iter(list(zip(*parts, strict=True)))

    def attend(q: Tensor, *seen: tuple[Tensor, Tensor]) -> Tensor:
        """Of queries that are the last ones of the keys and values seen. # (1, size, heads, D)"""
        k, v = seen[0] if len(seen) == 1 else (torch.cat(states, dim=2) for states in zip(*seen, strict=True))
        narrow = window if window is not None and k.shape[2] > window else None
        is_square = q.shape[2] == k.shape[2] and narrow is None
        if is_square:
            mask = None
        elif narrow is None and card_of(q.device) is not None:  # whose kernels know this mask by its name
            mask = causal_lower_right(q.shape[2], k.shape[2])
        else:
            mask = _visible(pairs, q.shape[2], k.shape[2], narrow, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_square, **settings).transpose(1, 2)

    q, *beginning = next(parts)
    outputs = [attend(q, beginning)] if pairs.common else []
    before = [beginning] if pairs.common else []
    for prefix, chosen, rejected in pairs.lengths:
        (q, k, v), (q_rejected, *own) = next(parts), next(parts)
        if prefix + chosen:
            outputs.append(attend(q, *before, (k, v)))
        if rejected:
            outputs.append(attend(q_rejected, *before, (k[:, :, :prefix], v[:, :, :prefix]), own))
    return torch.cat(outputs, dim=1)


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
        if is_flash(self._name):
            return self._by_its_package(module, query, key, value, pairs, dropout, scaling, sliding_window, **kwargs)
        unknown = [
            name
            for name, given in kwargs.items()
            if given is not None and given is not False and name not in _KNOWN_ARGUMENTS
        ]
        if unknown:
            raise CannotShare(
                f"the attention of {type(module).__name__} takes {unknown}, which prefix sharing does not know"
            )
        window = None if sliding_window is None or sliding_window >= pairs.longest else sliding_window
        if not on_cpu(query.device):
            return self._on_gpu(query, key, value, pairs, dropout, scaling, window), None
        # A CPU's kernel is several times slower in 16 bits, above all backwards; in 32 it rounds less, too
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            output = blocks(query.to(wide), key.to(wide), value.to(wide), pairs, dropout, scaling, window)
        return output.to(query.dtype), None

    @staticmethod
    def _on_gpu(query, key, value, pairs, dropout, scaling, window):
        device = query.device.type
        if torch.is_autocast_enabled(device):  # as `scaled_dot_product_attention` has its arguments cast
            query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
        card, sizes = card_of(query.device), (query.shape[-1], value.shape[-1])
        kernel = kernel_for(card, query.dtype, *sizes, window, dropout)
        if kernel != BLOCKS:
            return varlen(query, key, value, pairs.plan(query.device), scaling, window, kernel)
        with _kernels_for_blocks(query.device):
            return blocks(query, key, value, pairs, dropout, scaling, window)

    def _by_its_package(self, module, query, key, value, pairs, dropout, scaling, sliding_window, **kwargs):
        """One call of a flash attention's own function for sequences of different lengths, as transformers calls it."""
        plan = pairs.plan(query.device)
        key, value = (
            gathered(states.squeeze(0).transpose(0, 1), plan).transpose(0, 1).unsqueeze(0) for states in (key, value)
        )
        kwargs |= {"cu_seq_lens_q": plan.cu_q, "cu_seq_lens_k": plan.cu_k}
        kwargs |= {"max_length_q": plan.max_q, "max_length_k": plan.max_k}
        kwargs |= {"sliding_window": sliding_window, "is_causal": True}
        return self._plain(module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs)


KNOWN_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# A kernel of the Hub, as transformers names it when it has loaded one: `kernels-community/flash-attn2`, `org/repo@revision:function`
_HUB_KERNEL = re.compile(r"[^/:|]+/[^/:|]+(?:@[^/:]+)?(?::[^/:]+)?")


def is_flash(name: str | None) -> bool:
    """Whether an attention implementation is called as flash attention is: with bounds of sequences, and without a mask."""
    if name in KNOWN_ATTENTION:
        return name != "sdpa"
    if name is None or _HUB_KERNEL.fullmatch(name) is None:
        return False
    known = ALL_ATTENTION_FUNCTIONS.get(name)
    if known is None:  # not loaded: a plan is made before, perhaps on another machine
        return "flash" in name
    # Kernels with another way to be called are registered with a function of their own
    return getattr(known, "_plain", known) is flash_attention_forward


def knows_attention(name: str | None) -> bool:
    """Whether an attention implementation can be taught packed pairs."""
    return name == "sdpa" or is_flash(name)


def install(used: str | None = None) -> None:
    """Teach transformers' attention functions packed pairs, and the one that a model uses. Doing it again changes nothing."""
    for name in {*KNOWN_ATTENTION, *([used] if knows_attention(used) else [])}:
        plain = ALL_ATTENTION_FUNCTIONS.get(name)
        if plain is not None and not isinstance(plain, PairAttention):
            ALL_ATTENTION_FUNCTIONS.register(name, PairAttention(name, plain))
