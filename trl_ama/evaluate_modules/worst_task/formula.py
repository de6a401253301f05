"""Means by task and the worst of them: NumPy and nothing else."""

from collections.abc import Iterable

import numpy as np


def task_means(values: np.ndarray, tasks: np.ndarray) -> dict:
    """Task → the mean of its values, for every task that occurs.

    Args:
        values (`np.ndarray`): One of each example. # (N,)
        tasks (`np.ndarray`): The example's task, a name or a number. # (N,)
    """
    return {task: float(values[tasks == task].mean()) for task in np.unique(tasks).tolist()}


def worst_of(values: Iterable[float], greater_is_better: bool) -> float:
    """The worst of the tasks' values."""
    return float((min if greater_is_better else max)(values))
