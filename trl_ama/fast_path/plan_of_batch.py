"""What the attention layers of a packed batch have in common: where keys come from, where their copies are, who sees whom.

Kernels for sequences of different lengths take no mask but the causal one, aligned at the end of queries and keys. So a batch of B pairs is
2B sequences, with what all begin with as one more: queries lie in the row as they are, and of keys the common beginning and the
prefixes are copied to each sequence that sees them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


_ROUND = 128  # longest lengths are rounded up to so much: kernels take them as a bound, and what is compiled for one fits the next


class AttentionPlan:
    """How the T tokens of a packed row become N sequences with K keys in all.

    Args:
        gather (`torch.Tensor`): The token that each key is of. # (K,) int64, < T
        own, again (`torch.Tensor`): Of each token that is not common, which key is its copy, and which is its second one if it has
            two. # (T − common,) int64, < K
        twice (`torch.Tensor`): 1 where there is a second copy, else 0. # (T − common,) float32
        of_common (`torch.Tensor`, *optional*): The keys that are copies of each common token. # (common · N,), token by token
        cu_q, cu_k (`torch.Tensor`): Where the sequences' queries and keys begin, and where the last ends. # (N + 1,) int32
        common (`int`): How many tokens are common.
        max_q, max_k (`int`): Bounds of the longest sequence's queries and keys.
    """

    _TENSORS = ("gather", "own", "again", "twice", "of_common", "cu_q", "cu_k")
    _NUMBERS = ("common", "max_q", "max_k")

    def __init__(
        self,
        gather: Tensor,
        own: Tensor,
        again: Tensor,
        twice: Tensor,
        of_common: Tensor | None,
        cu_q: Tensor,
        cu_k: Tensor,
        common: int,
        max_q: int,
        max_k: int,
    ):
        self.gather, self.own, self.again, self.twice, self.of_common = gather, own, again, twice, of_common
        self.cu_q, self.cu_k = cu_q, cu_k
        self.common, self.max_q, self.max_k = common, max_q, max_k
        self._twice_as: dict[torch.dtype, Tensor] = {}

    def twice_as(self, dtype: torch.dtype) -> Tensor:
        """`twice` as a factor of gradients; converted once, not in every layer. # (T − common, 1, 1)"""
        if dtype not in self._twice_as:
            self._twice_as[dtype] = self.twice.to(dtype)[:, None, None]
        return self._twice_as[dtype]

    def map(self, change: Any) -> "AttentionPlan":
        """The plan with something done to each of its tensors."""
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        changed = {name: None if value is None else change(value) for name, value in tensors.items()}
        return AttentionPlan(**changed, **{name: getattr(self, name) for name in self._NUMBERS})


def plan_attention(common: int, lengths: Sequence[tuple[int, int, int]]) -> AttentionPlan:
    """The plan of a packed row, on the CPU; without a Python object per token, as a batch may have 10^5 keys.

    Args:
        common (`int`): Tokens that all pairs begin with, which are in the row once.
        lengths (`list[tuple[int, int, int]]`): Of the rest of each pair's prefix, its chosen and its rejected branch. # B
    """
    prefix, chosen, rejected = np.asarray(lengths, dtype=np.int64).T  # (B,) each
    sizes = prefix + chosen + rejected
    tokens = common + int(sizes.sum())
    start = common + np.cumsum(sizes) - sizes  # where each pair begins
    branch = start + prefix + chosen  # and its rejected branch
    none = np.zeros_like(prefix)
    # Of every sequence: its queries, and the up to three pieces of the row that are its keys
    queries = np.stack([prefix + chosen, rejected], axis=1).ravel()  # (2B,)
    begins = np.stack([none, start, none, none, start, branch], axis=1).reshape(-1, 3)  # (2B, 3)
    counts = np.stack(
        [none + common, prefix + chosen, none, none + common, prefix, rejected], axis=1
    ).reshape(-1, 3)  # fmt: skip
    second = np.zeros_like(counts)
    second[1::2, 1] = 1  # a rejected branch sees its prefix once more
    kept = queries > 0  # a kernel may not be called with empty sequences
    queries, begins, counts, second = queries[kept], begins[kept], counts[kept], second[kept]
    if common:
        queries = np.concatenate([[common], queries])
        begins, second = (np.concatenate([np.zeros((1, 3), np.int64), part]) for part in (begins, second))
        counts = np.concatenate([[[common, 0, 0]], counts])
    keys = counts.sum(axis=1)  # (N,)
    ends = np.cumsum(keys)
    pieces = counts.ravel()
    places = np.arange(int(ends[-1]) if len(ends) else 0)  # (K,)
    gather = places - np.repeat(np.cumsum(pieces) - pieces - begins.ravel(), pieces)

    own = np.zeros(tokens - common, dtype=np.int64)
    is_second, of_pair = np.repeat(second.ravel(), pieces) == 1, gather >= common
    own[gather[of_pair & ~is_second] - common] = places[of_pair & ~is_second]
    again, twice = own.copy(), np.zeros(tokens - common, dtype=np.float32)
    again[gather[is_second] - common] = places[is_second]
    twice[gather[is_second] - common] = 1
    of_common = (np.arange(common)[:, None] + (ends - keys)).ravel() if common else None

    def bounds(parts: np.ndarray) -> Tensor:
        return torch.tensor(np.concatenate([[0], np.cumsum(parts)]).astype(np.int32))

    def rounded(parts: np.ndarray) -> int:
        return -(-int(parts.max(initial=1)) // _ROUND) * _ROUND

    return AttentionPlan(
        *(torch.tensor(array) for array in (gather, own, again, twice)),
        of_common=None if of_common is None else torch.tensor(of_common),
        cu_q=bounds(queries),
        cu_k=bounds(keys),
        common=common,
        max_q=rounded(queries),
        max_k=rounded(keys),
    )
