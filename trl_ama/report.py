"""What a run leaves for people: the result table, the plot of the mixture over time, and the card."""

import importlib.resources
import math
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from . import __version__
from .fingerprint import read_json
from .run_settings import RunSettings
from .tasks import TaskConfig


_FIGURES = (("accuracy", "Held-out reward accuracy", "mean_accuracy", "worst_accuracy"),
            ("excess", "Held-out excess loss", "mean_excess", "worst_excess"))  # fmt: skip


def result_table(results: dict[str, Any]) -> str:
    """The result table in Markdown: tasks, their mean and the worst task; base, specialists and each strategy.

    Args:
        results (`dict`): What [`evaluate_policies`] returns.
    """
    names = list(results["policies"])
    blocks = []
    for key, title, mean, worst in _FIGURES:
        rows = [[title, *names]]
        for task in results["tasks"]:
            cells = [results["policies"][name]["by_task"].get(task) for name in names]
            rows.append([task, *(_cell(cell, key) for cell in cells)])
        for label, summary in (("mean of tasks", mean), ("**worst task**", worst)):
            values = [results["policies"][name]["summary"].get(summary, math.nan) for name in names]
            bold = label.startswith("**")
            rows.append([label, *(f"**{value:.3f}**" if bold else f"{value:.3f}" for value in values)])
        blocks.append(_markdown(rows))
    pairs = {task: results["policies"]["base"]["by_task"].get(task, {}).get("pairs", 0) for task in results["tasks"]}
    note = (
        "Accuracy ± one standard error; a tie counts half, so the base scores 0.5. Excess is clipped by pair, against each "
        "task's own specialist; the worst task has the lowest accuracy or the highest excess. Held-out pairs: "
        + ", ".join(f"{task} {count}" for task, count in pairs.items())
        + "."
    )
    return "\n\n".join([*blocks, note]) + "\n"


def _cell(figures: dict[str, float] | None, key: str) -> str:
    if figures is None:
        return "–"
    if key == "accuracy":
        return f"{figures['accuracy']:.3f} ± {figures['accuracy_stderr']:.3f}"
    return f"{figures[key]:.3f}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    ruler = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], ruler, *lines[1:]])


def mixture_history(folder: Path, tasks: list[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read a generalist's log: figure (`probability`, `weight`, `excess`, …) → task → [(step, value)]."""
    state = read_json(folder / "trainer_state.json") or {"log_history": []}
    history: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in state["log_history"]:
        for key, value in entry.items():
            parts = key.split("/", 2)
            if len(parts) == 3 and parts[0] == "ama" and parts[2] in tasks:
                history.setdefault(parts[1], {}).setdefault(parts[2], []).append((entry["step"], value))
    return history


def plot_mixture(settings: RunSettings, path: Path) -> None:
    """Plot sampling probability and excess loss of each task over the steps of each generalist, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    strategies = [
        name for name in settings.strategies if (settings.generalist_dir(name) / "trainer_state.json").is_file()
    ]
    if not strategies:
        return
    figure, axes = pyplot.subplots(
        2, len(strategies), figsize=(3.2 * len(strategies) + 1, 5.2), sharex=True, sharey="row", squeeze=False
    )
    for column, strategy in enumerate(strategies):
        history = mixture_history(settings.generalist_dir(strategy), settings.task_names)
        for row, (key, label) in enumerate(
            (("probability", "sampling probability"), ("excess", "excess loss (train)"))
        ):
            axis = axes[row][column]
            for index, task in enumerate(settings.task_names):
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _data_source(task: TaskConfig, settings: RunSettings) -> str:
    """Where a task's pairs come from, without the paths of this machine."""
    if settings.task_args.tasks_dir is not None:
        return "local files"
    if task.data_files is not None or Path(task.path).exists():
        files = task.data_files if isinstance(task.data_files, (list, dict)) else [task.data_files or task.path]
        paths = files.values() if isinstance(files, dict) else files
        return "local files: " + ", ".join(Path(path).name for path in paths)
    return f"[{task.path}](https://huggingface.co/datasets/{task.path})"


def write_card(settings: RunSettings, results: dict[str, Any], plot: Path | None) -> Path:
    """Write the model card of the recipe's own generalist into its folder, with the plot beside it."""
    strategy = settings.training_args.mixing
    folder = settings.generalist_dir(strategy)
    is_hub_model = not Path(settings.model_name).is_dir()
    base_name = Path(settings.model_name).resolve().name
    name = (settings.training_args.hub_model_id or f"{base_name}-{strategy}").split("/")[-1]
    data = ModelCardData(
        base_model=settings.model_name if is_hub_model else None,
        library_name="peft" if settings.model_args.use_peft else "transformers",
        model_name=name,
        tags=["trl", "dpo", "ama", "generated_from_trainer"],
    )
    if plot is not None and plot.is_file():
        shutil.copyfile(plot, folder / "mixture.png")
    args = settings.training_args
    recipe = {
        "mixing": strategy, "mixing_lr": args.mixing_lr, "smoothing": args.smoothing, "excess_clip": args.excess_clip,
        "beta": args.beta, "loss_type": args.loss_type, "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps, "max_length": args.max_length, "seed": args.seed,
    }  # fmt: skip
    template = importlib.resources.files("trl_ama") / "templates" / "generalist_card.md"
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=name,
        base_model=settings.model_name if is_hub_model else base_name,
        is_hub_model=is_hub_model,
        tasks=[{"name": task.task, "data": _data_source(task, settings)} for task in settings.task_args.tasks],
        strategy=strategy,
        strategies=settings.strategies,
        table=result_table(results),
        has_plot=plot is not None and plot.is_file(),
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip(),
        uses_peft=settings.model_args.use_peft,
        steps=(read_json(folder / "stage.json") or {}).get("result", {}).get("steps"),
        version=__version__,
    )
    card.save(folder / "README.md")
    return folder / "README.md"
