"""Reference losses in training: log-probs that the pairs carry, or that specialists give them before it begins."""

from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from .errors import AMAError
from .held_out import columns_of
from .preference_losses import PairLogProbs
from .processes import is_sharded, sum_of_all
from .reference_columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS
from .scoring import add_logp_columns
from .task_evaluation import TaskEvaluationTrainer
from .tasks import TASK_COLUMN


logger = get_logger(__name__)

_REFERENCE_TOLERANCE = 0.1  # nats a token; kernels and 16-bit precision make a few hundredths


class ReferenceLossTrainer(TaskEvaluationTrainer):
    """
    A [`~trl.DPOTrainer`] of pairs that may carry their reference log-probs and those of specialists.
    """

    _reference_given = _reference_unchecked = False  # whether the training pairs carry reference log-probs

    def _score_specialists(self, specialists: dict[str, Any]) -> None:
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

    # Reference log-probs that the dataset carries are not computed again
    def _precompute_ref_logps(self, dataset, name, batch_size):
        if REFERENCE_COLUMNS[0] in columns_of(dataset):
            return dataset
        if isinstance(dataset, IterableDataset) and self._reference_given:
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

    def _check_reference(self, pairs: PairLogProbs) -> None:
        """Hold the data's reference log-probs against the policy, which has not moved yet and so should be the reference."""
        self._reference_unchecked = False
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
            self._report_foreign_reference(
                f"The reference log-probs in train_dataset differ from those of the untrained policy by {distance:.2f} nats a token "
                "on the first batch: another base model, tokenizer or chat template made them. Use the base model that they "
                "were made with, or compute them again with `trl ama-losses`."
            )

    def _report_foreign_reference(self, message: str) -> None:
        logger.warning(message)  # no error: a policy may be trained on from another start than the reference
