"""The generalist's card: rendered by TRL's own machinery from our template, its sections filled as the figures come in."""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from transformers import ProcessorMixin

from .cards import eval_results, hub_name, identity_link, load_snippet, template, versions_line
from .markdown import escape, fence, fill, table
from .model_identity import model_identity
from .recipe_text import recipe_yaml
from .report import result_table
from .safe_files import read_json


if TYPE_CHECKING:
    from .ama_config import AMAConfig
    from .ama_trainer import AMATrainer
    from .run_settings import RunSettings


_PLOT = "![Sampling probability and excess loss of each task](mixture.png)"


def template_for_trl() -> str | None:
    """Our template's path as seen from TRL's folder of templates, which is where `_template_file` is looked up."""
    import trl

    try:
        return os.path.relpath(
            os.path.realpath(template("generalist_card.md")), os.path.realpath(Path(trl.__file__).parent / "templates")
        )
    except ValueError:  # on another drive: TRL's own template, with our sections at its end
        return None


def complete_card(trainer: "AMATrainer") -> None:
    """Fill in what the trainer itself knows, after TRL has written the card."""
    path = Path(trainer.args.output_dir) / "README.md"
    card = ModelCard.load(path)
    args = trainer.args
    uses_peft = hasattr(trainer.model, "peft_config")
    card.data.tags = sorted({*(card.data.tags or [])})  # TRL's order changes from run to run
    card.data.pop("licence", None)  # a draft's placeholder
    if uses_peft:
        card.data.library_name = "peft"
        if card.data.base_model:
            card.data.base_model_relation = "adapter"
    tasks = ", ".join(map(escape, trainer.task_names))
    # TRL's template engine knows HTML, but not Markdown
    card.text = re.sub(r"(?m)^# .*", lambda _: f"# {escape(card.data.model_name)}", card.text, count=1)
    sections = {
        "training": f"Tasks: {tasks}. Optimizer steps: {trainer.state.global_step}.\n\n" + _hyper_parameters(args),
        "loading": load_snippet(
            _place(trainer),
            uses_peft,
            getattr(trainer.model.config, "quantization_config", None),
            isinstance(trainer.processing_class, ProcessorMixin),
        ),
        "results": _last_evaluation(trainer),
    }
    _save(path, card, sections)


def _place(trainer: "AMATrainer") -> str | None:
    branch = trainer.args.hub_revision
    return f"{trainer.hub_model_id}@{branch}" if trainer.hub_model_id and branch else trainer.hub_model_id


def _hyper_parameters(args: "AMAConfig") -> str:
    names = (
        "mixing", "mixing_lr", "smoothing", "excess_clip", "sampling", "beta", "loss_type", "label_smoothing",
        "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
        "max_steps", "num_train_epochs", "bf16", "seed",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return fence(yaml.safe_dump(values, sort_keys=False), "yaml")


def _save(path: Path, card: ModelCard, sections: dict[str, str]) -> None:
    card.text = fill(card.text, sections)
    card.save(path)


def _last_evaluation(trainer: "AMATrainer") -> str:
    """Figures by task of the trainer's last evaluation of held-out pairs, if there was one."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_worst_accuracy" in entry), None)
    if last is None:
        return "Not evaluated yet."
    figures = ("accuracy", "margin", "excess", "loss")
    present = [name for name in figures if any(f"eval_ama/{name}/{task}" in last for task in trainer.task_names)]
    rows = [["held-out pairs", *present]]
    for task in trainer.task_names:
        values = [last.get(f"eval_ama/{name}/{task}") for name in present]
        rows.append([escape(task), *("–" if value is None else f"{value:.3f}" for value in values)])
    worst = [last.get(f"eval_worst_{name}") for name in present]
    rows.append(["**worst task**", *("" if value is None else f"**{value:.3f}**" for value in worst)])
    return f"{table(rows)}\n\nAfter {last['step']} optimizer steps."


def write_card(
    settings: "RunSettings", results: dict[str, Any] | None, plot: Path | None, published: dict[str, str]
) -> Path:
    """Write what the run knows into the card of the recipe's own generalist, with the plot beside it.

    Args:
        settings ([`RunSettings`]): The run.
        results (`dict`, *optional*): What [`evaluate_policies`] returns; `None` if there was nothing to evaluate on.
        plot (`Path`, *optional*): PNG of the mixture.
        published (`dict[str, str]`): Hub ids: of the specialists by task, of this model under `""`, and of the reference
            losses under `"/losses"`.
    """
    strategy = settings.training_args.mixing
    folder = settings.generalist_dir(strategy)
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else _draft(settings)
    has_plot = plot is not None and plot.is_file()
    if has_plot:
        shutil.copyfile(plot, folder / "mixture.png")
    place = published.get("")
    sections = {
        "results": result_table(results, this=strategy) if results else "There were no held-out pairs.",
        "mixture": _PLOT if has_plot else "There is no plot.",
        "training": _training(settings, strategy, published),
        "loading": load_snippet(
            place, bool(settings.model_args.use_peft), settings.quantization_config(), settings.takes_images
        ),
    }
    data = card.data
    sources = [settings.data_source(task) for task in settings.task_names] + _losses_places(settings, published)
    data.datasets = list(dict.fromkeys(name for name in map(hub_name, sources) if name)) or None
    name = hub_name(place) or data.model_name or f"{settings.output_dir.name}-{strategy}"
    data.model_name = " ".join(name.split("/")[-1].split())
    if results:
        figures = results["policies"][strategy]
        data.eval_results = [
            entry
            for task in settings.task_names
            if task in figures["by_task"]
            for entry in eval_results(task, settings.data_source(task), figures["by_task"][task])
        ] + _worst(figures["summary"])
    _save(path, card, sections)
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


def _draft(settings: "RunSettings") -> ModelCard:
    """The card of a generalist whose own was deleted."""
    from trl.trainer.utils import generate_model_card

    from .ama_trainer import AMATrainer

    return generate_model_card(
        base_model=hub_name(settings.base_identity),
        model_name=settings.generalist_dir(settings.training_args.mixing).name,
        hub_model_id=settings.training_args.hub_model_id,
        dataset_name=None,
        tags=sorted(AMATrainer._tag_names),
        wandb_url=None,
        trackio_url=None,
        trainer_name=AMATrainer._name,
        trainer_citation=AMATrainer._paper["citation"],
        template_file=AMATrainer._template_file,
        paper_title=AMATrainer._paper["title"],
        paper_id=AMATrainer._paper["id"],
    )


def _training(settings: "RunSettings", strategy: str, published: dict[str, str]) -> str:
    rows = [["task", "data", "specialist"]]
    for task in settings.task_names:
        rows.append(
            [
                escape(task),
                identity_link(settings.data_source(task), "dataset"),
                _specialist(settings, task, published),
            ]
        )
    losses = [identity_link(place, "dataset") for place in _losses_places(settings, published)]
    steps = (read_json(settings.generalist_dir(strategy) / "stage.json") or {}).get("result") or {}
    lines = [
        f"- Base model: {identity_link(settings.base_identity)}",
        f"- Reference losses: {', '.join(losses) or 'computed by this run, not published'}",
        f"- Optimizer steps: {steps.get('steps', '–')}",
        f"- Made with {versions_line()}",
    ]
    parts = [table(rows, numbers=0), "\n".join(lines), _hyper_parameters(settings.training_args)]
    recipe = fence(recipe_yaml(settings), "yaml")
    return "\n\n".join([*parts, "The recipe, as far as it differs from the defaults:", recipe])


def _losses_places(settings: "RunSettings", published: dict[str, str]) -> list[str]:
    """Where the reference losses are: ready ones, and those that this run publishes."""
    ready = [settings.shared_losses.public_source] if settings.shared_losses is not None else []
    return [*ready, *([published["/losses"]] if "/losses" in published else [])]


def _specialist(settings: "RunSettings", task: str, published: dict[str, str]) -> str:
    if task in published:
        return identity_link(published[task])
    if task in settings.external_specialists:
        return identity_link(model_identity(settings.external_specialists[task]))
    if task in settings.shared_tasks:
        losses = settings.shared_losses
        return identity_link(losses.specialist_repos.get(task) or losses.fingerprints[task].get("specialist"))
    return "trained by this run, not published"
