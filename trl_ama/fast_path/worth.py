"""Where the fast path is no slower than the plain one: a rule from shapes and the device, and nothing that is timed.

*On a CPU* it always is: there is nothing to launch, and what is left out is not computed. The least of all cases that
`tests/benchmarks/speed.py` measures, scoring of short prompts with long answers, is 1.07 times as fast (docs/speed.md).

*With a variable-length attention kernel* it is by construction: one call a layer, as the plain path makes, and so as many
kernels, over at most as many tokens.

*Without one* attention is computed pair by pair, which no count of tokens can make up for where the device waits for its next
kernel already. Per layer, of a training step:

    plain   max(228 launches,               work of the padded tokens)
    ours    max(228 launches + 18 a pair,   work of the packed tokens + 18 small kernels a pair)

228 kernels of a layer (96 forwards), and 18 a pair (28 after a common beginning, where each block needs a mask), were counted on a
Llama with LoRA in bfloat16. A launch is taken to cost 8 µs of the host, which is what it does with PEFT's Python around it, and
a small kernel 4 µs of the device. A token's work in a layer of width H is 9 H bytes a kernel and 48 H² operations (LoRA: forward,
and gradients of inputs), at 5 TB/s and 1,000 Tflop/s. These are about twice what an H100 does: on a slower card there is more work behind
each launch, so that the rule errs towards the plain path. The figures are counts and estimates; no GPU has run it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .attention import is_flash
from .packing import PackedPairs
from .varlen import BLOCKS, card_of, kernel_for


_LAUNCH, _SMALL = 8e-6, 4e-6  # seconds
_BYTES_A_SECOND, _OPERATIONS_A_SECOND = 5e12, 1e15
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BYTES = 9  # of a kernel, for each token and feature: read and written, in 16 and 32 bits


@dataclass(frozen=True)
class _Kernels:
    """Kernels of a layer, those that each pair adds, without and with a common beginning, and operations per H² and token."""

    layer: int
    pair: int
    pair_after_common: int
    operations: int


_TRAINING, _SCORING = _Kernels(228, 18, 28, 48), _Kernels(96, 8, 14, 24)


def seconds_a_layer(width: int, tokens: int, pairs: int, common: bool, trains: bool) -> float:
    """Estimated time of a layer. # seconds

    Args:
        width (`int`): Hidden size.
        tokens (`int`): All that go through the layer.
        pairs (`int`): Pairs whose attention is computed one by one; 0 on the plain path.
        common (`bool`): Whether all pairs of a packed row have a beginning in common.
        trains (`bool`): Whether there is a backward pass.
    """
    kernels = _TRAINING if trains else _SCORING
    extra = pairs * (kernels.pair_after_common if common else kernels.pair)
    token = kernels.layer * _BYTES * width / _BYTES_A_SECOND + kernels.operations * width**2 / _OPERATIONS_A_SECOND
    return max(_LAUNCH * (kernels.layer + extra), tokens * token + _SMALL * extra)


def has_varlen(model: torch.nn.Module, device: torch.device, mixed_precision: str, longest: int | None = None) -> bool:
    """Whether attention of a packed row is one call of a variable-length kernel a layer.

    Args:
        model (`torch.nn.Module`): Transformers' own, in no wrapper.
        device (`torch.device`): Of its layers.
        mixed_precision (`str`): Accelerate's.
        longest (`int`, *optional*): Tokens of the longest sequence; a window may be shorter if it is not known.
    """
    if is_flash(model.config._attn_implementation):
        return True
    dtype = _MIXED.get(mixed_precision) or model.get_input_embeddings().weight.dtype
    text = model.config.get_text_config()
    head = getattr(text, "qk_head_dim", None) or getattr(
        text, "head_dim", None
    )  # DeepSeek's queries and keys are wider
    head = head or getattr(text, "hidden_size", 0) // (getattr(text, "num_attention_heads", None) or 1)
    window = getattr(text, "sliding_window", None)
    if window is not None and longest is not None and longest <= window:
        window = None
    return kernel_for(card_of(device), dtype, head, getattr(text, "v_head_dim", None) or head, window) != BLOCKS


def is_worth_it(device: str, varlen: bool, config: Any, pairs: PackedPairs, padded: int, trains: bool) -> bool:
    """Whether a packed row takes no longer than its padded batch.

    Args:
        device (`str`): Type of the device, as in `torch.device.type`.
        varlen (`bool`): Whether attention to all pairs is one call of a variable-length kernel.
        config: The model's.
        pairs ([`PackedPairs`]): The batch.
        padded (`int`): Tokens of the batch with its padding, 2B L.
        trains (`bool`): Whether there is a backward pass.
    """
    if device == "cpu" or varlen:
        return True
    width = getattr(config.get_text_config(), "hidden_size", 0)
    packed, count, common = pairs.input_ids.shape[1], len(pairs.lengths), pairs.common > 0
    ours = seconds_a_layer(width, packed, count, common, trains)
    return ours <= seconds_a_layer(width, padded, 0, False, trains)


def why_slow(device: str) -> str:
    """The reason why a batch takes the plain path, the same for every batch of a run: it is told once."""
    return (
        f"on this device ({device}) no kernel computes attention of all pairs at once, and to launch one for each pair takes longer than "
        "the tokens that are left out"
    )


def slower(model: str, reason: str) -> str:
    """What is said once of a model that could take the fast path."""
    return (
        f"Prefix sharing would be slower for {model} on batches like this one, which take the plain path: {reason}. "
        "prefix_sharing: true takes the fast path all the same."
    )
