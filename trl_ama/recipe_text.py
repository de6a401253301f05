"""The recipe of a run as YAML to publish: what differs from the defaults, without secrets and without this machine's paths."""

import dataclasses
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .secrets import is_secret, without_secrets


if TYPE_CHECKING:
    from .run_settings import RunSettings


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


def recipe_yaml(settings: "RunSettings", task: str | None = None) -> str:
    """The recipe of a run, or of one task's specialist in it."""
    model = _changed(settings.model_args)
    if task is None:
        training = settings.given_args
        pipeline = _changed(settings.pipeline_args)
        tasks = [_changed(entry) for entry in settings.task_args.tasks]
    else:
        config = next(entry for entry in settings.task_args.tasks if entry.task == task)
        training = settings.specialist_arguments(config)
        pipeline = {}
        tasks = [{key: value for key, value in _changed(config).items() if not key.startswith("specialist")}]
    mixture = {key: value for key, value in _changed(settings.task_args).items() if key != "tasks"}
    shown = _changed(training)
    shown["model_init_kwargs"] = settings.given_args.model_init_kwargs
    if task is not None:
        for name in ("mixing", "mixing_lr", "smoothing", "excess_clip", "sampling", "specialists"):
            shown.pop(name, None)
    else:
        shown = {"mixing": training.mixing, **shown}
    recipe = {**model, "tasks": tasks, **mixture, **pipeline, **shown}
    return yaml.safe_dump(
        _public(recipe, settings.training_args.hub_token), sort_keys=False, allow_unicode=True, width=110
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
