"""What a user wrote, to publish it: the recipe as YAML and the command, without secrets and without this machine's paths."""

import dataclasses
import importlib.resources
import os
import re
import shlex
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ..common.secrets import is_secret, without_secrets
from ..dpo.config import MIXING_FIELDS
from .recipe import Recipe


# Where results go and how they are shown, which is not what made them
_NOT_SHOWN_PREFIXES = (
    "hub_",
    "push_to_hub",
    "report_to",
    "trackio",
    "logging_",
    "log_",
    "save_",
    "disable_tqdm",
    "run_name",
)
_NOT_SHOWN = {
    "output_dir",
    "project",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "dataset_num_proc",
    "local_rank",
}


_SCRIPTS = Path(str(importlib.resources.files("trl_ama"))).resolve() / "scripts"
_ASSIGNS_SECRET = re.compile(r"(?i)(token|secret|passw(or)?d|api_?key|credential)\w*[\"']?\s*[:=]")
_FOLDERS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\",}]+/)+")  # the way to a file, which is this machine's


def recipe_yaml(recipe: Recipe, task: str | None = None) -> str:
    """The recipe of a run, or of one task's specialist in it."""
    model = _changed(recipe.model_args)
    if task is None:
        training = recipe.given_args
        pipeline = _changed(recipe.pipeline_args)
        tasks = [_changed(entry) for entry in recipe.task_args.tasks]
    else:
        config = recipe.task(task)
        training = recipe.specialist_arguments(config)
        pipeline = {}
        tasks = [{key: value for key, value in _changed(config).items() if not key.startswith("specialist")}]
    mixture = {key: value for key, value in _changed(recipe.task_args).items() if key != "tasks"}
    shown = _changed(training)
    shown["model_init_kwargs"] = recipe.given_args.model_init_kwargs
    if task is not None:
        for name in (*MIXING_FIELDS, "specialists"):
            shown.pop(name, None)
    else:
        shown = {"mixing": training.mixing, **shown}
    content = {**model, "tasks": tasks, **mixture, **pipeline, **shown}
    return yaml.safe_dump(
        _public(content, recipe.training_args.hub_token), sort_keys=False, allow_unicode=True, width=110
    ).strip()


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for field in dataclasses.fields(config):
        if not field.init or field.name in _NOT_SHOWN or field.name.startswith(_NOT_SHOWN_PREFIXES):
            continue
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is not None and value != default and value != {} and value != []:
            changed[field.name] = value
    return changed


def _public(value: Any, token: str | None = None) -> Any:
    """`value` as plain YAML types; no secret, and none under a key that tells of one; local paths by their last part."""
    if isinstance(value, dict):
        public = {key: _public(entry, token) for key, entry in value.items() if not is_secret(str(key))}
        return {without_secrets(str(key), token): entry for key, entry in public.items() if entry not in (None, {})}
    if isinstance(value, (list, tuple, set)):
        return [_public(entry, token) for entry in value]
    if isinstance(value, Enum):
        return _public(value.value, token)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _public(_changed(value), token)
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    is_path = (
        os.path.isabs(text)
        or text.startswith(("~", "./", "../", "file:"))
        or (os.sep in text and os.path.exists(text))
    )
    return without_secrets(Path(text).name if is_path else text, token)


def public_arguments(argv: list[str]) -> str | None:
    """The arguments of one of our scripts as a shell takes them, without secrets and the folders of this machine; `None` if
    another program runs."""
    if not argv or Path(argv[0]).resolve().parent != _SCRIPTS:
        return None
    shown, skips = [], False
    for item in argv[1:]:
        flag, equals, value = item.partition("=") if item.startswith("--") else ("", "", item)
        if flag:
            skips = is_secret(flag.lstrip("-"))
        if skips:
            continue
        if value:
            value = "…" if _ASSIGNS_SECRET.search(value) else _FOLDERS.sub("", without_secrets(value))
        shown.append(shlex.quote(f"{flag}{equals}{value}"))
    return " ".join(shown)
