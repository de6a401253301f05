"""Reference losses in training: log-probs that the pairs carry, or that specialists give them before it begins."""

from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from transformers.trainer_utils import PredictionOutput

from ..common.errors import AMAError
from ..common.processes import is_sharded, sum_of_all
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS
from ..tasks.held_out import columns_of
from ..tasks.pairs import TASK_COLUMN
from .losses import PairLogProbs
from .scoring import add_logp_columns


logger = get_logger(__name__)

_REFERENCE_TOLERANCE = 0.1  # nats a token; kernels and 16-bit precision make a few hundredths


class ReferenceLogProbs:
    """
    A part of a [`~trl.DPOTrainer`]: its pairs may carry their reference log-probs and those of specialists.

    Attributes:
        task_names (`list[str]`): Names of the task numbers.
        reference_given (`bool`): Whether the training pairs carry reference log-probs.
        reference_unchecked (`bool`): Whether nobody has held these against the policy yet.
    """

    task_names: list[str]
    reference_given = reference_unchecked = False

    def score_specialists(self, specialists: dict[str, Any]) -> None:
        """Give all pairs, held-out ones too, their log-probs under the reference and their task's specialist.

        Args:
            specialists (`dict`): Task → adapter path, Hub id or model.
        """
        if is_sharded(self.accelerator):  # no process has the whole model, and some have nothing yet
            raise AMAError(
                "AMATrainer cannot score specialists in a run that shares the model out among processes (FSDP, DeepSpeed). "
                f"Compute {list(LOGP_COLUMNS)} first, with `trl ama-losses`, and leave `specialists` out."
            )
        self.train_dataset = add_logp_columns(self, self.train_dataset, self.task_names, specialists, "train")
        by_name = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        scored = {
            name: add_logp_columns(self, part, self.task_names, specialists, name)
            if isinstance(part, Dataset) and TASK_COLUMN in part.column_names
            else part
            for name, part in by_name.items()
        }
        self.eval_dataset = scored if isinstance(self.eval_dataset, dict) else scored["eval"]

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's, also of pairs that carry reference log-probs which are to be precomputed."""
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
        """As the Trainer's, also for pairs that are not tokenised yet.

        Raises:
            AMAError: If the pairs need reference log-probs that nothing can compute any more.
        """
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

    # Reference log-probs that the dataset carries are not computed again
    def _precompute_ref_logps(self, dataset, name, batch_size):
        if REFERENCE_COLUMNS[0] in columns_of(dataset):
            return dataset
        if isinstance(dataset, IterableDataset) and self.reference_given:
            raise AMAError(
                f"The pairs of '{name}' are streamed and lack {list(REFERENCE_COLUMNS)}, which the training pairs carry, so that no "
                "reference model is loaded. Give these pairs the columns too (`trl ama-losses` does), or load them without streaming."
            )
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of a batch, as DPOTrainer computes them. # (B,), (B,)"""
        ours = (TASK_COLUMN, *SPECIALIST_COLUMNS)
        return super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key not in ours})

    def check_reference(self, pairs: PairLogProbs) -> None:
        """Hold the data's reference log-probs against the policy, which has not moved yet and so should be the reference."""
        self.reference_unchecked = False
        if self.state.global_step > 0:
            return
        distances = pairs.chosen_logratios.abs() + pairs.rejected_logratios.abs()  # (B,)
        finite = distances.isfinite()  # the others say nothing of the reference, and are told of when the step is done
        tokens = (pairs.chosen_tokens + pairs.rejected_tokens)[finite]
        # Of all processes, so that all are of one opinion
        sums = np.array([distances[finite].sum().item(), float(tokens.sum())])
        distance, tokens = sum_of_all(self.accelerator, sums).tolist()
        distance /= max(1.0, tokens)
        if distance > _REFERENCE_TOLERANCE:
            self.report_foreign_reference(
                f"The reference log-probs in train_dataset differ from those of the untrained policy by {distance:.2f} nats a token "
                "on the first batch: another base model, tokenizer or chat template made them. Use the base model that they "
                "were made with, or compute them again with `trl ama-losses`."
            )

    def report_foreign_reference(self, message: str) -> None:
        """Tell that the data's reference log-probs are not the policy's."""
        logger.warning(message)  # no error: a policy may be trained on from another start than the reference
