"""Pairwise accuracy of a reward model, or of a policy's implicit rewards, as a module of 🤗 Evaluate."""

import datasets
import evaluate
import numpy as np

from .formula import accuracy_stderr, pair_accuracy


_DESCRIPTION = """
Share of preference pairs whose chosen answer has the higher score. A tie counts half, so scores that cannot tell the two
answers apart have an accuracy of 0.5.
"""

_KWARGS_DESCRIPTION = """
Args:
    chosen (`list` of `float`): Score of each pair's chosen answer: a reward, or an implicit reward β log(π / π_ref).
    rejected (`list` of `float`): Score of its rejected answer.

Returns:
    accuracy (`float`): Between 0 and 1.
    accuracy_stderr (`float`): The binomial standard error.
    margin (`float`): Mean of chosen − rejected.

Examples:
    >>> pairwise_accuracy = evaluate.load("pairwise_accuracy")
    >>> pairwise_accuracy.compute(chosen=[1.0, 0.5, 2.0, 0.0], rejected=[0.0, 0.5, 3.0, -1.0])
    {'accuracy': 0.625, 'accuracy_stderr': 0.24206145913796356, 'margin': 0.25}
"""

_CITATION = """
@inproceedings{rafailov2023direct,
    title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and Chelsea Finn},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2023},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PairwiseAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"chosen": datasets.Value("float64"), "rejected": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2305.18290"],
        )

    def _compute(self, chosen, rejected, **others):
        # `others`: `evaluate.combine` hands every module the inputs of all
        margins = np.asarray(chosen) - np.asarray(rejected)
        accuracy = float(pair_accuracy(margins).mean())
        return {
            "accuracy": accuracy,
            "accuracy_stderr": accuracy_stderr(accuracy, len(margins)),
            "margin": float(margins.mean()),
        }
