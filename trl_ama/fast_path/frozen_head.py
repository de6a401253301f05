"""TRL's fused LM head for a head that is not trained: two products with the vocabulary instead of three.

How a token's log-prob y moves with its hidden state h does not depend on what the loss does with it:

    d log p(y | h) / d h = w_y − Σ_v p(v | h) w_v

so the forward pass, which has the probabilities in hand, makes this vector, and the backward pass only scales it. TRL's head
keeps nothing and computes every logit again; and it visits each about fifteen times where this one visits it six times,
because metrics (entropy, mean logit, top-1) come from the same exponentials.

A head that is trained (full fine-tuning, `modules_to_save`), soft-capped logits, and GPUs, where TRL has a Triton kernel, stay
with TRL's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor


_LOOKED_UP = "_ChunkedLogProbFunction"  # TRL's fused forward looks it up at every call
_PICKS = (
    "_use_triton"  # and by this, whether to look for the positions that have a label, for which it waits for a GPU
)
_TOKENS = 128  # at a time: enough for the matrix product, few enough for the caches
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's function


class FrozenHead(torch.autograd.Function):
    """Log-probs (and metrics, which have no gradient) of targets under a linear head without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """
        Args:
            hidden (`torch.Tensor`): Hidden states. # (N, H)
            weight, bias (`torch.Tensor`): The head's. # (V, H), (V,)
            targets (`torch.Tensor`): The tokens to score. # (N,)
            scale (`float`): What logits are multiplied by.
            outputs (`tuple[str, ...]`): Which of `OUTPUTS` to compute; log-probs always are, the others are `None`.

        Returns:
            `tuple` of `OUTPUTS`. # (N,) each
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = weight.to(dtype)
        found: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", *outputs)}
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, H)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), _TOKENS):
                part = slice(start, start + _TOKENS)
                logits = torch.mm(hidden[part].to(dtype), weight.t())  # (n, V)
                if bias is not None:
                    logits += bias.to(dtype)
                slope = _score(logits, weight, targets[part], scale, found, slopes is not None)
                if slopes is not None:
                    slopes[part] = slope
        if slopes is not None:
            ctx.save_for_backward(slopes)
        none = hidden.new_zeros(0, dtype=torch.float32)
        values = [torch.cat(found[name] or [none]) if name in found else None for name in OUTPUTS]
        ctx.mark_non_differentiable(*(value for value in values[1:] if value is not None))
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (None if grad is None else (grad[:, None] * slopes).to(slopes.dtype), *[None] * 5)


def _score(
    logits: Tensor, weight: Tensor, targets: Tensor, scale: float, found: dict[str, list[Tensor]], differentiate: bool
) -> Tensor | None:
    """Add what `found` asks for, of n tokens; with `differentiate`, return how their log-probs move. # (n, V) -> (n, H)"""
    logits = logits.float()
    if scale != 1.0:
        logits *= scale
    largest, top = logits.max(dim=1)  # (n,): the first of equal ones, as TRL counts it
    target = logits.gather(1, targets[:, None]).squeeze(1)  # (n,)
    relative = (logits - largest[:, None]).exp_()  # (n, V): probabilities but for the sum
    total = relative.sum(dim=1)  # (n,)
    log_total = largest + total.log()
    found["log_probs"].append(target - log_total)
    if "entropy" in found:
        found["entropy"].append(log_total - _dot(relative, logits) / total)
    if "log_sum_sq_probs" in found:
        found["log_sum_sq_probs"].append(_dot(relative, relative).log() - 2 * total.log())
    if "mean_logits" in found:
        found["mean_logits"].append(logits.mean(dim=1))
    if "is_top1" in found:
        found["is_top1"].append(top == targets)
    if not differentiate:
        return None
    # Of the target's own term w_y − p(y) w_y the factor is kept exact: near 1 − p = 0 a difference of rounded sums is noise
    missing = (total - relative.gather(1, targets[:, None]).squeeze(1)) / total  # (n,): 1 − p(y)
    relative.scatter_(1, targets[:, None], 0.0)
    others = torch.mm(relative.to(weight.dtype), weight).float() / total[:, None]  # (n, H)
    return (missing[:, None] * weight[targets].float() - others) * scale


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, without a third matrix. # (n, V), (n, V) -> (n,)"""
    return torch.bmm(left[:, None], right[:, :, None]).flatten()


class _Choice:
    """Stands where TRL looks its function up: ours if the head is frozen and on the CPU, else TRL's."""

    def __init__(self, theirs: Any, metrics: bool):
        self._theirs, self._metrics = theirs, metrics

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        outputs = tuple(outputs) if self._metrics else ("log_probs",)
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if (trained and torch.is_grad_enabled()) or softcap is not None or hidden.device.type != "cpu":
            return self._theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        outputs = tuple(name for name in outputs if name != "log_probs")
        return FrozenHead.apply(hidden, weight, bias, targets, logit_scale / temperature, outputs)


@contextlib.contextmanager
def frozen_head(metrics: bool = True) -> Iterator[None]:
    """While open, TRL's fused head leaves frozen heads to [`FrozenHead`], and takes every position that it is given for a labelled one.

    Args:
        metrics (`bool`): Whether anything but log-probs is wanted.
    """
    with contextlib.ExitStack() as stack:
        for name, ours in ((_LOOKED_UP, lambda theirs: _Choice(theirs, metrics)), (_PICKS, lambda _: _never)):
            theirs = getattr(trl.trainer.utils, name, None)
            if theirs is not None:  # in another TRL: slower, and as right
                setattr(trl.trainer.utils, name, ours(theirs))
                stack.callback(setattr, trl.trainer.utils, name, theirs)
        yield


def _never(device: torch.device) -> bool:
    return False
