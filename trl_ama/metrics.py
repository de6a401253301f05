"""Per-task figures of a set of scored pairs, and the worst task's."""

import numpy as np


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
    result = {}
    for index, name in enumerate(task_names):
        rows = task_ids == index
        count = int(rows.sum())
        if count == 0:
            continue
        accuracy = float(pair_accuracy(margins[rows]).mean())
        result[name] = {
            "loss": float(losses[rows].mean()),
            "accuracy": accuracy,
            "margin": float(margins[rows].mean()),
            "pairs": count,
            "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / count)),
        }
        if excess is not None:
            result[name]["excess"] = float(excess[rows].mean())
    return result


def pair_accuracy(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer has the higher implicit reward, ½ for a tie, 0 otherwise. # (N,)"""
    return 0.5 * (1.0 + np.sign(margins))


def worst_and_mean(by_task: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean over tasks and worst task of accuracy, margin and, if there, excess: `mean_accuracy`, `worst_accuracy`, ..."""
    result = {}
    for key, worst in (("accuracy", min), ("margin", min), ("excess", max)):
        values = [metrics[key] for metrics in by_task.values() if key in metrics]
        if values:
            result[f"mean_{key}"] = float(np.mean(values))
            result[f"worst_{key}"] = float(worst(values))
    return result
