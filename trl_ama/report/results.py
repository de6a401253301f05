"""What a run leaves for people: the result table and the plot of the mixture over time."""

import math
from pathlib import Path
from typing import Any

from ..common.files import read_json
from ..common.run_folder import STATE_FILE
from .markdown import escape, table


_FIGURES = (("accuracy", "Held-out reward accuracy", "mean_accuracy", "worst_accuracy"),
            ("excess", "Held-out excess loss", "mean_excess", "worst_excess"),
            ("margin", "Held-out reward margin", "mean_margin", "worst_margin"))  # fmt: skip


def result_table(results: dict[str, Any], this: str | None = None) -> str:
    """The result table in Markdown: tasks, their mean and the worst task; base, specialists and each strategy.

    Args:
        results (`dict`): What [`evaluate_policies`] returns.
        this (`str`, *optional*): The strategy whose model the table belongs to.
    """
    names = list(results["policies"])
    titles = [f"this model ({name})" if name == this else name for name in names]
    blocks = []
    for key, title, mean, worst in _FIGURES:
        rows = [[title, *titles]]
        for task in results["tasks"]:
            cells = [results["policies"][name]["by_task"].get(task) for name in names]
            rows.append([escape(task), *(_cell(cell, key) for cell in cells)])
        for label, summary in (("mean of tasks", mean), ("**worst task**", worst)):
            values = [results["policies"][name]["summary"].get(summary, math.nan) for name in names]
            bold = label.startswith("**")
            rows.append([label, *(f"**{value:.3f}**" if bold else f"{value:.3f}" for value in values)])
        blocks.append(table(rows))
    pairs = {task: results["policies"]["base"]["by_task"].get(task, {}).get("pairs", 0) for task in results["tasks"]}
    note = (
        "Accuracy ± one standard error; a tie counts half, so the base scores 0.5. Excess is clipped by pair, against each "
        "task's own specialist; the worst task has the lowest accuracy or margin, or the highest excess. Held-out pairs: "
        + ", ".join(f"{escape(task)} {count}" for task, count in pairs.items())
        + "."
    )
    return "\n\n".join([*blocks, note]) + "\n"


def _cell(figures: dict[str, float] | None, key: str) -> str:
    if figures is None:
        return "–"
    if key == "accuracy":
        return f"{figures['accuracy']:.3f} ± {figures['accuracy_stderr']:.3f}"
    return f"{figures[key]:.3f}"


def mixture_history(folder: Path, tasks: list[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read a generalist's log: figure (`probability`, `weight`, `excess`, …) → task → [(step, value)]."""
    state = read_json(folder / STATE_FILE) or {"log_history": []}
    history: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in state["log_history"]:
        for key, value in entry.items():
            parts = key.split("/", 2)
            if len(parts) == 3 and parts[0] == "ama" and parts[2] in tasks:
                history.setdefault(parts[1], {}).setdefault(parts[2], []).append((entry["step"], value))
    return history


def plot_mixture(folders: dict[str, Path], tasks: list[str], path: Path) -> None:
    """Plot sampling probability and excess loss of each task over the steps of each generalist, as one PNG.

    Args:
        folders (`dict[str, Path]`): Strategy → folder of its generalist; those that are not trained are left out.
        tasks (`list[str]`): Names of the tasks.
        path (`Path`): Where it goes.
    """
    import matplotlib  # here, because it takes a second, and whoever imports the pipeline for a stage needs none of it

    matplotlib.use("Agg")
    from matplotlib import pyplot  # which asks for the backend

    strategies = [name for name, folder in folders.items() if (folder / STATE_FILE).is_file()]
    if not strategies:
        return
    figure, axes = pyplot.subplots(
        2, len(strategies), figsize=(3.2 * len(strategies) + 1, 5.2), sharex=True, sharey="row", squeeze=False
    )
    for column, strategy in enumerate(strategies):
        history = mixture_history(folders[strategy], tasks)
        for row, (key, label) in enumerate(
            (("probability", "sampling probability"), ("excess", "excess loss (train)"))
        ):
            axis = axes[row][column]
            for index, task in enumerate(tasks):
                points = history.get(key, {}).get(task, [])
                steps, values = [step for step, _ in points], [value for _, value in points]
                # Dashes of several lengths, so that equal curves show each other
                dashes = (0, (4, index)) if index else "-"
                axis.plot(steps, values, color=f"C{index}", linestyle=dashes, label=task)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(strategy)
            else:
                axis.set_xlabel("optimizer step")
    for row in axes:  # shared within a row, and only right once every curve is there
        row[0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(len(labels), 6), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")  # long names make the legend wider than the figure
    pyplot.close(figure)
