"""The seam between mixing mathematics and training: five verbs and one small dataclass.

A strategy is pure: numpy in, numpy out; no Trainer, no distributed calls, no I/O. All arrays have one entry per task, in
the order of the tasks, in float64. # (k,)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..common.errors import AMAError


@dataclass
class StepStatistics:
    """What one optimizer step showed, summed over its micro-batches and processes.

    Args:
        counts (`np.ndarray`): Pairs of each task in the step. # (k,)
        loss_sums (`np.ndarray`): Sum of the per-pair losses L(θ, z), in nats. # (k,)
        excess_sums (`np.ndarray`): Sum of the per-pair excess losses e(θ, z), clipped as `excess_clip` says. # (k,)
        probabilities (`np.ndarray`): The p that the step's pairs were *drawn* with. Loaders read ahead, so this may be
            older than what `probabilities()` returns now. # (k,)
        clipped_counts (`np.ndarray`, *optional*): Pairs whose excess was clipped to zero. # (k,)
        broken_counts (`np.ndarray`, *optional*): Pairs whose loss or excess was not finite. They are counted in `counts`, and
            nothing of them is in the sums. # (k,)
    """

    counts: np.ndarray
    loss_sums: np.ndarray
    excess_sums: np.ndarray
    probabilities: np.ndarray
    clipped_counts: np.ndarray | None = None
    broken_counts: np.ndarray | None = None

    def mean_excess(self) -> np.ndarray:
        """Mean excess loss of each task in this step; NaN for a task without a pair (of finite loss) in it. # (k,)"""
        counts = self.finite_counts
        means = np.full(len(counts), np.nan)
        np.divide(self.excess_sums, counts, out=means, where=counts > 0)
        return means

    @property
    def finite_counts(self) -> np.ndarray:
        """Pairs of each task that have a finite loss. # (k,)"""
        return self.counts if self.broken_counts is None else self.counts - self.broken_counts


class MixingStrategy(ABC):
    """How often to draw each task and how much a pair of it counts.

    Args:
        task_sizes (`np.ndarray`): Number of training pairs n_i of each task; all positive. # (k,)

    Attributes:
        name: What `AMAConfig.mixing` calls it.
        objective: `"loss"` descends the preference loss itself (what the baselines do), `"excess"` descends the excess
            over the specialists.
        uses_own_sampler: Whether draws follow `probabilities()`. If not, the Trainer's ordinary sampler draws, which is
            what `proportional` means, and keeps such a run equal to a `DPOTrainer` run, number for number.
        plain_loss: Whether a step descends the plain mean of its pairs' losses, as `DPOTrainer` does, whatever the tasks' sizes.
    """

    name: ClassVar[str]
    objective: ClassVar[str] = "excess"
    uses_own_sampler: ClassVar[bool] = True
    plain_loss: ClassVar[bool] = False

    def __init__(self, task_sizes: np.ndarray):
        self.task_sizes = np.asarray(task_sizes, dtype=np.float64)
        if self.task_sizes.ndim != 1 or len(self.task_sizes) == 0 or (self.task_sizes <= 0).any():
            raise AMAError(
                f"Every task needs at least one training pair, got sizes {np.asarray(task_sizes).tolist()}. "
                "Remove the empty tasks."
            )
        self.num_tasks = len(self.task_sizes)

    @abstractmethod
    def probabilities(self) -> np.ndarray:
        """The probabilities p that the sampler draws tasks with; they sum to 1. # (k,)"""

    @abstractmethod
    def loss_weights(self) -> np.ndarray:
        """The factor on each pair's loss in the θ-step, by task; 1 leaves it alone. # (k,)"""

    def observe(self, step: StepStatistics) -> None:  # noqa: B027 - a fixed mixture learns nothing from a step
        """Update the mixture with what one optimizer step showed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `observe` changes, as JSON types."""
        return {"name": self.name, "num_tasks": self.num_tasks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            AMAError: If the state is of another strategy or another number of tasks.
        """
        for field, ours in (("name", self.name), ("num_tasks", self.num_tasks)):
            if state.get(field) != ours:
                raise AMAError(
                    f"The checkpoint's mixing state has {field}={state.get(field)!r}, this run has {field}={ours!r}. "
                    "Resume with the settings that the checkpoint was written with, or start a new output_dir."
                )

    def metrics(self) -> dict[str, np.ndarray]:
        """Arrays worth logging by task, beside the excess and loss that the trainer logs itself. # (k,) each"""
        return {"probability": self.probabilities(), "weight": self.mixture_weights()}

    def mixture_weights(self) -> np.ndarray:
        """The adversary's α: the share of each task in the objective; sums to 1. # (k,)"""
        share = self.probabilities() * self.loss_weights()
        return share / share.sum()

    def set_horizon(self, num_steps: int, excess_range: float) -> None:  # noqa: B027 - only adaptive ones need it
        """Tell the strategy how many optimizer steps T the run has and how large an excess can be.

        Args:
            num_steps (`int`): T, the number of optimizer steps of the whole run.
            excess_range (`float`): Excess of an untrained policy over a perfect specialist, in nats.
        """
