"""Watches a run for the two ways in which the paper saw adaptive mixing fail, and words the warnings."""

from typing import Any

import numpy as np


_RUNAWAY_WEIGHT = 0.95
_RUNAWAY_SHARE = 0.1  # of the run's steps, and at least _MIN_STEPS
_MIN_STEPS = 50
_STAGNANT_RATIO = 0.98  # of the first quarter's excess still left in the last


class MixtureMonitor:
    """Runaway: one task's weight stays above 0.95. Stagnation: the mean excess does not fall over the run.

    Args:
        task_names (`list[str]`): Names for the messages, in the order of the weights.
    """

    def __init__(self, task_names: list[str]):
        self._names = task_names
        self._runaway_steps = np.zeros(len(task_names), dtype=np.int64)
        self._warned: set[str] = set()
        # Sums and numbers of steps of the mean excess, over the run's first and last quarter
        self._first, self._last, self._steps = [0.0, 0], [0.0, 0], 0

    def update(self, weights: np.ndarray, mean_excess: np.ndarray, num_steps: int) -> list[str]:
        """Take in one optimizer step of a run of `num_steps`; return what is new to warn about.

        Args:
            weights (`np.ndarray`): Mixture weights α. # (k,)
            mean_excess (`np.ndarray`): Mean excess of the step by task, NaN where it drew none. # (k,)
            num_steps (`int`): Optimizer steps of the whole run.
        """
        messages = []
        self._runaway_steps = np.where(weights > _RUNAWAY_WEIGHT, self._runaway_steps + 1, 0)
        worst = int(self._runaway_steps.argmax())
        patience = max(_MIN_STEPS, _RUNAWAY_SHARE * num_steps)
        if self._runaway_steps[worst] >= patience and self._names[worst] not in self._warned:
            self._warned.add(self._names[worst])
            messages.append(
                f"Runaway weight: task '{self._names[worst]}' has had more than {_RUNAWAY_WEIGHT:.0%} of the mixture for "
                f"{self._runaway_steps[worst]} steps, so the others hardly train. Lower mixing_lr, raise smoothing, or "
                "check that its specialist's losses can be reached."
            )
        self._steps += 1
        if not np.isnan(mean_excess).all():
            for quarter, inside in (
                (self._first, self._steps <= num_steps // 4),
                (self._last, self._steps > num_steps - num_steps // 4),
            ):
                quarter[0] += inside * float(np.nanmean(mean_excess))
                quarter[1] += int(inside)
        if self._steps == num_steps >= _MIN_STEPS and self._first[1] and self._last[1]:
            first, last = self._first[0] / self._first[1], self._last[0] / self._last[1]
            if first > 0 and last >= _STAGNANT_RATIO * first:
                messages.append(
                    f"Stagnation: the mean excess loss was {first:.3f} in the first quarter of the run and is "
                    f"{last:.3f} in the last, so the policy does not approach its specialists. Raise learning_rate or "
                    "the LoRA rank, or train longer."
                )
        return messages

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as JSON types."""
        return {
            "runaway_steps": self._runaway_steps.tolist(),
            "warned": sorted(self._warned),
            "first": self._first,
            "last": self._last,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._runaway_steps = np.asarray(state["runaway_steps"], dtype=np.int64)
        self._warned = set(state["warned"])
        self._first, self._last, self._steps = list(state["first"]), list(state["last"]), state["steps"]
