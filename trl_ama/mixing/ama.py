"""AutoMixAlign (arXiv 2506.00569): AMA-R reweights, AMA-S resamples, towards the task that lags its specialist most."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from ..common.errors import AMAError
from .base import MixingStrategy, StepStatistics


# A task's mean excess under `excess_clip="task"` is followed over about this many of the steps that drew the task
_TASK_CLIP_MEMORY = 10


class _ExponentiatedGradient(MixingStrategy):
    """Weights on the simplex that grow with exp(η · estimate), kept in log space.

    Args:
        task_sizes (`np.ndarray`): Number of training pairs n_i of each task. # (k,)
        mixing_lr (`float` or `None`): η per nat; `None` takes it from the regret bound once `set_horizon` is called.
        excess_clip (`str`): `"pair"`, `"task"` or `"none"`; see [`AMAConfig`].

    Raises:
        AMAError: If there is a single task, or η is not a positive number.
    """

    def __init__(self, task_sizes: np.ndarray, mixing_lr: float | None = None, excess_clip: str = "pair"):
        super().__init__(task_sizes)
        if self.num_tasks < 2:
            raise AMAError(
                f"mixing='{self.name}' balances several tasks, but the data has a single one. Add the other tasks' "
                "pairs, or set mixing='proportional'."
            )
        if mixing_lr is not None and not (math.isfinite(mixing_lr) and mixing_lr > 0):
            raise AMAError(f"mixing_lr must be 'auto' or a positive number, got {mixing_lr}.")
        self.mixing_lr = mixing_lr
        self.excess_clip = excess_clip
        self._auto_lr = mixing_lr is None
        self._log_weights = np.full(self.num_tasks, -math.log(self.num_tasks))
        self._followed_excess = np.full(self.num_tasks, np.nan)  # only `excess_clip="task"` reads it

    def set_horizon(self, num_steps: int, excess_range: float) -> None:
        if self._auto_lr:
            scale = excess_range if excess_range > 0 else 1.0
            self.mixing_lr = self._regret_bound_lr(max(num_steps, 1)) / scale

    @abstractmethod
    def _regret_bound_lr(self, num_steps: int) -> float:
        """η of the regret bound for losses in [0, 1] over T steps."""

    def _ascend(self, estimate: np.ndarray) -> None:
        if self.mixing_lr is None:
            raise AMAError("mixing_lr='auto' needs the length of the run: call set_horizon(num_steps, range) first.")
        move = self.mixing_lr * estimate
        if not np.isfinite(move).all():
            if not np.isfinite(estimate).all():
                raise AMAError(
                    f"The excess losses of this step are not finite ({estimate.tolist()}). Lower learning_rate, or check "
                    "the reference losses for NaN."
                )
            raise AMAError(f"mixing_lr={self.mixing_lr} times the excess losses of a step overflows. Lower mixing_lr.")
        log_weights = self._log_weights + move
        # log-sum-exp with the maximum taken out: exact for any size of the estimate, and Σ = 1 to rounding forever
        log_weights -= log_weights.max()
        self._log_weights = log_weights - math.log(np.exp(log_weights).sum())

    def _weights(self) -> np.ndarray:
        weights = np.exp(self._log_weights)
        return weights / weights.sum()

    def _open_tasks(self) -> np.ndarray:
        """1 for tasks that send a gradient; 0 for those whose mean excess is not positive, if clipped by task. # (k,)

        A step's own mean is known only after its last micro-batch, so the gate looks at the steps before: it stays the
        same within a step however the step is split.
        """
        if self.excess_clip != "task":
            return np.ones(self.num_tasks)
        return np.where(self._followed_excess <= 0, 0.0, 1.0)  # NaN (not yet seen) is open

    def _follow(self, means: np.ndarray) -> None:
        """Take in the mean excess of a step by task, NaN where it drew none. # (k,)"""
        followed = self._followed_excess
        moved = np.where(np.isnan(followed), means, followed + (means - followed) / _TASK_CLIP_MEMORY)
        self._followed_excess = np.where(np.isnan(means), followed, moved)

    def state_dict(self) -> dict[str, Any]:
        followed = [None if math.isnan(value) else value for value in self._followed_excess.tolist()]
        return {
            **super().state_dict(),
            "log_weights": self._log_weights.tolist(),
            "followed_excess": followed,
            "mixing_lr": self.mixing_lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._log_weights = np.asarray(state["log_weights"], dtype=np.float64)
        self._followed_excess = np.array(
            [math.nan if value is None else value for value in state["followed_excess"]], dtype=np.float64
        )
        if self._auto_lr:
            self.mixing_lr = state["mixing_lr"]


class AMAReweighting(_ExponentiatedGradient):
    """AMA-R: fixed draws, adaptive weights (Algorithm 1 of the paper; Group DRO, arXiv 1911.08731).

    With Ê_i the mean excess of the step's pairs of task i: α_i ← α_i · exp(η Ê_i), renormalised; a task absent from the
    step keeps its α_i (up to the renormalisation). The θ-step descends (1/|B|) Σ (α_t / p_t) · e, which is unbiased for
    Σ_i α_i E_i.

    Args:
        task_sizes, mixing_lr, excess_clip: As in the other adaptive strategies.
        sampling (`str`): The fixed p: `"uniform"` or `"proportional"`.
    """

    name: ClassVar[str] = "ama_r"

    def __init__(
        self,
        task_sizes: np.ndarray,
        mixing_lr: float | None = None,
        excess_clip: str = "pair",
        sampling: str = "uniform",
    ):
        super().__init__(task_sizes, mixing_lr, excess_clip)
        if sampling == "uniform":
            self._probabilities = np.full(self.num_tasks, 1.0 / self.num_tasks)
        elif sampling == "proportional":
            self._probabilities = self.task_sizes / self.task_sizes.sum()
        else:
            raise AMAError(f"sampling must be 'uniform' or 'proportional', got '{sampling}'.")

    def _regret_bound_lr(self, num_steps: int) -> float:
        return math.sqrt(2.0 * math.log(self.num_tasks) / num_steps)

    def probabilities(self) -> np.ndarray:
        return self._probabilities.copy()

    def loss_weights(self) -> np.ndarray:
        return self._weights() / self._probabilities * self._open_tasks()

    def mixture_weights(self) -> np.ndarray:
        return self._weights()

    def observe(self, step: StepStatistics) -> None:
        means = step.mean_excess()
        self._follow(means)
        estimate = np.where(step.counts > 0, means, 0.0)
        if self.excess_clip == "task":
            estimate = np.maximum(estimate, 0.0)
        self._ascend(estimate)


class AMAResampling(_ExponentiatedGradient):
    """AMA-S: adaptive draws, plain mean (Algorithm 2 of the paper; EXP3).

    p_i = (1 − c) q_i + c / k. The weights see r̂_i = (1/|B|) Σ_{z of task i} e(θ, z) / p_i with the p that z was drawn
    with, which is unbiased for E_i: q_i ← q_i · exp(η r̂_i), renormalised.

    Args:
        task_sizes, mixing_lr, excess_clip: As in the other adaptive strategies.
        smoothing (`float`): c: the share of uniform draws, in [0, 1].

    Raises:
        AMAError: If `smoothing` lies outside [0, 1].
    """

    name: ClassVar[str] = "ama_s"

    def __init__(
        self,
        task_sizes: np.ndarray,
        mixing_lr: float | None = None,
        excess_clip: str = "pair",
        smoothing: float = 0.1,
    ):
        super().__init__(task_sizes, mixing_lr, excess_clip)
        if not 0.0 <= smoothing <= 1.0:
            raise AMAError(f"smoothing is the share of uniform draws and must lie in [0, 1], got {smoothing}.")
        self.smoothing = smoothing

    def _regret_bound_lr(self, num_steps: int) -> float:
        return math.sqrt(2.0 * math.log(self.num_tasks) / (num_steps * self.num_tasks))

    def probabilities(self) -> np.ndarray:
        return (1.0 - self.smoothing) * self._weights() + self.smoothing / self.num_tasks

    def loss_weights(self) -> np.ndarray:
        return self._open_tasks()

    def mixture_weights(self) -> np.ndarray:
        return self._weights()

    def observe(self, step: StepStatistics) -> None:
        self._follow(step.mean_excess())
        total = step.counts.sum()
        if total == 0:
            return
        # Where p is zero (smoothing 0 and a vanished weight) nothing can have been drawn, so the estimate is zero
        drawn = step.counts > 0
        estimate = np.zeros(self.num_tasks)
        np.divide(step.excess_sums, step.probabilities * total, out=estimate, where=drawn)
        if self.excess_clip == "task":
            estimate = np.maximum(estimate, 0.0)
        self._ascend(estimate)
