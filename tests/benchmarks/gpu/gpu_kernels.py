"""The attention of one layer by each of the kernels there are."""

import inspect
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_card import DEVICE, synchronize
from gpu_report import NotHere, Report, in_a_line
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_ama.fast_path.forward import install
from trl_ama.fast_path.packing import PAIRS_KEY, PackedPairs, pack_pairs


PAIRS, COMMON = 8, 40


class Blocks:
    """What sees what in a packed row, for kernels that take it in one call: bounds, and where each key is in the row."""

    def __init__(self, pairs: PackedPairs):
        beginning, start = range(pairs.common), pairs.common
        blocks = [(range(pairs.common), [beginning])]
        for prefix, chosen, rejected in pairs.lengths:
            middle, end = start + prefix + chosen, start + prefix + chosen + rejected
            blocks.append((range(start, middle), [beginning, range(start, middle)]))
            blocks.append((range(middle, end), [beginning, range(start, start + prefix), range(middle, end)]))
            start = end
        self.blocks = [
            (queries, torch.tensor([index for part in seen for index in part], device=DEVICE))
            for queries, seen in blocks
            if len(queries)
        ]
        self.gather = torch.cat([seen for _, seen in self.blocks])  # (keys,)
        sizes = [len(queries) for queries, _ in self.blocks], [len(seen) for _, seen in self.blocks]
        self.cu_q, self.cu_k = (
            torch.tensor([0, *sizes_]).cumsum(0).to(device=DEVICE, dtype=torch.int32) for sizes_ in sizes
        )
        self.max_q, self.max_k = map(max, sizes)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, pairs: PackedPairs, blocks: Blocks) -> Tensor:
    """The reference: a call for every block, with its mask. # (1, heads, T, D) -> (1, T, heads, D)"""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    outputs = []
    for queries, seen in blocks.blocks:
        size, keys = len(queries), len(seen)
        mask = torch.ones(size, keys, dtype=torch.bool, device=q.device).tril(keys - size)
        part = q[:, :, queries.start : queries.stop]
        outputs.append(F.scaled_dot_product_attention(part, k.index_select(2, seen), v.index_select(2, seen), mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def fast_path(q: Tensor, k: Tensor, v: Tensor, pairs: PackedPairs, blocks: Blocks) -> Tensor:
    """What training takes, whichever kernel that is."""
    install()
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), q, k, v, None, **{PAIRS_KEY: pairs})
    return output


def _gathered(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> list[Tensor]:
    """Queries, keys and values one after the other, as variable-length kernels take them. # (tokens, heads, D) each"""
    states = (q, k.index_select(2, blocks.gather), v.index_select(2, blocks.gather))
    return [one[0].transpose(0, 1) for one in states]


def aten_flash(q: Tensor, k: Tensor, v: Tensor, pairs: PackedPairs, blocks: Blocks) -> Tensor:
    bounds = (blocks.cu_q, blocks.cu_k, blocks.max_q, blocks.max_k)
    return torch.ops.aten._flash_attention_forward(*_gathered(q, k, v, blocks), *bounds, 0.0, True, False)[0][None]


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, pairs: PackedPairs, blocks: Blocks) -> Tensor:
    try:
        from torch.nn.attention.varlen import varlen_attn as call  # torch 2.10 and later
    except ImportError as error:
        raise NotHere(f"torch {torch.__version__} has no varlen_attn") from error
    known = inspect.signature(call).parameters
    settings = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        settings["enable_gqa"] = q.shape[1] != k.shape[1]
    bounds = (blocks.cu_q, blocks.cu_k, blocks.max_q, blocks.max_k)
    return call(*_gathered(q, k, v, blocks), *bounds, **settings)[None]


def aten_efficient(q: Tensor, k: Tensor, v: Tensor, pairs: PackedPairs, blocks: Blocks) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = _gathered(q, k, v, blocks)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bounds = (blocks.cu_q, blocks.cu_k, blocks.max_q, blocks.max_k)
    lower_right = 2  # the causal mask that is aligned at the end
    states = (q[None], k[None], v[None])
    return torch.ops.aten._efficient_attention_forward(*states, None, *bounds, 0.0, lower_right, True)[0]


# name → function, and whether SDPA may take cuDNN's kernel
WAYS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "fast path": (fast_path, True),
    "blocks, cuDNN allowed": (by_blocks, True),
    "blocks without cuDNN": (by_blocks, False),
    "flash, one call (aten)": (aten_flash, True),
    "flash, one call (varlen_attn)": (varlen_attn, True),
    "memory-efficient, one call (aten)": (aten_efficient, True),
}


def attention(report: Report) -> None:
    """Forward and backward of one layer, with new lengths in every batch: in its first layer, and in a later one.

    Masks and bounds are made before: the layers of a batch share them. Blocks are of one call each, so a library that plans for
    every shape does that in the first layer.
    """
    shapes = {"tiny": (4, 2, 16)} if report.rehearse else {"8B": (32, 8, 128), "135M": (9, 3, 64)}
    types = [torch.bfloat16, torch.float32, *([] if report.rehearse else [torch.float16])]
    # Ours first: what goes wrong in a kernel can be the end of the process
    cases = [(name, dtype, way) for way in WAYS for dtype in types for name in shapes]
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for number, (name, dtype, way) in enumerate(cases):
            with report.row(f"{name}, {way}") as row:
                row |= {"type": str(dtype)[6:], "way": way}
                if way == "fast path":
                    row["kernel"] = _chosen(dtype, shapes[name][2])
                row |= _measured(WAYS[way], shapes[name], dtype, report.left / (len(cases) - number), report.rehearse)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _chosen(dtype: torch.dtype, width: int) -> str:
    """The kernel that the fast path takes by rule, where there is a rule."""
    try:
        from trl_ama.fast_path.varlen import card_of, kernel_for
    except ImportError:
        return "blocks"
    return kernel_for(card_of(torch.device(DEVICE)), dtype, width, width)


def _measured(way: tuple, shape: tuple[int, int, int], dtype: torch.dtype, seconds: float, rehearse: bool) -> dict:
    function, cudnn = way
    torch.manual_seed(0)
    times: list[tuple[float, float]] = []
    row: dict = {}
    start = time.monotonic()
    most = 2 if rehearse else 8  # of which the first is warming up, and held against float32
    while len(times) < 2 or (len(times) < most and time.monotonic() - start < seconds / 2):
        pairs = packed_lengths(2, 5, 20) if rehearse else packed_lengths(PAIRS, 60, 400)
        blocks = Blocks(pairs)
        heads, kv_heads, width = shape
        total = pairs.input_ids.shape[1]
        states = [torch.randn(1, n, total, width, device=DEVICE, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
        for one in states:
            one.requires_grad_()
        weights = torch.randn(1, total, heads, width, device=DEVICE, dtype=dtype)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        layers = []
        for _ in range(2):
            for one in states:
                one.grad = None
            synchronize()
            begin = time.perf_counter()
            try:
                output = function(*states, pairs, blocks)
                output.backward(weights)
            except (RuntimeError, ValueError, AttributeError) as error:
                if function in (fast_path, by_blocks):
                    raise
                raise NotHere(in_a_line(error)[:120]) from error
            synchronize()
            layers.append(1e3 * (time.perf_counter() - begin))
        if not times:
            row = _errors(states, output, weights, pairs, blocks)
        times.append(tuple(layers))
    first, later = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {"first layer ms": first, "later layer ms": later, **row}


def _errors(states: list[Tensor], output: Tensor, weights: Tensor, pairs: PackedPairs, blocks: Blocks) -> dict:
    """Of the output and of the worst of three gradients, against blocks in float32."""
    exact = [one.detach().float().requires_grad_() for one in states]
    torch.backends.cuda.enable_cudnn_sdp(False)
    reference = by_blocks(*exact, pairs, blocks)
    reference.backward(weights.float())
    worst = max(relative(one.grad, other.grad) for one, other in zip(states, exact, strict=True))
    return {"error": relative(output.detach(), reference.detach()), "gradient error": worst}


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def packed_lengths(count: int, shortest: int, longest: int) -> PackedPairs:
    """Pairs of random tokens, with prompts and answers of these lengths, packed."""
    parts = torch.randint(shortest, longest, (count, 3)).tolist()
    length = COMMON + max(prompt + max(chosen, rejected) for prompt, chosen, rejected in parts)
    ids = torch.zeros(2 * count, length, dtype=torch.long)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    system = torch.randint(3, 2000, (COMMON,))
    for number, (prompt, *sizes) in enumerate(parts):
        text = torch.cat([system, torch.tensor([number + 3]), torch.randint(3, 2000, (prompt - 1,))])
        for side, size in enumerate(sizes):
            row, end = number + side * count, len(text) + size
            ids[row, :end] = torch.cat([text, torch.randint(3, 2000, (size,))])
            mask[row, :end], answers[row, len(text) : end] = 1, 1
    return pack_pairs(ids.to(DEVICE), mask.to(DEVICE), answers.to(DEVICE))
