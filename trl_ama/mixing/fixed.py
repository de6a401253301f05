"""Mixtures that never change: what people do today, and what every comparison shows beside the adaptive ones."""

from typing import ClassVar

import numpy as np

from .base import MixingStrategy


class Proportional(MixingStrategy):
    """Every pair once an epoch: p_i = n_i / N. Concatenate and shuffle, the "standard DPO" of the paper."""

    name: ClassVar[str] = "proportional"
    objective: ClassVar[str] = "loss"
    uses_own_sampler: ClassVar[bool] = False
    plain_loss: ClassVar[bool] = True

    def probabilities(self) -> np.ndarray:
        return self.task_sizes / self.task_sizes.sum()

    def loss_weights(self) -> np.ndarray:
        return np.ones(self.num_tasks)


class Uniform(MixingStrategy):
    """Every task equally often: p_i = 1 / k. "Stratified" sampling, hard to beat (Aioli, arXiv 2411.05735)."""

    name: ClassVar[str] = "uniform"
    objective: ClassVar[str] = "loss"
    plain_loss: ClassVar[bool] = True

    def probabilities(self) -> np.ndarray:
        return np.full(self.num_tasks, 1.0 / self.num_tasks)

    def loss_weights(self) -> np.ndarray:
        return np.ones(self.num_tasks)


class TaskNormalized(Proportional):
    """Draw as `proportional`, weigh each pair N / (k n_i): every task counts equally in the objective."""

    name: ClassVar[str] = "task_normalized"
    plain_loss: ClassVar[bool] = False

    def loss_weights(self) -> np.ndarray:
        return self.task_sizes.sum() / (self.num_tasks * self.task_sizes)
