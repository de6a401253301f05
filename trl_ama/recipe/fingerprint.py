"""What decides the numbers of each stage of a run, by which a stage that is done already is known again."""

import dataclasses
import json
import math
from enum import Enum
from typing import Any

from ..common.fingerprint import DEVICE, PAIRS_PER_STEP, SPLIT, package_versions
from ..common.secrets import is_secret
from ..dpo.config import MIXING_FIELDS
from ..dpo.losses import PreferenceLossConfig
from ..policies.identity import model_identity
from ..reference_losses.files import TaskLosses
from ..tasks.pairs import pairs_identity
from ..training.stage import result_in
from .inputs import RunInputs
from .recipe import Recipe
from .settings import RunSettings


# What `load_best_model_at_end` chooses the saved weights by
_BEST_MODEL = (
    "metric_for_best_model",
    "greater_is_better",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
)

# Training arguments that change where results go or how they are shown, but no number of them
_IRRELEVANT_PREFIXES = ("logging_", "log_", "hub_", "save_", "eval_", "push_to_hub", "trackio", "report_to", "ddp_")
_IRRELEVANT = {
    "output_dir", "run_name", "project", "disable_tqdm", "resume_from_checkpoint", "do_train", "do_eval", "do_predict",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataset_num_proc", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "specialists",
    "per_device_eval_batch_size", "precompute_ref_batch_size", "precompute_ref_log_probs",
    "restore_callback_states_from_checkpoint", "overwrite_output_dir", "skip_memory_metrics", "prediction_loss_only", "prefix_sharing",
    "skip_clipped",
    "streaming_buffer",
}  # fmt: skip


def relevant_arguments(*configs: Any) -> dict[str, Any]:
    """The fields of argument dataclasses that can change a trained number, as JSON types.

    How the pairs of an optimizer step are split into processes and micro-batches does not count, but how many there are does.
    """
    result = {}
    for config in configs:
        if hasattr(config, SPLIT[0]):
            result[PAIRS_PER_STEP] = math.prod(getattr(config, name) for name in SPLIT) * config.world_size
        for field in dataclasses.fields(config):
            name = field.name
            decides = name in _BEST_MODEL and config.load_best_model_at_end
            if (
                not field.init
                or name in SPLIT
                or (not decides and (name in _IRRELEVANT or name.startswith(_IRRELEVANT_PREFIXES)))
            ):
                continue
            value = getattr(config, name)
            if name == "model_init_kwargs":  # the base model's identity says its revision; a token is a secret
                value = {
                    key: kwarg
                    for key, kwarg in (value or {}).items()
                    if kwarg is not None and key != "revision" and not is_secret(key)
                }
            if isinstance(value, Enum):
                value = value.value
            if value is None or isinstance(value, (bool, int, float, str, list, dict)):
                result[name] = value
            elif dataclasses.is_dataclass(value):
                result[name] = str(value)
    return json.loads(json.dumps(result, default=str))


def specialist_fingerprint(recipe: Recipe, inputs: RunInputs, task: str) -> dict[str, Any]:
    """Everything that decides the weights of a task's specialist."""
    arguments = relevant_arguments(recipe.specialist_arguments(recipe.task(task)), recipe.model_args)
    for name in (*MIXING_FIELDS, "model_name_or_path", "model_revision"):
        arguments.pop(name, None)
    return {
        "base_model": inputs.base_identity,
        "tokenizer": inputs.tokenizer_identity,
        "pairs": pairs_identity(inputs.pairs_of(task, "train")),
        **arguments,
        "versions": package_versions(),
    }


def noted_path(prefix_sharing: str | bool, device: str) -> bool | str:
    """What decides which path log-probs take: off a CPU, `auto` leaves the fast one where it is slower, and `True` does not.

    Args:
        prefix_sharing (`str` or `bool`): `"auto"`, `True` or `False`.
        device (`str`): Type of the device.
    """
    return "always" if prefix_sharing is True and device != "cpu" else prefix_sharing is not False


def reference_fingerprint(settings: RunSettings, task: str) -> dict[str, Any]:
    """Everything in this run that decides the log-probs of a task's pairs.

    Of ready reference losses the pairs do not count, because every pair is joined by its id, and the specialist only if the
    recipe names one.
    """
    recipe, inputs = settings.recipe, settings.inputs
    args, quantization = recipe.training_args, recipe.quantization_config()
    fingerprint = {
        "task": task,
        "base_model": inputs.base_identity,
        "tokenizer": inputs.tokenizer_identity,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "dtype": args.model_init_kwargs["dtype"],
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "quantization": str(quantization.to_diff_dict()) if quantization else None,
        "attn_implementation": args.model_init_kwargs.get("attn_implementation"),
    }
    is_32_bit = {fingerprint["dtype"], fingerprint["mixed_precision"]} == {"float32", "no"} and not args.tf32
    if not is_32_bit or fingerprint["quantization"]:
        # In 16 bits (and TF32) the two paths round differently, by as much as a small excess; in 32 they agree
        fingerprint["prefix_sharing"] = noted_path(args.prefix_sharing, args.device.type)
        # And so do the kernels of a CPU and of a GPU, above all because attention is in 32 bits on a CPU
        fingerprint[DEVICE] = args.device.type
    if task in recipe.external_specialists or result_in(settings.folder.specialist(task)) is not None:
        fingerprint["specialist"] = model_identity(settings.specialist_source(task))
    if task not in inputs.shared_tasks:
        held_out = inputs.pairs_of(task, "test")
        fingerprint |= {
            "train_pairs": pairs_identity(inputs.pairs_of(task, "train")),
            "test_pairs": None if held_out is None else pairs_identity(held_out),
            "data": inputs.data_source(task),
        }
    return {**fingerprint, "versions": package_versions()}


def generalist_fingerprint(
    recipe: Recipe, inputs: RunInputs, losses: list[TaskLosses], strategy: str
) -> dict[str, Any]:
    """Everything that decides the weights of one strategy's generalist; `losses` are those of all tasks."""
    arguments = relevant_arguments(recipe.with_arguments(mixing=strategy), recipe.model_args)
    arguments.pop("model_name_or_path", None)
    return {
        "base_model": inputs.base_identity,
        "reference_losses": {
            part.task: {key: value for key, value in part.fingerprint.items() if key not in ("versions", "data")}
            for part in losses
        },
        "pairs": {task: pairs_identity(inputs.pairs_of(task, "train")) for task in recipe.task_names},
        **arguments,
        "versions": package_versions(),
    }


def evaluation_fingerprint(
    recipe: Recipe, inputs: RunInputs, losses: list[TaskLosses], policies: dict[str, str]
) -> dict[str, Any]:
    """Everything that decides the figures of [`evaluate_policies`], as JSON types; `losses` are those of all tasks."""
    return {
        "policies": {name: model_identity(source) for name, source in policies.items()},
        "reference_losses": {
            part.task: {name: file["sha256"] for name, file in part.note["files"].items()} for part in losses
        },
        "held_out": pairs_identity(inputs.data["test"]),
        "preference_loss": str(PreferenceLossConfig.from_args(recipe.training_args)),
    }
