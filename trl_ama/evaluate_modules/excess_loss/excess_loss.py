"""Excess loss of a generalist over its specialists (AutoMixAlign), as a module of 🤗 Evaluate."""

import datasets
import evaluate
import numpy as np

from .formula import excess_losses


_DESCRIPTION = """
Mean excess of a model's per-example losses over reference losses: how far a generalist lags the specialists that the
reference losses come from. The excess of an example is max(loss - reference loss, 0), so doing better than the specialist
on one example does not make up for doing worse on another.
"""

_KWARGS_DESCRIPTION = """
Args:
    losses (`list` of `float`): Loss of each example (for DPO: of each preference pair) under the model.
    reference_losses (`list` of `float`): Loss of the same example under its task's specialist.
    clip (`bool`): Whether an example's excess is at least 0; defaults to `True`.

Returns:
    excess (`float`): The mean, in the unit of the losses.
    matched (`float`): Share of the examples on which the model is at least as good as the specialist.

Examples:
    >>> excess_loss = evaluate.load("excess_loss")
    >>> excess_loss.compute(losses=[0.75, 0.5, 0.25, 1.0], reference_losses=[0.5, 0.5, 0.75, 0.25])
    {'excess': 0.25, 'matched': 0.5}
"""

_CITATION = """
@inproceedings{corrado2025automixalign,
    title     = {{AutoMixAlign: Adaptive Data Mixing for Multi-Task Preference Optimization in LLMs}},
    author    = {Nicholas E. Corrado and Julian Katz-Samuels and Adithya Devraj and Hyokun Yun and Chao Zhang and Yi Xu and Yi Pan and Bing Yin and Trishul Chilimbi},
    booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (ACL)},
    year      = {2025},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExcessLoss(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"losses": datasets.Value("float64"), "reference_losses": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2506.00569"],
        )

    def _compute(self, losses, reference_losses, clip=True, **others):
        # `others`: `evaluate.combine` hands every module the inputs of all
        losses, reference_losses = np.asarray(losses), np.asarray(reference_losses)
        return {
            "excess": float(excess_losses(losses, reference_losses, clip).mean()),
            "matched": float((losses <= reference_losses).mean()),
        }
