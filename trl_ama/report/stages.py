"""How far a run is, and what its page lacks."""

from pathlib import Path
from typing import Any

from .reading import RunReader, as_dict, as_names, last_checkpoint, number, parts


def _trained(folder: Path, stage: dict[str, Any]) -> str:
    if stage.get("result") is not None:
        steps = number(as_dict(stage["result"]).get("steps"))
        return "done" if steps is None else f"done, {steps} steps"
    checkpoint = last_checkpoint(folder)
    return "not finished" + (f", last checkpoint at step {checkpoint[0]}" if checkpoint else "")


def stage_rows(
    run: RunReader, note: dict[str, Any], notes: dict[str, dict[str, dict[str, Any]]], data: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Stage, what of it, and how far it is.

    Args:
        run ([`RunReader`]): The run's folder.
        note (`dict`): What the run noted for its page.
        notes (`dict`): `specialists` and `generalists` → name → its `stage.json`.
        data (`dict`): What [`collect`] has found so far.
    """
    losses, specialists, generalists = map(parts, (run.folder.losses, run.folder.specialists, run.folder.generalists))
    tasks = data["tasks"]
    rows = []
    external, shared = as_dict(note.get("specialists")), as_dict(note.get("reference_losses"))
    scored = run.folder.tasks_with_shards()
    for task in tasks:
        if task in specialists:
            state = _trained(specialists[task], notes["specialists"][task])
        elif task in external or task in shared:
            state = f"from {external[task]}" if task in external else "not needed"
        else:
            state = "not there"
        rows.append(("specialist", task, state))
    for task in tasks:
        state = "done" if task in losses else f"from {shared[task]}" if task in shared else "not there"
        rows.append(("reference losses", task, "not finished" if task in scored and task not in losses else state))
    for name in dict.fromkeys([*as_names(note.get("strategies")), *data["strategies"]]):
        there = name in generalists
        rows.append(
            ("generalist", name, _trained(generalists[name], notes["generalists"][name]) if there else "not there")
        )
    evaluated = [name for name in data["strategies"] if data["results"] and name in data["results"]["policies"]]
    rows.append(("evaluation", "held-out pairs", f"done for {', '.join(evaluated)}" if evaluated else "not there"))
    return rows


def missing_sentences(run: RunReader, note: dict[str, Any], data: dict[str, Any], examples: str | None) -> list[str]:
    """What the page would have to show and cannot, in sentences."""
    generalists = parts(run.folder.generalists)
    sentences = list(run.missing)
    if not generalists:
        sentences.append("No generalist is trained yet, so there is no mixture to show. Run `trl ama --config …`.")
    for stage, name, state in data["stages"]:
        if stage == "generalist" and not state.startswith("done") and generalists:
            sentences.append(f"The generalist {name} is {state}.")
    if data["results"] is None:
        sentences.append(
            "No task has held-out pairs (`eval_split`, `test_split_size`), so nothing was evaluated."
            if note.get("held_out") is False
            else "There is no evaluation yet. Run `trl ama-eval --config …`."
        )
    else:
        sentences += [
            f"The generalist {name} is not evaluated."
            for name in generalists
            if name not in data["results"]["policies"]
        ]
    sentences += [f"The generalist {name} has no log yet." for name in generalists if name not in data["history"]]
    if examples:
        sentences.append(examples)
    if data["recipe"] is None:
        sentences.append(
            "The recipe was not noted by the trl-ama that made this run; its fingerprint is shown instead."
        )
    return sentences
