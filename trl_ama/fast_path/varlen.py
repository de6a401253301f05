"""Attention of a packed row in one call a layer, where there is a kernel for sequences of different lengths.

Block by block, a batch of B pairs takes 2B calls forward and 2B backward, and on a GPU what counts for small models is the number of calls.
Which kernel is taken is a rule and no trial: the same on every process, and to be read off beforehand.
"""

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import CausalVariant

from .plan_of_batch import AttentionPlan


FLASH, EFFICIENT, BLOCKS = "flash", "efficient", "blocks"
_LARGEST_HEAD = 256  # of torch's flash attention


class Card(NamedTuple):
    """What the choice of a kernel depends on beside the numbers.

    Args:
        capability (`tuple[int, int]`): CUDA's compute capability.
        flash, efficient (`bool`): Whether torch was built with the kernel, and may use it (`torch.backends.cuda`).
    """

    capability: tuple[int, int]
    flash: bool = True
    efficient: bool = True


_PLANNED_FOR = Card((8, 0))
_as_on_a_gpu = False


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While open, a packed row takes the ways of a GPU on any machine: a plan is made for a card that is not there."""
    global _as_on_a_gpu
    before, _as_on_a_gpu = _as_on_a_gpu, True
    try:
        yield
    finally:
        _as_on_a_gpu = before


def planned_for_a_gpu() -> bool:
    """Whether [`as_on_a_gpu`] is open."""
    return _as_on_a_gpu


def on_cpu(device: torch.device) -> bool:
    """Whether what runs there takes the ways of a CPU."""
    return device.type == "cpu" and not _as_on_a_gpu


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def card_of(device: torch.device) -> Card | None:
    """The card that tensors are on; `None` where torch's kernels for CUDA do not run, AMD's cards among them."""
    if _as_on_a_gpu and device.type in ("cpu", "meta"):
        return _PLANNED_FOR
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    allowed = torch.backends.cuda
    return Card(
        _capability(device),
        allowed.is_flash_attention_available() and allowed.flash_sdp_enabled(),
        allowed.mem_efficient_sdp_enabled(),
    )


def kernel_for(
    card: Card | None, dtype: torch.dtype, head: int, value_head: int, window: int | None = None, dropout: float = 0.0
) -> str:
    """The kernel for a layer's attention: `FLASH`, `EFFICIENT`, or `BLOCKS` where none takes all sequences in one call.

    Args:
        card ([`Card`], *optional*): Of [`card_of`].
        dtype (`torch.dtype`): In which attention is computed.
        head, value_head (`int`): Dimensions of a head's queries and keys, and of its values.
        window (`int`, *optional*): How many keys a query sees, itself included, if some sequence is longer.
        dropout (`float`): Of attention's weights.
    """
    if card is None or dropout:
        return BLOCKS
    half, is_new = dtype in (torch.float16, torch.bfloat16), card.capability >= (8, 0)
    fits = head == value_head <= _LARGEST_HEAD and head % 8 == 0
    # Its backward pass wants more shared memory for these than other cards have
    fits = fits and (not 192 < head <= 224 or card.capability == (8, 0) or card.capability[0] in (9, 10))
    if card.flash and half and is_new and fits:
        return FLASH
    # Its gradients know no window: torch leaves it out of the backward pass
    aligned = 8 if half else 4  # numbers in 16 bytes
    known = dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and is_new)
    if card.efficient and known and window is None and head % aligned == value_head % aligned == 0:
        return EFFICIENT
    return BLOCKS


# ---- Keys of every sequence ----


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return states.index_select(0, plan.gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        first, second = grad.index_select(0, plan.own), grad.index_select(0, plan.again)  # (T − common, heads, D)
        factor = plan.twice_as(grad.dtype)
        if plan.of_common is None:
            return torch.addcmul(
                first, second, factor
            ), None  # of two numbers rounded once, so the dtype's sum is exact
        total = grad.new_empty(plan.common + len(plan.own), *grad.shape[1:])  # (T, heads, D)
        torch.addcmul(first, second, factor, out=total[plan.common :])
        del first, second
        copies = grad.index_select(0, plan.of_common).unflatten(0, (plan.common, -1))  # (common, N, heads, D)
        total[: plan.common] = copies.sum(dim=1, dtype=torch.promote_types(grad.dtype, torch.float32))
        return total, None


def gathered(states: Tensor, plan: AttentionPlan) -> Tensor:
    """The keys or values of all sequences, one after the other; gradients of a token's copies are summed in at least 32 bits.

    `index_select` alone would add them one by one, each sum rounded to 16 bits, in an order that a GPU's threads decide.

    Args:
        states (`torch.Tensor`): Keys or values of the row. # (T, heads, D)
        plan ([`AttentionPlan`]): Of the batch.

    Returns:
        `torch.Tensor`. # (K, heads, D)
    """
    return _Gathered.apply(states, plan)


# ---- The call ----


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None,
    window: int | None,
    kernel: str,
) -> Tensor:
    """Attention of a packed row by one of torch's kernels.

    Args:
        query, key, value (`torch.Tensor`): Of the row. # (1, heads, T, D), (1, kv heads, T, D), (1, kv heads, T, Dv)
        plan ([`AttentionPlan`]): Of the batch, on the same device.
        scale (`float`, *optional*): Of the scores; 1/√D if `None`.
        window (`int`, *optional*): How many keys a query sees, itself included.
        kernel (`str`): Of [`kernel_for`], in the tensors' dtype.

    Returns:
        `torch.Tensor`. # (1, T, heads, Dv)
    """
    # Not `[0]`, whose gradient is written into zeros
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # (T, heads, D)
    if query.stride(-1) != 1:
        query = query.contiguous()
    key, value = gathered(key, plan), gathered(value, plan)
    if kernel == FLASH:
        return flash(query, key, value, plan, scale, window).unsqueeze(0)
    return efficient(query, key, value, plan, scale).unsqueeze(0)


def flash(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None, window: int | None
) -> Tensor:
    """Torch's flash attention; its kernels know grouped heads and windows. # (T, heads, D), (K, kv heads, D) twice -> (T, heads, D)"""
    bounds = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
    left = -1 if window is None else window - 1  # before the query's own
    public = _public_function()
    if public is not None:
        groups = query.shape[1] != key.shape[1]
        return public(query, key, value, *bounds, scale=scale, window_size=(left, 0), enable_gqa=groups)
    dropout, is_causal, returns_mask = 0.0, True, False
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, dropout, is_causal, returns_mask, scale=scale, window_size_left=left, window_size_right=0
    )[0]  # fmt: skip


@functools.cache
def _public_function() -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, where this version of torch has one that takes all that is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # from torch 2.10 on
    except ImportError:
        return None
    return varlen_attn if takes_all(inspect.signature(varlen_attn).parameters) else None


def takes_all(parameters: Collection[str]) -> bool:
    """Whether a `varlen_attn` with these parameters knows scales, windows and grouped heads; torch 2.10's has `is_causal` instead."""
    return {"scale", "window_size", "enable_gqa"} <= set(parameters)


def efficient(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None) -> Tensor:
    """Torch's memory-efficient attention. # (T, heads, D), (K, kv heads, D), (K, kv heads, Dv) -> (T, heads, Dv)"""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    trains = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    bias, dropout = None, 0.0
    return torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), bias, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k,
        dropout, int(CausalVariant.LOWER_RIGHT), trains, scale=scale,
    )[0].squeeze(0)  # fmt: skip
