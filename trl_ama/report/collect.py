"""What a run folder holds, as plain data for its page.

Nothing here imports torch or trusts a file: a run may be in progress, of an older trl-ama, half copied or a stranger's.
What is missing or damaged is named in the page, and the rest is shown.
"""

import math
from pathlib import Path
from typing import Any

from ..common.errors import AMAError
from ..common.run_folder import FINGERPRINT_FILE, STAGE_FILE, STATE_FILE, RunFolder
from ..common.secrets import is_secret, without_secrets
from .examples import examples_of, loss_stderr
from .reading import RunReader, as_dict, as_names, flat, last_checkpoint, number, parts
from .stages import missing_sentences, stage_rows


FIGURES = ("probability", "weight", "excess", "clipped_fraction")  # of the log, in the page's order
MASK = "•••"
_METRICS = ("accuracy", "accuracy_stderr", "margin", "loss", "excess", "pairs")


def collect(folder: str | Path) -> dict[str, Any]:
    """Read a run's folder.

    Args:
        folder (`str` or `Path`): The run's output folder.

    Returns:
        `dict` of `name`, `tasks`, `main` (the recipe's own strategy), `strategies`, `stages`, `missing`, `results`,
        `history`, `specialists`, `examples`, `recipe`, `fingerprint` and what else the page shows.

    Raises:
        AMAError: If there is no such folder, or nothing of a run is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AMAError(f"There is no folder '{folder}'. Give the output_dir of a run.")
    names = RunFolder(folder)
    run = RunReader(names)
    losses, specialists, generalists = map(parts, (names.losses, names.specialists, names.generalists))
    note = run.json(names.note)
    there = note or losses or specialists or generalists or names.tasks_with_shards()
    if not there and not names.results.exists():
        raise AMAError(
            f"'{folder}' holds nothing of a run: no specialists, reference_losses, generalists or results.json. Give the "
            "output_dir of a run."
        )
    results = _results(run.json(names.results))
    notes = {name: run.json(path / FINGERPRINT_FILE) for name, path in losses.items()}
    stages = {
        kind: {name: run.json(path / STAGE_FILE) for name, path in trained.items()}
        for kind, trained in (("specialists", specialists), ("generalists", generalists))
    }
    tasks = as_names(note.get("tasks")) or (results or {}).get("tasks") or _tasks_of(notes, specialists)
    evaluated = [name for name in (results or {}).get("policies", ()) if name not in ("base", "specialists")]
    known = [*as_names(note.get("strategies")), *evaluated, *generalists]
    # A strategy of an earlier recipe in the folder comes after those of the recipe
    strategies = [name for name in dict.fromkeys(known) if name in generalists or name in evaluated]
    main = note.get("mixing") if note.get("mixing") in strategies else next(iter(strategies), None)
    fingerprint = _fingerprint(stages, main)
    data = {
        "name": folder.resolve().name,
        "place": str(folder),
        "tasks": tasks,
        "main": main,
        "strategies": strategies,
        "base_model": str(note.get("base_model") or fingerprint.get("base_model") or "") or None,
        "takes_images": (generalists.get(main, folder) / "processor_config.json").is_file(),
        "adapter": note.get("adapter", (generalists.get(main, folder) / "adapter_config.json").is_file()),
        "data": as_dict(note.get("data")) or {task: _part(notes, task).get("data") for task in tasks},
        "results": results,
        "held_out_pairs": {task: _part(notes, task).get("test_pairs") for task in tasks},
        "history": {},
        "recipe": _text(note.get("recipe")),
        "arguments": _text(note.get("arguments")),
        "published": {str(key): str(value) for key, value in as_dict(note.get("published")).items()},
        "versions": {
            str(key): str(value)
            for key, value in (as_dict(note.get("versions")) or as_dict(fingerprint.get("versions"))).items()
        },
        "fingerprint": flat(masked(fingerprint)),
    }
    for name in strategies:
        history = _history(run, generalists[name], tasks) if name in generalists else None
        if history is not None:
            data["history"][name] = history
    data["specialists"] = [
        _specialist(task, stages["specialists"].get(task, {}), results, note, losses.get(task)) for task in tasks
    ]
    data["stages"] = stage_rows(run, note, stages, data)
    data["examples"], why = examples_of(names.margins, losses, tasks, main, results)
    data["missing"] = missing_sentences(run, note, data, why)
    return data


def _text(value: Any) -> str | None:
    return without_secrets(value) if isinstance(value, str) else None


def _part(notes: dict[str, dict[str, Any]], task: str) -> dict[str, Any]:
    return as_dict(notes.get(task, {}).get("fingerprint"))


def _tasks_of(notes: dict[str, dict[str, Any]], specialists: dict[str, Path]) -> list[str]:
    """The tasks in the recipe's order, as far as the folder knows it."""
    order = {name: number(note.get("order")) or 0 for name, note in notes.items()}
    return list(dict.fromkeys([*sorted(order, key=lambda name: (order[name], name)), *specialists]))


def _results(content: dict[str, Any]) -> dict[str, Any] | None:
    """`results.json`, as far as it is what it should be."""
    policies = {}
    for name, entry in as_dict(content.get("policies")).items():
        by_task = {
            task: {key: number(figures[key]) for key in _METRICS if number(figures.get(key)) is not None}
            for task, figures in as_dict(as_dict(entry).get("by_task")).items()
            if isinstance(figures, dict)
        }
        summary = {
            key: value for key, value in as_dict(as_dict(entry).get("summary")).items() if number(value) is not None
        }
        policies[name] = {"by_task": by_task, "summary": summary}
    if not policies:
        return None
    tasks = as_names(content.get("tasks")) or list(
        dict.fromkeys(task for one in policies.values() for task in one["by_task"])
    )
    return {"tasks": tasks, "policies": policies, "held_out": as_dict(content.get("made_from")).get("held_out")}


def _history(run: RunReader, folder: Path, tasks: list[str]) -> dict[str, Any] | None:
    """A generalist's log: `steps`, and of each figure and task a list of as many values, `None` where it was not logged."""
    path = folder / STATE_FILE
    checkpoint = last_checkpoint(folder)
    if not path.is_file() and checkpoint is not None:  # in progress
        path = checkpoint[1] / STATE_FILE
    log = run.json(path).get("log_history")
    rows: dict[int, dict[str, Any]] = {}
    for entry in log if isinstance(log, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and 0 <= entry["step"] < 2**53:
            found = {
                key: value for key, value in entry.items() if key.startswith("ama/") and number(value) is not None
            }
            if found:
                rows[entry["step"]] = found
    steps = sorted(rows)
    figures = {}
    for figure in FIGURES:
        curves = {task: [rows[step].get(f"ama/{figure}/{task}") for step in steps] for task in tasks}
        curves = {task: values for task, values in curves.items() if any(value is not None for value in values)}
        if curves:
            figures[figure] = curves
    return {"steps": steps, "figures": figures} if figures else None


def _specialist(
    task: str, stage: dict[str, Any], results: dict[str, Any] | None, note: dict[str, Any], losses: Path | None
) -> dict[str, Any]:
    """Held-out quality of a task's specialist beside the base: as its training noted it, or else as the evaluation did."""
    noted = {key: number(value) for key, value in as_dict(stage.get("result")).items()}
    policies = (results or {}).get("policies", {})
    own = policies.get("specialists", {}).get("by_task", {}).get(task, {})
    pairs, accuracy = noted.get("eval_pairs") or own.get("pairs"), noted.get("eval_accuracy", own.get("accuracy"))
    row = {
        "task": task,
        "source": as_dict(note.get("specialists")).get(task) or as_dict(note.get("reference_losses")).get(task),
        "steps": noted.get("steps"),
        "pairs": pairs,
        "loss": noted.get("eval_loss", own.get("loss")),
        "base_loss": noted.get("base_loss", policies.get("base", {}).get("by_task", {}).get(task, {}).get("loss")),
        "loss_stderr": loss_stderr(losses, as_dict(stage.get("fingerprint"))),
        "margin": noted.get("eval_margin", own.get("margin")),
        "accuracy": accuracy,
        "accuracy_stderr": None,
        "warning": None,
    }
    if pairs and pairs > 0 and accuracy is not None and 0 <= accuracy <= 1:
        row["accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / pairs)
        loss, base, error = row["loss"], row["base_loss"], math.sqrt(0.25 / pairs)
        # As `quality_warning` judges, whose module needs torch
        if loss is not None and base is not None and not (loss < base and accuracy > 0.5 + error):
            row["warning"] = (
                f"It does not beat the base model on its own {pairs} held-out pairs (loss {loss:.3f} against {base:.3f}, accuracy "
                f"{accuracy:.2f} against 0.50 ± {error:.2f}), so its reference losses are no target worth reaching."
            )
    return row


def _fingerprint(stages: dict[str, dict[str, dict[str, Any]]], main: str | None) -> dict[str, Any]:
    """What decided the numbers: of the recipe's generalist, or of any stage that is there."""
    notes = [stages["generalists"].get(main, {}), *stages["generalists"].values(), *stages["specialists"].values()]
    return next((note["fingerprint"] for note in notes if as_dict(note.get("fingerprint"))), {})


def masked(value: Any, key: str = "", depth: int = 0) -> Any:
    """`value` with the values of secret settings hidden, and secrets within texts."""
    if is_secret(key) and value is not None:
        return MASK
    if depth > 20:
        return "…"
    if isinstance(value, dict):
        return {without_secrets(str(name)): masked(entry, str(name), depth + 1) for name, entry in value.items()}
    if isinstance(value, list):
        return [masked(entry, key, depth + 1) for entry in value]
    return without_secrets(value) if isinstance(value, str) else value
