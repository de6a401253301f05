"""Batches that tell tasks apart, and evaluation by task: figures of every row, gathered over batches and processes, then averaged."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import PredictionOutput

from ..metrics import task_metrics, worst_and_mean
from ..tasks.held_out import label_eval, task_number
from ..tasks.pairs import TASK_COLUMN


class TaskCollator:
    """Wraps a collator and adds `task` and other columns of numbers, where the rows have them. # (B,) each

    TRL's collators drop columns that they do not know.

    Args:
        inner (`Callable`): The collator, TRL's or the user's own.
        task_names (`Sequence[str]`): Names of the task numbers, for rows that have names.
        columns (`Sequence[str]`): The other columns.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], Any],
        task_names: Sequence[str] = (),
        columns: Sequence[str] = (),
    ):
        self.inner = inner
        self._task_names = list(task_names)
        self._columns = (TASK_COLUMN, *columns)

    def _number(self, task: Any) -> int:
        return task_number(task, self._task_names, "A held-out pair") if isinstance(task, str) else task

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # Before the collator, which may change the rows
        ours = {column: [row[column] for row in examples] for column in self._columns if column in examples[0]}
        batch = self.inner(examples)
        for column, values in ours.items():
            if column == TASK_COLUMN:
                batch[column] = torch.tensor([self._number(value) for value in values])
            elif column not in batch:
                batch[column] = torch.tensor(values, dtype=torch.float32)
        return batch


class EvaluationByTask:
    """
    A part of a [`~transformers.Trainer`]: its batches carry their rows' tasks, and its evaluation tells tasks apart.

    What evaluation tells, `compute_loss` has noted with `record_eval`.

    Attributes:
        task_names (`list[str]`): Names of the task numbers.
        have_tasks (`bool`): Whether the training rows name their tasks; if not, all is as without this part.
        numbers_in_batches (`tuple[str, ...]`): Columns of numbers that batches carry beside the task, where rows have them.
        rows_have_losses (`bool`): Whether each row has a loss of its own.
    """

    task_names: list[str]
    have_tasks = True
    numbers_in_batches: tuple[str, ...] = ()
    rows_have_losses = True
    _eval_rows: list[torch.Tensor]  # (B, 4) each: task, loss, margin, excess; opened by `evaluation_loop`
    # Of all rows; not to be read from the numbers, as those of a broken policy are NaN, too
    _eval_knows_excess = True

    def __init__(self, *args, **kwargs):
        self._eval_rows = []
        super().__init__(*args, **kwargs)

    def with_task_names(self, rows: Any, role: str) -> Any:
        """Held-out rows whose tasks are called as the training rows' are; see [`label_eval`]."""
        return label_eval(rows, self.task_names, role) if self.have_tasks else rows

    # ---- Batches with tasks ----

    @contextlib.contextmanager
    def _collating_tasks(self) -> Iterator[None]:
        if not self.have_tasks:
            yield
            return
        own = self.data_collator  # which it stays, but while a loader is made
        self.data_collator = TaskCollator(own, self.task_names, self.numbers_in_batches)
        try:
            yield
        finally:
            self.data_collator = own

    def get_train_dataloader(self) -> DataLoader:
        with self._collating_tasks():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        with self._collating_tasks():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with self._collating_tasks():
            return super().get_test_dataloader(test_dataset)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's, with figures by task and of the worst task for rows with a `task` column."""
        return super().evaluate(self.with_task_names(eval_dataset, "eval_dataset"), ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Dataset | IterableDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As the Trainer's, with the figures that [`evaluate`] gives."""
        return super().predict(self.with_task_names(test_dataset, "test_dataset"), ignore_keys, metric_key_prefix)

    def record_eval(
        self,
        task_ids: torch.Tensor,
        losses: torch.Tensor,
        margins: torch.Tensor,
        excess: torch.Tensor,
        knows_excess: bool,
    ) -> None:
        """Note figures of a batch, all (B,), and whether its excess is one."""
        self._eval_knows_excess &= knows_excess
        rows = torch.stack([task_ids.to(losses.dtype), losses, margins, excess], dim=1).detach()  # (B, 4)
        self._eval_rows.append(self.accelerator.gather_for_metrics(rows).float().cpu())

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_rows, self._eval_knows_excess = [], True
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_rows:
            task_ids, losses, margins, excess = torch.cat(self._eval_rows).numpy().T
            by_task = task_metrics(
                task_ids.astype(int), losses, margins, excess if self._eval_knows_excess else None, self.task_names
            )
            for task, metrics in by_task.items():
                for name in ("loss", "accuracy", "margin", "excess"):
                    if name in metrics and (name != "loss" or self.rows_have_losses):
                        output.metrics[f"{metric_key_prefix}_ama/{name}/{task}"] = metrics[name]
            for name, value in worst_and_mean(by_task).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
            self._eval_rows = []
        return output
