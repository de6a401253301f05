"""Excess loss: for NumPy arrays and torch tensors alike, with nothing imported."""

from typing import Any


def excess_losses(losses: Any, reference_losses: Any, clip: bool = True) -> Any:
    """Excess max(L(θ, z) − ℓ*(z), 0) of each pair's loss over its reference loss; without `clip` it may be negative. # (N,)"""
    excess = losses - reference_losses
    return excess.clip(min=0) if clip else excess
