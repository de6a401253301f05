"""Names for everything that decides a number: equal fingerprints, equal log-probs."""

import dataclasses
import hashlib
import json
import math
import os
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .errors import AMAError
from .policy_files import hub_commit, split_revision
from .recipe_text import is_secret
from .safe_files import file_digest, write_file
from .tasks import PAIR_ID_COLUMN


_WEIGHT_STEMS = ("model", "pytorch_model", "adapter_model")  # not the training_args.bin beside them
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Keys of config.json and adapter_config.json that say where a model was or what wrote it
_NOT_THE_MODEL = {"base_model_name_or_path", "_name_or_path", "transformers_version", "peft_version", "inference_mode"}
_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets")

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

_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
_PAIRS_PER_STEP = "pairs_per_step"


def _digest(*parts: str | bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else part.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


def _weight_digest(folder: Path) -> str:
    """Hash of a model folder's weights and of the settings that decide what is computed with them."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.name.startswith(_WEIGHT_STEMS) and path.is_file()):
        if path.suffix in _WEIGHT_SUFFIXES:
            parts.append(file_digest(path))
    for name in ("config.json", "adapter_config.json"):
        config = read_json(folder / name) or {}
        parts.append(json.dumps({key: config[key] for key in sorted(config) if key not in _NOT_THE_MODEL}))
    return _digest(*parts)


def model_identity(source: str, revision: str | None = None) -> str:
    """What weights `source` stands for: `org/name@commit` for a Hub id, `name@sha256:…` for a folder's contents.

    Raises:
        AMAError: If there is no such repository or revision, or it can neither be reached nor is cached.
    """
    name, pinned = split_revision(source)
    if os.path.isdir(name):
        return f"{Path(name).resolve().name}@sha256:{_weight_digest(Path(name))}"
    return f"{name}@{hub_commit(name, pinned or revision)}"


def tokenizer_identity(processor: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """Hash of the vocabulary, its rules and the chat template; of a processor also of what it does to images."""
    if isinstance(processor, ProcessorMixin):
        settings = {key: value for key, value in processor.to_dict().items() if key not in _NOT_THE_MODEL}
        rules = json.dumps(settings, sort_keys=True, default=str)
        return _digest(tokenizer_identity(processor.tokenizer), str(processor.chat_template), rules)
    tokenizer = processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _digest(rules, str(tokenizer.chat_template), str(tokenizer.eos_token), str(tokenizer.pad_token))


def pairs_identity(dataset: Dataset) -> str:
    """Hash of the pairs of a dataset, in order."""
    key = dataset._fingerprint  # datasets' own name for these rows; hashing a large task once is enough
    if key not in _pairs_seen:
        _pairs_seen[key] = _digest(*dataset[PAIR_ID_COLUMN])
    return _pairs_seen[key]


_pairs_seen: dict[str, str] = {}


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {package: version(package) for package in _PACKAGES}


def relevant_arguments(*configs: Any) -> dict[str, Any]:
    """The fields of argument dataclasses that can change a trained number, as JSON types.

    How the pairs of an optimizer step are split into processes and micro-batches does not count, but how many there are does.
    """
    result = {}
    for config in configs:
        if hasattr(config, _SPLIT[0]):
            result[_PAIRS_PER_STEP] = math.prod(getattr(config, name) for name in _SPLIT) * config.world_size
        for field in dataclasses.fields(config):
            name = field.name
            decides = name in _BEST_MODEL and config.load_best_model_at_end
            if (
                not field.init
                or name in _SPLIT
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


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field whose values differ, as (name, ours, theirs); versions and places of data are not compared."""
    for field in [*ours, *(field for field in theirs if field not in ours)]:
        our_value, their_value = ours.get(field), theirs.get(field)
        if field in ("versions", "data") or _weights(our_value) == _weights(their_value):
            continue
        if isinstance(our_value, dict) and isinstance(their_value, dict):
            name, our_value, their_value = first_difference(our_value, their_value) or ("", our_value, their_value)
            field = f"{field}.{name}".rstrip(".")
        return field, our_value, their_value
    return None


def _weights(value: Any) -> Any:
    """Of a folder's identity the hash of its weights, as folders are renamed and copied; any other value as it is."""
    if isinstance(value, str) and "@sha256:" in value:
        return value.partition("@")[2]
    return {key: _weights(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def check_fingerprint(ours: dict[str, Any], theirs: dict[str, Any], what: str, fix: str) -> None:
    """Raise an `AMAError` that names the first field that differs, both values and the fix."""
    if _PAIRS_PER_STEP in ours and set(_SPLIT) <= set(theirs):  # as trl-ama 0.1 noted it, which knew one process
        theirs = {_PAIRS_PER_STEP: math.prod(theirs[name] for name in _SPLIT), **theirs}
        theirs = {name: value for name, value in theirs.items() if name not in _SPLIT}
    difference = first_difference(ours, theirs)
    if difference is not None:
        field, our_value, their_value = difference
        if field == "base_model" and "@sha256:" not in str(their_value):
            fix = f"A commit of the base model is pinned with model_revision. {fix}"
        raise AMAError(f"{what} made with {field}={their_value!r}, but this run has {field}={our_value!r}. {fix}")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all; it is on the disk when this returns."""
    write_file(Path(path), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any | None:
    """Read JSON; `None` if there is no such file.

    Raises:
        AMAError: If the file is there but is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise AMAError(f"'{path}' is damaged ({error}). Delete it, and its stage is done again.") from error
