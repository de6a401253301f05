"""Per-task sums over the batches of an optimizer step."""

import numpy as np
import torch

from ..common.processes import sum_of_all
from ..mixing import StepStatistics


class StepRecorder:
    """Per-task sums over the micro-batches of one optimizer step, in float64.

    A micro-batch is copied from its device at once: DPOTrainer has just waited for its metrics, so there is nothing left to wait for.
    After the backward pass there would be, and the next step would find a GPU without work.

    Args:
        num_tasks (`int`): k.
    """

    def __init__(self, num_tasks: int):
        self._num_tasks = num_tasks
        self.reset()

    def reset(self) -> None:
        """Begin a new optimizer step."""
        # Task numbers, losses, excess, raw excess; on the CPU # (4, B) each
        self._micro_batches: list[torch.Tensor] = []

    def add(
        self, task_ids: torch.Tensor, losses: torch.Tensor, excess: torch.Tensor, raw_excess: torch.Tensor
    ) -> None:
        """Add a micro-batch: task numbers, losses, excess as clipped, and excess before clipping. # (B,) each"""
        dtype = torch.promote_types(losses.dtype, torch.float32)  # holds task numbers, too
        rows = (task_ids, losses.detach(), excess.detach(), raw_excess.detach())
        self._micro_batches.append(torch.stack([row.to(losses.device, dtype) for row in rows]).cpu())

    def _sums(self) -> np.ndarray:
        """Counts, losses, excess, clipped pairs, pairs that are not finite. # (5, k)"""
        sums = np.zeros((5, self._num_tasks))
        if not self._micro_batches:
            return sums
        values = torch.cat(self._micro_batches, dim=1).double().numpy()
        sizes = [micro_batch.shape[1] for micro_batch in self._micro_batches]
        for part in np.split(values, np.cumsum(sizes)[:-1], axis=1):  # summed micro-batch by micro-batch
            tasks = part[0].astype(np.int64)
            broken = ~np.isfinite(part[1:3]).all(axis=0)
            if broken.any():
                part[1:3, broken] = 0.0
            for row, weights in enumerate((None, part[1], part[2], part[3] <= 0, broken)):
                sums[row] += np.bincount(tasks, weights=weights, minlength=self._num_tasks)
        return sums

    def finish(self, probabilities: np.ndarray, accelerator) -> StepStatistics:
        """Sum over processes, once per step, and begin the next step."""
        sums = sum_of_all(accelerator, self._sums())
        self.reset()
        counts, losses, excess, clipped, broken = sums
        return StepStatistics(counts, losses, excess, probabilities, clipped, broken)
