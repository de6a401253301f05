"""Tables of a run's page and of several runs side by side, worst task first, with the numbers of `results.json`."""

import math
from collections.abc import Callable
from typing import Any

import yaml

from ..common.errors import AMAError
from .reading import flat


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
    common: list[str] | None = None,
) -> list[dict[str, Any]]:
    """A table a figure; the worst task and the mean are over `common`, or else over each column's own tasks."""
    tables = []
    for key, title, worst in _FIGURES:
        values = [{task: figures.get(key) for task, figures in policy["by_task"].items()} for _, policy in columns]
        if not any(value is not None for column in values for value in column.values()):
            continue
        rows = []
        if common is None or common:
            names = (
                ("worst task", "mean of tasks") if common is None else ("worst common task", "mean of common tasks")
            )
            rows = [
                {
                    "name": name,
                    "kind": kind,
                    "cells": [_summary(policy, key, function, common) for _, policy in columns],
                }
                for name, kind, function in zip(names, ("worst", "mean"), (worst, None), strict=True)
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


def _summary(
    policy: dict[str, Any], key: str, worst: Callable | None, tasks: list[str] | None = None
) -> dict[str, Any]:
    """The cell of the worst task, or of the mean; older runs have noted neither for margins."""
    values = [
        figures[key]
        for task, figures in policy["by_task"].items()
        if key in figures and (tasks is None or task in tasks)
    ]
    value = policy["summary"].get(f"{'worst' if worst else 'mean'}_{key}") if tasks is None else None
    if value is None and values:
        value = worst(values) if worst else math.fsum(values) / len(values)
    return {"value": value, "error": None, "is_worst": False}


def _worst_first(tasks: list[str], policy: dict[str, Any], key: str, worst: Callable) -> list[str]:
    sign = 1 if worst is min else -1
    return sorted(tasks, key=lambda task: sign * policy["by_task"].get(task, {}).get(key, sign * math.inf))


def comparison(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page of several runs shows: `runs` with labels, `tables`, `differences`, `same`, `missing` and `lines`.

    Raises:
        AMAError: If a run has no task that another has too.
    """
    runs = _labelled(runs)
    for run in runs:
        others = {task for other in runs if other is not run for task in other["tasks"]}
        if run["tasks"] and others and not others & set(run["tasks"]):
            raise AMAError(
                f"The run '{run['place']}' has the tasks {run['tasks']}, and no other run has one of them, so there is nothing to "
                "compare. Leave it out; `trl ama-report` with one folder writes its own page."
            )
    evaluated = [run["results"]["tasks"] for run in runs if run["results"]]
    tasks = list(dict.fromkeys(task for own in evaluated for task in own))
    common = [task for task in tasks if all(task in own for own in evaluated)]
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
        "tables": _tables(tasks, columns, columns[0][1], groups, None if common == tasks else common)
        if columns
        else [],
        "differences": differences,
        "same": same,
        "missing": reservations(runs)
        + ["Curves are shown of each run's own strategy only, as there would be too many."]
        * (len(lines) < len(every)),
        "lines": [(f"{run['label']}: {name}", run, name) for run, name in lines],
    }


def _labelled(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**run, "label": label} for run, label in zip(runs, _labels(runs), strict=True)]


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
    partial = {task for run in runs for task in run["tasks"] if any(task not in other["tasks"] for other in runs)}
    # What is noted of a task that a run has not got would fill a screen, and is no difference of settings
    left_out = tuple(f"{part}.{task}" for part in ("reference_losses", "pairs") for task in partial)
    keys = [
        key
        for key in dict.fromkeys(key for settings in noted for key in settings)
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    ]
    rows = [(key, [(key in settings, settings.get(key)) for settings in noted]) for key in keys]
    differing = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
    differing.sort(
        key=lambda row: (row[0].startswith(("reference_losses.", "pairs.")), row[0].startswith("versions."))
    )
    return differing, len(rows) - len(differing)


def reservations(runs: list[dict[str, Any]]) -> list[str]:
    """Why numbers of these runs may not be of one kind."""
    runs = _labelled(runs)
    sentences = []
    for run in runs:
        open_stages = [
            f"{stage} {name} {state}"
            for stage, name, state in run["stages"]
            if state.startswith(("not finished", "not there"))
        ]
        if run["results"] is None:
            sentences.append(
                f"{run['label']} is not evaluated" + (f" ({'; '.join(open_stages)})." if open_stages else ".")
            )
        elif open_stages:
            sentences.append(f"{run['label']} is not complete ({'; '.join(open_stages)}).")
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    lacking = {run["label"]: [task for task in tasks if task not in run["tasks"]] for run in runs}
    sentences += [f"{label} has no task {', '.join(names)}." for label, names in lacking.items() if names]
    if any(lacking.values()):
        sentences.append(
            "The worst task and the mean are over the tasks that all evaluated runs have, if there are any."
        )
    for task in tasks:
        held_out = {str(run["held_out_pairs"].get(task)) for run in runs} - {"None"}
        if len(held_out) > 1:
            sentences.append(
                f"The held-out pairs of {task} are not the same in all runs, so its figures cannot be compared."
            )
    if len({run["base_model"] for run in runs if run["base_model"]}) > 1:
        sentences.append("The runs have different base models.")
    return sentences
