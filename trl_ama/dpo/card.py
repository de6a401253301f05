"""An `AMATrainer`'s card: rendered by TRL's own machinery from our template, and what the trainer itself knows filled in."""

import os
import re
from pathlib import Path

import trl
import yaml
from huggingface_hub import ModelCard
from transformers import ProcessorMixin
from trl import DPOTrainer

from ..report.card_parts import CITATION, load_snippet, template
from ..report.markdown import escape, fence, fill, table
from .config import MIXING_FIELDS, AMAConfig


# As TRL's `generate_model_card` takes them
NAME = "AMA"
TAGS = ["trl", "dpo", "ama"]
PAPER = {
    "title": "AutoMixAlign: Adaptive Data Mixing for Multi-Task Preference Optimization in LLMs",
    "id": "2506.00569",
    "citation": CITATION,
}


def template_for_trl() -> str | None:
    """Our template's path as seen from TRL's folder of templates, which is where `_template_file` is looked up."""
    try:
        return os.path.relpath(
            os.path.realpath(template("generalist_card.md")), os.path.realpath(Path(trl.__file__).parent / "templates")
        )
    except ValueError:  # on another drive: TRL's own template, with our sections at its end
        return None


def complete_card(trainer: DPOTrainer) -> None:
    """Fill in what an [`AMATrainer`] itself knows, after TRL has written the card."""
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
        "training": f"Tasks: {tasks}. Optimizer steps: {trainer.state.global_step}.\n\n" + hyper_parameters(args),
        "loading": load_snippet(
            _place(trainer),
            uses_peft,
            getattr(trainer.model.config, "quantization_config", None),
            isinstance(trainer.processing_class, ProcessorMixin),
        ),
        "results": _last_evaluation(trainer),
    }
    save_card(path, card, sections)


def _place(trainer: DPOTrainer) -> str | None:
    branch = trainer.args.hub_revision
    return f"{trainer.hub_model_id}@{branch}" if trainer.hub_model_id and branch else trainer.hub_model_id


def hyper_parameters(args: AMAConfig) -> str:
    """What a policy was trained with, as YAML."""
    names = (
        *MIXING_FIELDS, "beta", "loss_type", "label_smoothing",
        "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
        "max_steps", "num_train_epochs", "bf16", "seed",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return fence(yaml.safe_dump(values, sort_keys=False), "yaml")


def save_card(path: Path, card: ModelCard, sections: dict[str, str]) -> None:
    """Write a card with its sections filled in."""
    card.text = fill(card.text, sections)
    card.save(path)


def _last_evaluation(trainer: DPOTrainer) -> str:
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
