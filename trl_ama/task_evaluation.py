"""Evaluation by task: figures of every pair, gathered over batches and processes, then averaged by task."""

import torch
from datasets import Dataset, DatasetDict

from .hub_trainer import HubTrainer
from .metrics import task_metrics, worst_and_mean
from .reference_columns import REFERENCE_COLUMNS
from .trainer_checks import eval_parts, label_eval


class TaskEvaluationTrainer(HubTrainer):
    """
    A [`~trl.DPOTrainer`] whose evaluation also tells tasks apart.

    Subclasses set `task_names` and call `_record_eval` from `compute_loss`.
    """

    task_names: list[str]
    _eval_pairs: list[torch.Tensor]  # (B, 4) each: task, loss, margin, excess; opened by `evaluation_loop`
    _eval_knows_excess = (
        True  # of all pairs; not to be read from the numbers, as those of a broken policy are NaN, too
    )

    def _record_eval(self, task_ids, losses, margins, excess) -> None:
        rows = torch.stack([task_ids.to(losses.dtype), losses, margins, excess], dim=1).detach()  # (B, 4)
        self._eval_pairs.append(self.accelerator.gather_for_metrics(rows).float().cpu())

    def evaluate(
        self,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As [`~trl.DPOTrainer.evaluate`], with figures by task and of the worst task for pairs with a `task` column."""
        eval_dataset = label_eval(eval_dataset, self.task_names)
        before = self.precompute_ref_logps
        parts = eval_parts(eval_dataset).values()
        if parts and all(REFERENCE_COLUMNS[0] in part.column_names for part in parts):
            self.precompute_ref_logps = False  # nothing is left to compute, so DPOTrainer need not refuse to
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.precompute_ref_logps = before

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_pairs, self._eval_knows_excess = [], True
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_pairs:
            task_ids, losses, margins, excess = torch.cat(self._eval_pairs).numpy().T
            by_task = task_metrics(
                task_ids.astype(int), losses, margins, excess if self._eval_knows_excess else None, self.task_names
            )
            for task, metrics in by_task.items():
                for name in ("loss", "accuracy", "margin", "excess"):
                    if name in metrics:
                        output.metrics[f"{metric_key_prefix}_ama/{name}/{task}"] = metrics[name]
            for name, value in worst_and_mean(by_task).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
            self._eval_pairs = []
        return output
