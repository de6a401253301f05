"""Evaluation by task: figures of every pair, gathered over batches and processes, then averaged by task."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import PredictionOutput

from .errors import AMAError
from .held_out import columns_of, label_eval
from .hub_trainer import HubTrainer
from .metrics import task_metrics, worst_and_mean
from .reference_columns import REFERENCE_COLUMNS
from .step_recorder import TaskCollator


class TaskEvaluationTrainer(HubTrainer):
    """
    A [`~trl.DPOTrainer`] whose evaluation also tells tasks apart.

    Subclasses set `task_names` and call `_record_eval` from `compute_loss`.
    """

    task_names: list[str]
    _have_tasks = True  # whether the training pairs name theirs; if not, all is as DPOTrainer has it
    _pairs_have_losses = True  # of their own
    _eval_pairs: list[torch.Tensor]  # (B, 4) each: task, loss, margin, excess; opened by `evaluation_loop`
    _eval_knows_excess = (
        True  # of all pairs; not to be read from the numbers, as those of a broken policy are NaN, too
    )

    def _with_task_names(self, pairs: Any, role: str) -> Any:
        return label_eval(pairs, self.task_names, role) if self._have_tasks else pairs

    # ---- Batches with tasks ----

    @contextlib.contextmanager
    def _collating_tasks(self) -> Iterator[None]:
        if not self._have_tasks:
            yield
            return
        # Only while a loader is made: `data_collator` stays the user's own
        own, self.data_collator = self.data_collator, TaskCollator(self.data_collator, self.task_names)
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
        """As [`~trl.DPOTrainer.evaluate`], with figures by task and of the worst task for pairs with a `task` column."""
        eval_dataset = self._with_task_names(eval_dataset, "eval_dataset")
        before = self.precompute_ref_logps
        if before and not isinstance(eval_dataset, (str, type(None))):
            parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            if all(REFERENCE_COLUMNS[0] in columns_of(part) for part in parts):
                self.precompute_ref_logps = False  # nothing is left to compute, so DPOTrainer need not refuse to
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.precompute_ref_logps = before

    def predict(
        self,
        test_dataset: Dataset | IterableDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As the Trainer's, also for pairs that are not tokenised yet, and with the figures that [`evaluate`] gives.

        Raises:
            AMAError: If the pairs need reference log-probs that nothing can compute any more.
        """
        test_dataset = self._with_task_names(test_dataset, "test_dataset")
        columns = columns_of(test_dataset)
        if not self._is_vision_dataset and "prompt_ids" not in columns:
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        if self.precompute_ref_logps and REFERENCE_COLUMNS[0] not in columns:
            if self.ref_model is None and not is_peft_model(self.model) and self.state.global_step > 0:
                raise AMAError(
                    f"test_dataset lacks {list(REFERENCE_COLUMNS)}, and the reference model is gone (precompute_ref_log_probs). Predict "
                    "before training, give a `ref_model`, or set precompute_ref_log_probs=False."
                )
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            test_dataset = self._precompute_ref_logps(test_dataset, "test", batch_size)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _record_eval(
        self, task_ids: torch.Tensor, losses: torch.Tensor, margins: torch.Tensor, excess: torch.Tensor
    ) -> None:
        """Note figures of a batch, all (B,)."""
        rows = torch.stack([task_ids.to(losses.dtype), losses, margins, excess], dim=1).detach()  # (B, 4)
        self._eval_pairs.append(self.accelerator.gather_for_metrics(rows).float().cpu())

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
                    if name in metrics and (name != "loss" or self._pairs_have_losses):
                        output.metrics[f"{metric_key_prefix}_ama/{name}/{task}"] = metrics[name]
            for name, value in worst_and_mean(by_task).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
            self._eval_pairs = []
        return output
