"""What all cards share."""

import importlib.resources
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..common.hub import hub_link, is_commit, is_hub_id
from ..common.versions import __version__
from .markdown import code, fence


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

_TEMPLATES = importlib.resources.files("trl_ama.report") / "templates"


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


def eval_results(task: str, data: str, figures: dict[str, float]) -> list[EvalResult]:
    """A task's figures for a card's `model-index`."""
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
