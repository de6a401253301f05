"""The worst task's mean of any per-example figure, as a module of 🤗 Evaluate."""

import datasets
import evaluate
import numpy as np

from .formula import task_means, worst_of


_DESCRIPTION = """
Averages a figure of each example (accuracy, loss, excess loss, reward, ...) by task and reports the worst task, which a
mean over all examples hides, above all if that task is small.
"""

_KWARGS_DESCRIPTION = """
Args:
    values (`list` of `float`): The figure of each example.
    tasks (`list` of `str`): The task of each example.
    greater_is_better (`bool`): `True` for accuracies and rewards; `False`, the default, for losses and excess losses.

Returns:
    worst (`float`): The worst task's mean.
    worst_task (`str`): Its name.
    mean (`float`): The mean over tasks, each counting the same.
    by_task (`dict`): Task -> its mean.

Examples:
    >>> worst_task = evaluate.load("worst_task")
    >>> worst_task.compute(values=[0.0, 0.5, 1.0], tasks=["chat", "chat", "code"])
    {'worst': 1.0, 'worst_task': 'code', 'mean': 0.625, 'by_task': {'chat': 0.25, 'code': 1.0}}
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
class WorstTask(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"values": datasets.Value("float64"), "tasks": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2506.00569"],
        )

    def _compute(self, values, tasks, greater_is_better=False, **others):
        # `others`: `evaluate.combine` hands every module the inputs of all
        by_task = task_means(np.asarray(values), np.asarray(tasks))
        names, means = list(by_task), list(by_task.values())
        where = (np.argmin if greater_is_better else np.argmax)(means)  # of the first NaN, if there is one
        return {
            "worst": worst_of(means, greater_is_better),
            "worst_task": names[where],
            "mean": float(np.mean(means)),
            "by_task": by_task,
        }
