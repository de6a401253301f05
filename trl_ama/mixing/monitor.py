"""Watches a run for the ways in which adaptive mixing fails or has nothing left to do, and words the warnings."""

from typing import Any

import numpy as np


_RUNAWAY_WEIGHT = 0.95
_RUNAWAY_SHARE = 0.1  # of the run's steps, and at least _MIN_STEPS
_MIN_STEPS = 50
_STAGNANT_RATIO = 0.98  # of the first quarter's excess still left in the last
_IDLE = ""  # among the names of warned tasks: that of all


class MixtureMonitor:
    """Runaway: one task's weight stays above 0.95. Stagnation: the mean excess does not fall over the run. These two the paper
    saw. Matched: a task has had no excess since the first step. Idle: no pair of any task has excess for a while.

    Args:
        task_names (`list[str]`): Names for the messages, in the order of the weights.
    """

    def __init__(self, task_names: list[str]):
        self._names = task_names
        self._runaway_steps = np.zeros(len(task_names), dtype=np.int64)
        self._warned: set[str] = set()
        self._warned_matched: set[str] = set()
        self._matched_steps = np.zeros(len(task_names), dtype=np.int64)  # −1 once a pair of the task had excess
        self._idle_steps = 0  # in a row
        # Sums and numbers of steps of the mean excess, over the run's first and last quarter
        self._first, self._last, self._steps = [0.0, 0], [0.0, 0], 0

    def update(
        self,
        weights: np.ndarray,
        mean_excess: np.ndarray,
        num_steps: int,
        matched: np.ndarray | None = None,
        is_idle: bool = False,
    ) -> list[str]:
        """Take in one optimizer step of a run of `num_steps`; return what is new to warn about.

        Args:
            weights (`np.ndarray`): Mixture weights α. # (k,)
            mean_excess (`np.ndarray`): Mean excess of the step by task, NaN where it drew none. # (k,)
            num_steps (`int`): Optimizer steps of the whole run.
            matched (`np.ndarray`, *optional*): Which tasks the step drew and found no excess in. # (k,) bool
            is_idle (`bool`): Whether no pair of the step sent a gradient.
        """
        messages = [] if matched is None else self._nothing_to_learn(mean_excess, num_steps, matched, is_idle)
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

    def _nothing_to_learn(
        self, mean_excess: np.ndarray, num_steps: int, matched: np.ndarray, is_idle: bool
    ) -> list[str]:
        patience = max(_MIN_STEPS, _RUNAWAY_SHARE * num_steps)
        self._idle_steps = self._idle_steps + 1 if is_idle else 0
        never = self._matched_steps >= 0
        self._matched_steps[never & ~matched & ~np.isnan(mean_excess)] = -1
        self._matched_steps[never & matched] += 1
        if self._idle_steps >= patience and _IDLE not in self._warned_matched:
            self._warned_matched |= {_IDLE, *self._names}
            since = " since the first step, so no specialist seems better than the base model" * bool(
                (self._matched_steps >= 0).all()
            )
            return [
                f"Nothing to learn: no pair of the last {self._idle_steps} steps had excess{since}; the loss and its gradient are zero, "
                "and only momentum and weight decay move the policy. Every task has reached its specialist: stop here, train "
                "better specialists, or set excess_clip='none' to go past them."
            ]
        messages = []
        for task in np.flatnonzero(self._matched_steps >= patience):
            name = self._names[task]
            if name not in self._warned_matched:
                self._warned_matched.add(name)
                messages.append(
                    f"No excess: none of the pairs of task '{name}' had any in all {self._matched_steps[task]} steps that drew it since the "
                    "first, so nothing of it is learned. Its specialist seems no better than the base model: compare their "
                    "losses, train it longer or with a higher learning_rate, or set excess_clip='none'."
                )
        return messages

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as JSON types."""
        return {
            "warned_matched": sorted(self._warned_matched),
            "matched_steps": self._matched_steps.tolist(),
            "idle_steps": self._idle_steps,
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
        # Checkpoints of the first release have none of these: nobody knows what their first steps were like
        self._matched_steps = np.asarray(state.get("matched_steps", [-1] * len(self._names)), dtype=np.int64)
        self._warned_matched = set(state.get("warned_matched", ()))
        self._idle_steps = state.get("idle_steps", 0)
