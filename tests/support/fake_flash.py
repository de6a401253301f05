"""Flash attention and torch's kernels for sequences of different lengths, computed on any machine as their documentation says:
causal masks and windows aligned at the end of both sequences, softcapping, sinks."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash

from trl_ama.fast_path import varlen


class FakeFlash:
    """`flash_attn_varlen_func` and `flash_attn_func`, sequence by sequence."""

    def __init__(self):
        self.varlen_calls = []

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        s_aux=None,
    ):
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        # What a kernel would read out of bounds, or leave undefined
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (q_ends[0], q_ends[-1], k_ends[0], k_ends[-1]) == (0, len(q), 0, len(k)) and len(k) == len(v)
        assert len(q_ends) == len(k_ends) and causal
        q_sizes, k_sizes = (
            [end - start for start, end in zip(ends, ends[1:], strict=False)] for ends in (q_ends, k_ends)
        )
        assert max(q_sizes) <= max_seqlen_q and max(k_sizes) <= max_seqlen_k and min(q_sizes) > 0
        self.varlen_calls.append((q_sizes, k_sizes))
        q_parts, k_parts, v_parts = q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)
        settings = (softmax_scale, window_size, softcap, s_aux)
        return torch.cat([self.attention(*part, *settings) for part in zip(q_parts, k_parts, v_parts, strict=True)])

    def padded(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None
    ):
        assert causal
        settings = (softmax_scale, window_size, softcap, s_aux)
        return torch.stack([self.attention(*row, *settings) for row in zip(q, k, v, strict=True)])

    @staticmethod
    def attention(q, k, v, scale, window, softcap, sinks):
        """One sequence. # q (Q, heads, D), k and v (K, kv heads, D) -> (Q, heads, D)"""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale if scale is not None else q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        here = torch.arange(len(q))[:, None] + len(k) - len(q)  # aligned at the end
        distance = here - torch.arange(len(k))
        visible = distance >= 0
        if window[0] >= 0:
            visible &= distance <= window[0]
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1)[..., : len(k)], v)


@pytest.fixture
def fake_flash(monkeypatch):
    fake = FakeFlash()
    functions = (fake.padded, fake.varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn",
                 "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):  # fmt: skip
        monkeypatch.setattr(flash, name, None)  # and put back what was there
    return fake


@pytest.fixture
def fake_varlen(monkeypatch):
    """A card that is not there: packed rows take the ways of a GPU, with the kernel in torch's place computed by [`FakeFlash`]."""
    fake = FakeFlash()

    def kernel(query, key, value, plan, scale, window=None):
        left = -1 if window is None else window - 1
        bounds = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
        return fake.varlen(query, key, value, *bounds, 0.0, scale, True, (left, 0))

    monkeypatch.setattr(varlen, "flash", kernel)
    monkeypatch.setattr(varlen, "efficient", kernel)
    with varlen.as_on_a_gpu():
        yield fake
