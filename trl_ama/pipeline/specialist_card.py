"""The specialists' cards."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..recipe.settings import RunSettings
from ..recipe.text import recipe_yaml
from ..report.card_parts import CITATION, eval_results, hub_name, identity_link, load_snippet, template, versions_line
from ..report.markdown import escape, fence, table


def write_specialist_card(settings: RunSettings, task: str, result: dict[str, Any], place: str | None = None) -> Path:
    """Write the card of a trained specialist into its folder.

    Args:
        settings ([`RunSettings`]): The run.
        task (`str`): The specialist's task.
        result (`dict`): What [`train_specialist`] returns.
        place (`str`, *optional*): Where it will be pushed to: `org/name`, or `org/name@branch`.
    """
    recipe, inputs, folder = settings.recipe, settings.inputs, settings.folder.specialist(task)
    base, data = inputs.base_identity, inputs.data_source(task)
    base_id, data_id = hub_name(base), hub_name(data)
    name = place.partition("@")[0].split("/")[-1] if place else f"{Path(recipe.model_name).resolve().name}-{task}"
    name = " ".join(name.split())
    uses_peft = recipe.uses_peft
    figures = _held_out_figures(result)
    card_data = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if uses_peft and base_id else None,
        datasets=[data_id] if data_id else None,
        library_name="peft" if uses_peft else "transformers",
        model_name=name,
        tags=["ama", "ama-specialist", "dpo", "generated_from_trainer", "trl"],
        eval_results=eval_results(task, data, figures["specialist"]) if figures else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template("specialist_card.md")),
        title=escape(name),
        task=escape(task),
        base_model=identity_link(base),
        data=identity_link(data, "dataset"),
        results=_specialist_table(task, figures, result) if figures else "There were no held-out pairs.",
        steps=result.get("steps"),
        recipe=fence(recipe_yaml(recipe, task), "yaml"),
        use_yaml=fence(
            yaml.safe_dump({"tasks": [{"task": task, "path": "…", "specialist": place or "path/to/this/folder"}]},
                           sort_keys=False, allow_unicode=True), "yaml"
        ),
        use_python=load_snippet(place, uses_peft, recipe.quantization_config(), inputs.takes_images),
        citation=CITATION,
        versions=versions_line(),
    )  # fmt: skip
    card.save(folder / "README.md")
    return folder / "README.md"


def _held_out_figures(result: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """Figures of base and specialist on the task's held-out pairs."""
    if "eval_loss" not in result:
        return None
    count, accuracy = result["eval_pairs"], result["eval_accuracy"]
    return {
        # An untrained policy: no margin anywhere, and a tie counts half
        "base": {"accuracy": 0.5, "margin": 0.0, "loss": result["base_loss"], "pairs": count},
        "specialist": {
            "accuracy": accuracy,
            "accuracy_stderr": (accuracy * (1 - accuracy) / count) ** 0.5,
            "margin": result["eval_margin"],
            "loss": result["eval_loss"],
            "pairs": count,
        },
    }


def _specialist_table(task: str, figures: dict[str, dict[str, float]], result: dict[str, Any]) -> str:
    own = figures["specialist"]
    rows = [
        ["", "base", "this specialist"],
        ["reward accuracy", "0.500", f"{own['accuracy']:.3f} ± {own['accuracy_stderr']:.3f}"],
        ["reward margin", "0.000", f"{own['margin']:.3f}"],
        ["loss", f"{figures['base']['loss']:.3f}", f"{own['loss']:.3f}"],
    ]
    return (
        table(rows)
        + f"\n\n{own['pairs']} held-out pairs of {escape(task)}; accuracy ± one standard error. The base is its own reference: no margin, and "
        "every pair a tie, which counts half."
    )
