"""The generalist's card: rendered by TRL's own machinery from our template, its sections filled as the figures come in."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from trl.trainer.utils import generate_model_card

from ..common.files import read_json
from ..common.run_folder import PLOT, STAGE_FILE
from ..dpo.card import NAME, PAPER, TAGS, hyper_parameters, save_card, template_for_trl
from ..policies.identity import model_identity
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.settings import RunSettings
from ..recipe.text import recipe_yaml
from ..report.card_parts import eval_results, hub_name, identity_link, load_snippet, versions_line
from ..report.markdown import escape, fence, table
from ..report.results import result_table


_SHOWN = f"![Sampling probability and excess loss of each task]({PLOT})"


def write_card(
    settings: RunSettings, results: dict[str, Any] | None, plot: Path | None, published: dict[str, str]
) -> Path:
    """Write what the run knows into the card of the recipe's own generalist, with the plot beside it.

    Args:
        settings ([`RunSettings`]): The run.
        results (`dict`, *optional*): What [`evaluate_policies`] returns; `None` if there was nothing to evaluate on.
        plot (`Path`, *optional*): PNG of the mixture.
        published (`dict[str, str]`): Hub ids: of the specialists by task, of this model under `""`, and of the reference
            losses under `"/losses"`.
    """
    recipe, inputs = settings.recipe, settings.inputs
    strategy = recipe.training_args.mixing
    folder = settings.folder.generalist(strategy)
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else _draft(recipe, inputs, folder.name)
    has_plot = plot is not None and plot.is_file()
    if has_plot:
        shutil.copyfile(plot, folder / PLOT)
    place = published.get("")
    sections = {
        "results": result_table(results, this=strategy) if results else "There were no held-out pairs.",
        "mixture": _SHOWN if has_plot else "There is no plot.",
        "training": _training(settings, published),
        "loading": load_snippet(place, recipe.uses_peft, recipe.quantization_config(), inputs.takes_images),
    }
    data = card.data
    sources = [inputs.data_source(task) for task in recipe.task_names] + _losses_places(inputs, published)
    data.datasets = list(dict.fromkeys(name for name in map(hub_name, sources) if name)) or None
    name = hub_name(place) or data.model_name or f"{settings.folder.path.name}-{strategy}"
    data.model_name = " ".join(name.split("/")[-1].split())
    if results:
        figures = results["policies"][strategy]
        data.eval_results = [
            entry
            for task in recipe.task_names
            if task in figures["by_task"]
            for entry in eval_results(task, inputs.data_source(task), figures["by_task"][task])
        ] + _worst(figures["summary"])
    save_card(path, card, sections)
    return path


def _worst(summary: dict[str, float]) -> list[EvalResult]:
    names = {"worst_accuracy": "Reward accuracy (worst task)", "worst_excess": "Excess loss (worst task)"}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Preference optimisation",
            dataset_type="local",
            dataset_name="all tasks",
            metric_type=key,
            metric_name=name,
            metric_value=round(summary[key], 6),
        )
        for key, name in names.items()
        if key in summary
    ]


def _draft(recipe: Recipe, inputs: RunInputs, name: str) -> ModelCard:
    """The card of a generalist whose own was deleted."""
    return generate_model_card(
        base_model=hub_name(inputs.base_identity),
        model_name=name,
        hub_model_id=recipe.training_args.hub_model_id,
        dataset_name=None,
        tags=sorted(TAGS),
        wandb_url=None,
        trackio_url=None,
        trainer_name=NAME,
        trainer_citation=PAPER["citation"],
        template_file=template_for_trl(),
        paper_title=PAPER["title"],
        paper_id=PAPER["id"],
    )


def _training(settings: RunSettings, published: dict[str, str]) -> str:
    recipe, inputs = settings.recipe, settings.inputs
    rows = [["task", "data", "specialist"]]
    for task in recipe.task_names:
        rows.append(
            [
                escape(task),
                identity_link(inputs.data_source(task), "dataset"),
                _specialist(recipe, inputs, task, published),
            ]
        )
    losses = [identity_link(place, "dataset") for place in _losses_places(inputs, published)]
    steps = (read_json(settings.folder.generalist(recipe.training_args.mixing) / STAGE_FILE) or {}).get("result") or {}
    lines = [
        f"- Base model: {identity_link(inputs.base_identity)}",
        f"- Reference losses: {', '.join(losses) or 'computed by this run, not published'}",
        f"- Optimizer steps: {steps.get('steps', '–')}",
        f"- Made with {versions_line()}",
    ]
    parts = [table(rows, numbers=0), "\n".join(lines), hyper_parameters(recipe.training_args)]
    return "\n\n".join(
        [*parts, "The recipe, as far as it differs from the defaults:", fence(recipe_yaml(recipe), "yaml")]
    )


def _losses_places(inputs: RunInputs, published: dict[str, str]) -> list[str]:
    """Where the reference losses are: ready ones, and those that this run publishes."""
    ready = [inputs.shared_losses.public_source] if inputs.shared_losses is not None else []
    return [*ready, *([published["/losses"]] if "/losses" in published else [])]


def _specialist(recipe: Recipe, inputs: RunInputs, task: str, published: dict[str, str]) -> str:
    if task in published:
        return identity_link(published[task])
    if task in recipe.external_specialists:
        return identity_link(model_identity(recipe.external_specialists[task]))
    if task in inputs.shared_tasks:
        losses = inputs.shared_losses
        return identity_link(losses.specialist_repos.get(task) or losses.fingerprints[task].get("specialist"))
    return "trained by this run, not published"
