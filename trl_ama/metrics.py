"""Per-task figures of a set of scored pairs, and the worst task's.

The formulas are those of the modules for `evaluate` in `evaluate_modules/`; neither needs `evaluate` to be installed.
"""

from pathlib import Path

import numpy as np

from .common.errors import AMAError
from .evaluate_modules.pairwise_accuracy.formula import accuracy_stderr, pair_accuracy
from .evaluate_modules.worst_task.formula import task_means, worst_of


METRICS = ("pairwise_accuracy", "excess_loss", "worst_task")
_GREATER_IS_BETTER = {"accuracy": True, "margin": True, "excess": False}


def metric_folder(name: str) -> str:
    """The folder of one of our metrics, for `evaluate.load`, and to upload to a Space.

    Args:
        name (`str`): Of `pairwise_accuracy`, `excess_loss` and `worst_task`.

    Raises:
        AMAError: If there is no such metric.
    """
    if name not in METRICS:
        raise AMAError(f"There is no metric '{name}'; there are {list(METRICS)}.")
    return str(Path(__file__).parent / "evaluate_modules" / name)


def task_metrics(
    task_ids: np.ndarray, losses: np.ndarray, margins: np.ndarray, excess: np.ndarray | None, task_names: list[str]
) -> dict[str, dict[str, float]]:
    """Average the pairs of each task.

    Args:
        task_ids (`np.ndarray`): Task number of each pair. # (N,)
        losses (`np.ndarray`): Preference loss of each pair. # (N,)
        margins (`np.ndarray`): Implicit reward margin β (log-ratio chosen − log-ratio rejected) of each pair. # (N,)
        excess (`np.ndarray`, *optional*): Excess loss of each pair; `None` if there are no specialists. # (N,)
        task_names (`list[str]`): Names of the task numbers.

    Returns:
        Task name → `loss`, `accuracy`, `margin`, `excess` (if given), `pairs` and `accuracy_stderr` (the binomial standard
        error). A tie counts half in the accuracy, so a policy that equals its reference scores 0.5.
    """
    figures = {"loss": losses, "accuracy": pair_accuracy(margins), "margin": margins}
    if excess is not None:
        figures["excess"] = excess
    means = {figure: task_means(values, task_ids) for figure, values in figures.items()}
    result = {}
    for index, name in enumerate(task_names):
        count = int((task_ids == index).sum())
        if count:
            result[name] = {figure: by_task[index] for figure, by_task in means.items()}
            result[name] |= {
                "pairs": count,
                "accuracy_stderr": accuracy_stderr(result[name]["accuracy"], count),
            }
    return result


def worst_and_mean(by_task: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean over tasks and worst task of accuracy, margin and, if there, excess: `mean_accuracy`, `worst_accuracy`, ..."""
    result = {}
    for key, greater_is_better in _GREATER_IS_BETTER.items():
        values = [metrics[key] for metrics in by_task.values() if key in metrics]
        if values:
            result[f"mean_{key}"] = float(np.mean(values))
            result[f"worst_{key}"] = worst_of(values, greater_is_better)
    return result
