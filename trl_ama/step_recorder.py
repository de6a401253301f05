"""What the trainer needs to see of each batch: the task columns, the policy's outputs, and per-task sums of a step."""

from typing import Any

import numpy as np
import torch

from .mixing import StepStatistics
from .reference_columns import SPECIALIST_COLUMNS
from .tasks import TASK_COLUMN


class TaskCollator:
    """Wraps a preference collator and adds `task` and, where the rows have them, the specialists' log-probs. # (B,) each

    TRL's collator drops columns that it does not know.
    """

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(examples)
        if TASK_COLUMN in examples[0]:
            batch[TASK_COLUMN] = torch.tensor([example[TASK_COLUMN] for example in examples])
        for column in SPECIALIST_COLUMNS:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return batch


class RecordedForward:
    """Forwards calls to the model and keeps the outputs of the first, with their graph.

    `DPOTrainer` only ever calls the model that its loss is given, so this stands in for it.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self.outputs = None

    def __call__(self, *args, **kwargs):
        outputs = self._model(*args, **kwargs)
        if self.outputs is None:
            self.outputs = outputs
        return outputs


class StepRecorder:
    """Per-task sums over the micro-batches of one optimizer step, in float64.

    Args:
        num_tasks (`int`): k.
    """

    def __init__(self, num_tasks: int):
        self._num_tasks = num_tasks
        self.reset()

    def reset(self) -> None:
        """Begin a new optimizer step."""
        self._sums = np.zeros((4, self._num_tasks))  # counts, losses, excess, clipped

    def add(
        self, task_ids: torch.Tensor, losses: torch.Tensor, excess: torch.Tensor, raw_excess: torch.Tensor
    ) -> None:
        """Add a micro-batch: task numbers, losses, excess as clipped, and excess before clipping. # (B,) each"""
        tasks = task_ids.cpu().numpy()
        values = torch.stack([losses, excess, raw_excess]).detach().double().cpu().numpy()
        for row, weights in enumerate((np.ones(len(tasks)), values[0], values[1], values[2] <= 0)):
            self._sums[row] += np.bincount(tasks, weights=weights, minlength=self._num_tasks)

    def finish(self, probabilities: np.ndarray, accelerator) -> StepStatistics:
        """Sum over processes, once per step, and begin the next step."""
        sums = self._sums
        if accelerator.num_processes > 1:
            # float32 is what every backend reduces; the sums of one step are far from its limits
            tensor = torch.tensor(sums, dtype=torch.float32, device=accelerator.device)
            sums = accelerator.reduce(tensor, reduction="sum").double().cpu().numpy()
        self.reset()
        counts, losses, excess, clipped = sums
        return StepStatistics(counts, losses, excess, probabilities, clipped)
