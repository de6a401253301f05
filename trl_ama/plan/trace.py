"""Runs a forward and backward pass on tensors without contents, and notes how many bytes are alive at a time.

The program is the real one: the model's own layers, PEFT's, autocast, gradient checkpointing, the packed row or TRL's padded
one, TRL's fused head or ours. Only its tensors are fake (`torch._subclasses.FakeTensorMode`: shapes and types on the meta
device), so a model of any size takes seconds and no memory. What it does not see is what a kernel allocates and frees inside.

What stands in for something else:

- **A GPU's kernels**, on a machine without one. Fused attention keeps its inputs (of a packed row, keys and values as they are gathered
  for every sequence), its output and a number per query and head (flash and memory-efficient attention alike, which pads them), and of a
  mask what it adds to the scores, in the queries' type, once for all heads. Triton folds the head's tiles in place, so only the tile is
  there.
- **bitsandbytes' layers**: see `fill_with_fakes`.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import trl.kernels.chunked_logprob as trl_head
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common.errors import first_line
from ..fast_path import varlen
from ..fast_path.attention import PairAttention, install
from ..fast_path.forward import packed_forward
from ..fast_path.packing import PAIRS_KEY, CannotShare, PackedPairs
from ..policies.empty import fill_with_fakes
from .empty_model import MemorySettings, base_model


class CannotTrace(ValueError):
    """Why a model cannot be run on tensors without contents, as half a sentence."""


class Traced(NamedTuple):
    """Bytes beside weights, optimizer states and gradients that were there before: at the worst moment of a pass, those of them that
    are gradients, and what the backward pass finds."""

    peak: int
    gradients: int
    kept: int


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of the storages that operations make, until nobody holds them any more."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensors) -> None:
        """Tensors that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def count_gradient(self, parameter: Tensor) -> None:
        """A gradient is complete; it is one of the storages that are alive."""
        self.gradients += parameter.grad.nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.device):  # the backward pass asks for it more often than it computes
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


# ---- Stand-ins ----


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention hold.

    # (B, heads, Q, D), (B, kv heads, K, D) twice -> (B, heads, Q, D); of sequences of different lengths, one after the other,
    # (T, heads, D), (K, kv heads, D) twice -> (T, heads, D)
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sums: tuple[int, ...]) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        bias = [] if mask is None else [query.new_empty(mask.shape)]
        logsumexp = query.new_empty(sums, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp, *bias)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        total = torch.empty_like(query, dtype=torch.float32)  # the queries' gradient is summed in 32 bits
        wide = [
            side.new_empty(len(side), query.shape[1], *side.shape[2:]) for side in (key, value)
        ]  # for each query head
        gradients = (torch.empty_like(query), *(torch.empty_like(side) for side in (key, value)))
        del total, wide
        return *gradients, None, None


def _gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` as a GPU would run it."""
    mask = None if isinstance(attn_mask, CausalBias) else attn_mask  # which is no tensor there
    return _FusedAttention.apply(query, key, value, mask, query.shape[:-1])


def _flash_attention(module, query, key, value, attention_mask, **kwargs):
    """Flash attention without its package."""
    return _FusedAttention.apply(query, key, value, None, query.shape[:-1]).transpose(1, 2), None


def _varlen_flash(query, key, value, plan, scale, window):
    """Torch's flash attention of sequences of different lengths. # (T, heads, D), (K, kv heads, D) twice -> (T, heads, D)"""
    return _FusedAttention.apply(query, key, value, None, query.shape[:-1])


def _varlen_efficient(query, key, value, plan, scale):
    """Torch's memory-efficient attention of such: it has no grouped heads, and pads the sums of every sequence alike."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
    sums = (len(plan.cu_q) - 1, query.shape[1], plan.max_q)
    return _FusedAttention.apply(query, key, value, None, sums)


@contextlib.contextmanager
def _device(settings: MemorySettings, name: str) -> Iterator[None]:
    """While open, the program takes the ways that it takes on the device; a CPU's are its own."""
    install()
    if settings.device == "cpu":
        yield
        return
    with contextlib.ExitStack() as stack:
        if settings.flash:
            stack.callback(ALL_ATTENTION_FUNCTIONS.register, name, ALL_ATTENTION_FUNCTIONS[name])
            ALL_ATTENTION_FUNCTIONS.register(name, PairAttention("flash_attention_2", _flash_attention))
        attention = "scaled_dot_product_attention"
        stack.enter_context(patch.object(torch.nn.functional, attention, _gpu_attention))
        stack.enter_context(varlen.as_on_a_gpu())
        stack.enter_context(patch.object(varlen, "flash", _varlen_flash))
        stack.enter_context(patch.object(varlen, "efficient", _varlen_efficient))
        stack.enter_context(patch.object(trl_head, "_forward_tile", lambda *args, **kwargs: None))
        stack.enter_context(patch.object(trl_head, "_backward_tile", lambda *args, **kwargs: None))
        stack.enter_context(patch.object(trl_head, "_addmm_fp32", lambda total, left, right: total.zero_()))
        yield


# ---- The pass ----


def packed_row(pairs: list[tuple[int, int, int]], common: int = 0) -> PackedPairs:
    """The packed row of pairs of these lengths, of which all prompts begin with `common` tokens, which are in it once.

    The last token of an answer is not in the row, and all of an answer's are scored.
    """
    lengths = [(prompt - common, max(chosen - 1, 0), max(rejected - 1, 0)) for prompt, chosen, rejected in pairs]
    tokens, scored = common + sum(map(sum, lengths)), sum(chosen + rejected for _, chosen, rejected in pairs)
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)
    zeros = torch.zeros(1, tokens, dtype=torch.long)
    return PackedPairs(
        input_ids=zeros,
        position_ids=zeros.clone(),
        labels=torch.zeros(1, scored, dtype=torch.long),
        score_positions=torch.zeros(scored, dtype=torch.long),
        slots=torch.zeros(2 * len(pairs), longest - 1, dtype=torch.long),
        scored=torch.ones(2 * len(pairs), longest - 1, dtype=torch.bool),
        common=common,
        lengths=lengths,
    )


def _padded_forward(model: torch.nn.Module, settings: MemorySettings, pairs: list[tuple[int, int, int]]) -> Any:
    """TRL's batch: 2B rows. Off the GPU its head scores every position, on it only the answers'."""
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)
    ids = torch.zeros(2 * len(pairs), longest, dtype=torch.long)
    # The model was made with `sdpa` where it is planned with flash attention, which makes no mask of four dimensions
    mask = None if settings.flash else torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "fused_lm_head": True}
    if settings.device == "cpu":
        return model(**inputs, labels=ids.clone())
    scored = sum(chosen + rejected for _, chosen, rejected in pairs)

    def pick(module, args, outputs):
        states = outputs.last_hidden_state.flatten(0, 1)  # (2B L, H)
        outputs.last_hidden_state = states[torch.zeros(scored, dtype=torch.long)][None]
        return outputs

    handle = base_model(model).base_model.register_forward_hook(pick)
    try:
        return model(**inputs, shift_labels=torch.zeros(1, scored, dtype=torch.long))
    finally:
        handle.remove()


def trace_pass(
    model: torch.nn.Module,
    settings: MemorySettings,
    pairs: list[tuple[int, int, int]],
    packed: bool,
    trains: bool,
    common: int = 0,
) -> Traced:
    """Run one pass over a batch and count.

    Args:
        model (`torch.nn.Module`): Of [`empty_model`]; of no use afterwards.
        settings ([`MemorySettings`]): Precision, gradient checkpointing and device.
        pairs (`list[tuple[int, int, int]]`): Tokens of prompt, chosen and rejected answer.
        packed (`bool`): One packed row, or TRL's padded rows.
        trains (`bool`): With a backward pass, or without gradients.
        common (`int`): How many tokens all prompts begin with; they are in a packed row once.

    Raises:
        CannotShare: If the model's layers do not all know packed rows.
        CannotTrace: If what the model computes next depends on what it has computed.
    """
    inner = base_model(model)
    live, tuner = LiveBytes(), model
    with FakeTensorMode(allow_non_fake_inputs=True), _device(settings, inner.config._attn_implementation):
        fill_with_fakes(model)
        model.train(trains)
        if trains and settings.gradient_checkpointing:
            # The state of random numbers would be read, and there is no dropout
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            # Of two names for the same, transformers 5.23 warns about the older one
            getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)(kwargs)
            if tuner is not inner:
                tuner.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trains and settings.accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            live.ignore(parameter.grad for parameter in trained)
        live.ignore(tensor for group in (model.parameters(), model.buffers()) for tensor in group)
        if not settings.accumulates:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(live.count_gradient)
        autocast = torch.autocast("cpu", settings.autocast, enabled=settings.autocast is not None)
        try:
            with live, torch.set_grad_enabled(trains):
                with autocast:
                    row = packed_row(pairs, common) if packed else None
                    outputs = (
                        _padded_forward(model, settings, pairs) if row is None else _packed_forward(model, row, trains)
                    )
                kept = live.now
                if trains:
                    outputs.log_probs.float().sum().backward()
                del outputs
        except CannotShare:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise CannotTrace(
                f"{type(inner).__name__} decides by its own numbers what to compute, so its activations are unknown"
            ) from error
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as error:
            raise CannotTrace(
                f"{type(inner).__name__} cannot be run without contents ({type(error).__name__}: {first_line(error)})"
            ) from error
    return Traced(live.peak, live.gradients_at_peak, kept)


def _packed_forward(model: torch.nn.Module, row: PackedPairs, trains: bool) -> Any:
    row.cache["layers"] = 0  # as in a trial: those that know packed rows count themselves
    try:
        outputs = packed_forward(model, row, metrics=trains, use_cache=False)  # scoring wants log-probs alone
    except TypeError as error:  # a model that does not pass keyword arguments on to its attention
        if PAIRS_KEY not in str(error):
            raise
        raise CannotShare("its layers do not pass on what a packed row needs") from error
    layers, known = base_model(model).config.num_hidden_layers, row.cache["layers"]
    if known != layers:
        raise CannotShare(f"{known} of its {layers} layers compute attention in a way that can be shared")
    return outputs
