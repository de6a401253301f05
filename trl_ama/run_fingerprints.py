"""What decides the numbers of each stage of a run, by which a stage that is done already is known again."""

import dataclasses
import json
import math
from enum import Enum
from typing import Any

from .fingerprint import PAIRS_PER_STEP, SPLIT
from .secrets import is_secret


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
