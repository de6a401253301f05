"""Tables of a run's page and of several runs side by side, worst task first, with the numbers of `results.json`."""

import math
from collections.abc import Callable
from typing import Any


_FIGURES = (
    ("accuracy", "Reward accuracy", min),
    ("excess", "Excess loss", max),
    ("margin", "Reward margin", min),
)


def result_tables(results: dict[str, Any], main: str | None) -> list[dict[str, Any]]:
    """A table a figure: base, specialists and every strategy.

    Args:
        results (`dict`): `results.json`.
        main (`str`, *optional*): The strategy that decides the order of the tasks.
    """
    columns = [(name, policy) for name, policy in results["policies"].items()]
    leading = results["policies"].get(main) or columns[0][1]
    return _tables(results["tasks"], columns, leading, None)


def _tables(
    tasks: list[str],
    columns: list[tuple[str, dict[str, Any]]],
    leading: dict[str, Any],
    groups: list[tuple[str, int]] | None,
) -> list[dict[str, Any]]:
    tables = []
    for key, title, worst in _FIGURES:
        values = [{task: figures.get(key) for task, figures in policy["by_task"].items()} for _, policy in columns]
        if not any(value is not None for column in values for value in column.values()):
            continue
        rows = [
            {"name": "worst task", "kind": "worst", "cells": [_summary(policy, key, worst) for _, policy in columns]},
            {"name": "mean of tasks", "kind": "mean", "cells": [_summary(policy, key, None) for _, policy in columns]},
        ]
        worsts = [_summary(policy, key, worst)["value"] for _, policy in columns]
        for task in _worst_first(tasks, leading, key, worst):
            cells = []
            for (_, policy), column, least in zip(columns, values, worsts, strict=True):
                value = column.get(task)
                error = policy["by_task"].get(task, {}).get("accuracy_stderr") if key == "accuracy" else None
                # Of a column without differences no task is the worst
                differs = len({entry for entry in column.values() if entry is not None}) > 1
                marked = value is not None and value == least and differs
                cells.append({"value": value, "error": error if value is not None else None, "is_worst": marked})
            rows.append({"name": task, "kind": "task", "cells": cells})
        tables.append(
            {"key": key, "title": title, "columns": [name for name, _ in columns], "rows": rows, "groups": groups}
        )
    return tables


def _summary(policy: dict[str, Any], key: str, worst: Callable | None) -> dict[str, Any]:
    """The cell of the worst task, or of the mean; older runs have noted neither for margins."""
    values = [figures[key] for figures in policy["by_task"].values() if key in figures]
    value = policy["summary"].get(f"{'worst' if worst else 'mean'}_{key}")
    if value is None and values:
        value = worst(values) if worst else math.fsum(values) / len(values)
    return {"value": value, "error": None, "is_worst": False}


def _worst_first(tasks: list[str], policy: dict[str, Any], key: str, worst: Callable) -> list[str]:
    sign = 1 if worst is min else -1
    return sorted(tasks, key=lambda task: sign * policy["by_task"].get(task, {}).get(key, sign * math.inf))


def comparison(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page of several runs shows: `runs` with labels, `tables`, `differences`, `same`, `missing` and `lines`."""
    runs = [{**run, "label": label} for run, label in zip(runs, _labels(runs), strict=True)]
    tasks = list(dict.fromkeys(task for run in runs for task in (run["results"] or {}).get("tasks", ())))
    columns, groups = [], []
    for run in runs:
        policies = run["results"]["policies"] if run["results"] else {}
        shown = [(name, policy) for name, policy in policies.items() if name != "base"]
        shown.sort(key=lambda entry: (entry[0] != run["main"], entry[0] == "specialists"))  # the recipe's own first
        if shown:
            columns += shown
            groups.append((run["label"], len(shown)))
    every = [(run, name) for run in runs for name in run["history"]]
    lines = every if len(every) <= 8 else [(run, name) for run, name in every if name == run["main"]]
    differences, same = _differences(runs)
    return {
        "runs": runs,
        "tables": _tables(tasks, columns, columns[0][1], groups) if columns else [],
        "differences": differences,
        "same": same,
        "missing": _reservations(runs, len(lines) < len(every)),
        "lines": [(f"{run['label']}: {name}", run, name) for run, name in lines],
    }


def _labels(runs: list[dict[str, Any]]) -> list[str]:
    """Short names that tell the runs apart: of the folder, with its parent where several have one name, or a number."""
    labels = [run["name"] for run in runs]
    if len(set(labels)) < len(labels):
        labels = [run["place"] for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels, start=1)
    ]


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run has noted of its settings: its fingerprint, and its recipe where that says more."""
    import yaml

    from .html_report import flat

    settings = dict(run["fingerprint"])
    try:
        recipe = yaml.safe_load(run["recipe"] or "{}")
    except (yaml.YAMLError, ValueError, RecursionError):
        recipe = None
    for key, value in flat(recipe).items() if isinstance(recipe, dict) else ():
        settings.setdefault(str(key), value)
    return settings


def _differences(runs: list[dict[str, Any]]) -> tuple[list[tuple[str, list[tuple[bool, Any]]]], int]:
    noted = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for settings in noted for key in settings))
    rows = [(key, [(key in settings, settings.get(key)) for settings in noted]) for key in keys]
    differing = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
    differing.sort(
        key=lambda row: (row[0].startswith(("reference_losses.", "pairs.")), row[0].startswith("versions."))
    )
    return differing, len(rows) - len(differing)


def _reservations(runs: list[dict[str, Any]], only_main: bool) -> list[str]:
    """Why numbers of these runs may not be of one kind, and what the page leaves out."""
    sentences = [f"{run['label']} is not evaluated." for run in runs if run["results"] is None]
    for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
        held_out = {str(run["held_out_pairs"].get(task)) for run in runs} - {"None"}
        lacking = [run["label"] for run in runs if task not in run["tasks"]]
        if len(held_out) > 1:
            sentences.append(
                f"The held-out pairs of {task} are not the same in all runs, so its figures cannot be compared."
            )
        if lacking:
            sentences.append(f"There is no task {task} in {', '.join(lacking)}.")
    if len({run["base_model"] for run in runs if run["base_model"]}) > 1:
        sentences.append("The runs have different base models.")
    if only_main:
        sentences.append("Curves are shown of each run's own strategy only, as there would be too many.")
    return sentences
