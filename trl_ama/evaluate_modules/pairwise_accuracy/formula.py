"""Pairwise accuracy: NumPy and nothing else."""

import numpy as np


def pair_accuracy(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer has the higher score, ½ for a tie, 0 otherwise. # (N,)"""
    return 0.5 * (1.0 + np.sign(margins))


def accuracy_stderr(accuracy: float, count: int) -> float:
    """The binomial standard error of an accuracy over `count` pairs."""
    return float(np.sqrt(accuracy * (1 - accuracy) / count))
