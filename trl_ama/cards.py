"""The specialists' cards, and what all cards share."""

import importlib.resources
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .hub import hub_link, is_commit, is_hub_id
from .markdown import code, escape, fence, table
from .recipe_text import recipe_yaml
from .versions import __version__


if TYPE_CHECKING:
    from .run_settings import RunSettings


# BibTeX of the paper
# docstyle-ignore
CITATION = """\
@inproceedings{corrado2025automixalign,
    title        = {{AutoMixAlign: Adaptive Data Mixing for Multi-Task Preference Optimization in LLMs}},
    author       = {Nicholas E. Corrado and Julian Katz-Samuels and Adithya Devraj and Hyokun Yun and Chao Zhang and Yi Xu and Yi Pan and Bing Yin and Trishul Chilimbi},
    year         = 2025,
    booktitle    = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (ACL)},
    eprint       = {2506.00569},
}"""

_TEMPLATES = importlib.resources.files("trl_ama") / "templates"


def template(name: str) -> Path:
    """A file of the package's templates."""
    return Path(str(_TEMPLATES / name))


def identity_link(identity: str | None, repo_type: str = "model") -> str:
    """Markdown for a model's or dataset's identity: a link to a commit on the Hub, or the name of local weights."""
    if not identity:
        return "–"
    name, _, revision = identity.partition("@")
    if hub_name(identity):
        return hub_link(name, repo_type, revision or None)
    return code(identity.replace("local files: ", "")) + " (local)" if identity != "local files" else "local files"


def hub_name(identity: str | None) -> str | None:
    """The Hub id in an identity; `None` for something local."""
    name, _, revision = (identity or "").partition("@")
    known = is_commit(revision) or ("/" in name and not revision.startswith("sha256:"))
    return name if known and is_hub_id(name) else None


def versions_line() -> str:
    """The packages that made something."""
    packages = ("trl", "transformers", "peft", "torch", "datasets")
    return f"trl-ama {__version__}, " + ", ".join(f"{package} {version(package)}" for package in packages)


def write_specialist_card(
    settings: "RunSettings", task: str, result: dict[str, Any], place: str | None = None
) -> Path:
    """Write the card of a trained specialist into its folder.

    Args:
        settings ([`RunSettings`]): The run.
        task (`str`): The specialist's task.
        result (`dict`): What [`train_specialist`] returns.
        place (`str`, *optional*): Where it will be pushed to: `org/name`, or `org/name@branch`.
    """
    folder = settings.specialist_dir(task)
    base, data = settings.base_identity, settings.data_source(task)
    base_id, data_id = hub_name(base), hub_name(data)
    name = place.partition("@")[0].split("/")[-1] if place else f"{Path(settings.model_name).resolve().name}-{task}"
    name = " ".join(name.split())
    uses_peft = bool(settings.model_args.use_peft)
    figures = held_out_figures(result)
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
        recipe=fence(recipe_yaml(settings, task), "yaml"),
        use_yaml=fence(
            yaml.safe_dump({"tasks": [{"task": task, "path": "…", "specialist": place or "path/to/this/folder"}]},
                           sort_keys=False, allow_unicode=True), "yaml"
        ),
        use_python=load_snippet(place, uses_peft, settings.quantization_config(), settings.takes_images),
        citation=CITATION,
        versions=versions_line(),
    )  # fmt: skip
    card.save(folder / "README.md")
    return folder / "README.md"


def held_out_figures(result: dict[str, Any]) -> dict[str, dict[str, float]] | None:
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


def eval_results(task: str, data: str, figures: dict[str, float]) -> list[Any]:
    """A task's figures for a card's `model-index`."""
    from huggingface_hub import EvalResult

    data_id = hub_name(data)
    revision = data.partition("@")[2] if data_id else None
    names = {"accuracy": "Reward accuracy", "margin": "Reward margin", "excess": "Excess loss over the specialist"}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Preference optimisation",
            dataset_type=data_id or "local",
            dataset_name=task,
            dataset_revision=revision or None,
            metric_type=key,
            metric_name=f"{name} ({task})",
            metric_value=round(figures[key], 6),
        )
        for key, name in names.items()
        if key in figures
    ]


def load_snippet(place: str | None, uses_peft: bool, quantization: Any = None, takes_images: bool = False) -> str:
    """How to load a model from the Hub (`org/name` or `org/name@branch`): as adapter and merged, or as it is.

    Args:
        place (`str`, *optional*): Where it is; `None` for a folder.
        uses_peft (`bool`): Whether it is an adapter.
        quantization (`BitsAndBytesConfig`, *optional*): Of the base that the adapter was trained on.
        takes_images (`bool`): Whether it is a vision-language model.
    """
    place = place or "path/to/this/folder"
    name, _, revision = place.partition("@")
    name = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    if takes_images:
        classes, given = "AutoModelForImageTextToText, AutoProcessor", name
        lines = []
        if quantization is not None:
            classes, given = f"{classes}, BitsAndBytesConfig", f"{name}, quantization_config=quantization"
            lines = [f"quantization = BitsAndBytesConfig({_quantization_arguments(quantization)})"]
        note = "  # the adapter on its base" if uses_peft else ""
        lines = [
            f"from transformers import {classes}", "", *lines,
            f"model = AutoModelForImageTextToText.from_pretrained({given}){note}",
            f"processor = AutoProcessor.from_pretrained({name})",
        ]  # fmt: skip
    elif not uses_peft:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained({name})',
            f'tokenizer = AutoTokenizer.from_pretrained({name})',
        ]  # fmt: skip
    elif quantization is not None:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer, BitsAndBytesConfig", "",
            f"quantization = BitsAndBytesConfig({_quantization_arguments(quantization)})",
            f"model = AutoPeftModelForCausalLM.from_pretrained({name}, quantization_config=quantization)  # as it was trained",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
        ]  # fmt: skip
        merge = f"trl ama-merge --adapter {shlex.quote(place)} --output merged  # a full checkpoint of the same model"
        return fence("\n".join(lines), "python") + "\n\n" + fence(merge, "bash")
    else:
        lines = [
            "from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", "",
            f'model = AutoPeftModelForCausalLM.from_pretrained({name})  # the adapter on its base',
            f'tokenizer = AutoTokenizer.from_pretrained({name})',
            "model = model.merge_and_unload()  # merged: an ordinary transformers model",
        ]  # fmt: skip
    return fence("\n".join(lines), "python")


def _quantization_arguments(config: Any) -> str:
    if not config.load_in_4bit:
        return "load_in_8bit=True"
    arguments = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": bool(config.bnb_4bit_use_double_quant),
        "bnb_4bit_compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
    }
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
