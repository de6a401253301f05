"""Mixing strategies: pure mathematics behind five verbs (see `base.py`)."""

import numpy as np

from ..common.errors import AMAError, nearest
from .ama import AMAResampling, AMAReweighting
from .base import MixingStrategy, StepStatistics
from .fixed import Proportional, TaskNormalized, Uniform


STRATEGIES: dict[str, type[MixingStrategy]] = {
    strategy.name: strategy for strategy in (Proportional, Uniform, TaskNormalized, AMAReweighting, AMAResampling)
}


def check_strategy_name(name: str) -> None:
    """Raise an `AMAError` that lists the known strategies if `name` is none of them."""
    if name not in STRATEGIES:
        raise AMAError(f"Unknown mixing '{name}'; known are {sorted(STRATEGIES)}.{nearest(name, list(STRATEGIES))}")


def build_strategy(
    name: str,
    task_sizes: np.ndarray,
    *,
    mixing_lr: float | None = None,
    smoothing: float = 0.1,
    excess_clip: str = "pair",
    sampling: str = "uniform",
) -> MixingStrategy:
    """Build the strategy called `name`; each takes of the options what it knows.

    Args:
        name (`str`): A key of `STRATEGIES`.
        task_sizes (`np.ndarray`): Number of training pairs of each task. # (k,)
        mixing_lr (`float`, *optional*): η of the adaptive strategies; `None` for the regret bound's.
        smoothing (`float`): c of `ama_s`.
        excess_clip (`str`): `"pair"`, `"task"` or `"none"`.
        sampling (`str`): The fixed draws of `ama_r`: `"uniform"` or `"proportional"`.

    Raises:
        AMAError: If the name or an option is not valid.
    """
    check_strategy_name(name)
    if name == AMAReweighting.name:
        return AMAReweighting(task_sizes, mixing_lr, excess_clip, sampling)
    if name == AMAResampling.name:
        return AMAResampling(task_sizes, mixing_lr, excess_clip, smoothing)
    return STRATEGIES[name](task_sizes)


__all__ = [
    "STRATEGIES",
    "AMAResampling",
    "AMAReweighting",
    "MixingStrategy",
    "Proportional",
    "StepStatistics",
    "TaskNormalized",
    "Uniform",
    "build_strategy",
    "check_strategy_name",
]
