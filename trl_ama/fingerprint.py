"""Names for everything that decides a number: equal fingerprints, equal log-probs."""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from .errors import AMAError
from .scoring import split_revision
from .tasks import PAIR_ID_COLUMN


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets")

# Training arguments that change where results go or how they are shown, but no number of them
_IRRELEVANT_PREFIXES = ("logging_", "log_", "hub_", "save_", "eval_", "push_to_hub", "trackio", "report_to", "ddp_")
_IRRELEVANT = {
    "output_dir", "run_name", "project", "disable_tqdm", "resume_from_checkpoint", "do_train", "do_eval", "do_predict",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataset_num_proc", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "specialists",
    "per_device_eval_batch_size", "precompute_ref_batch_size", "precompute_ref_log_probs", "model_init_kwargs",
    "restore_callback_states_from_checkpoint", "overwrite_output_dir", "skip_memory_metrics", "prediction_loss_only",
}  # fmt: skip


def _digest(*parts: str | bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else part.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


@functools.cache
def _file_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_identity(source: str, revision: str | None = None) -> str:
    """What weights `source` stands for: `org/name@commit` for a Hub id, `name@sha256:…` for a folder's contents."""
    name, pinned = split_revision(source)
    revision = pinned or revision
    if os.path.isdir(name):
        files = sorted(path for path in Path(name).iterdir() if path.suffix in _WEIGHT_SUFFIXES and path.is_file())
        stats = [(str(path), path.stat()) for path in files]
        digests = [_file_digest(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return f"{Path(name).resolve().name}@sha256:{_digest(*digests)}"
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    for filename in ("config.json", "adapter_config.json"):
        try:
            path = cached_file(name, filename, revision=revision, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            path = None
        if path is not None:
            return f"{name}@{extract_commit_hash(path, None) or revision or 'main'}"
    return f"{name}@{revision or 'main'}"


def tokenizer_identity(tokenizer) -> str:
    """Hash of the vocabulary, its rules and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _digest(rules, str(tokenizer.chat_template), str(tokenizer.eos_token), str(tokenizer.pad_token))


def pairs_identity(dataset: Dataset) -> str:
    """Hash of the pairs of a dataset, in order."""
    return _digest(*dataset[PAIR_ID_COLUMN])


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {package: version(package) for package in _PACKAGES}


def relevant_arguments(*configs: Any) -> dict[str, Any]:
    """The fields of argument dataclasses that can change a trained number, as JSON types."""
    result = {}
    for config in configs:
        for field in dataclasses.fields(config):
            name = field.name
            if not field.init or name in _IRRELEVANT or name.startswith(_IRRELEVANT_PREFIXES):
                continue
            value = getattr(config, name)
            if isinstance(value, Enum):
                value = value.value
            if value is None or isinstance(value, (bool, int, float, str, list, dict)):
                result[name] = value
            elif dataclasses.is_dataclass(value):
                result[name] = str(value)
    return json.loads(json.dumps(result, default=str))


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field whose values differ, as (name, ours, theirs); versions are not compared."""
    for field in [*ours, *(field for field in theirs if field not in ours)]:
        if field != "versions" and ours.get(field) != theirs.get(field):
            return field, ours.get(field), theirs.get(field)
    return None


def check_fingerprint(ours: dict[str, Any], theirs: dict[str, Any], what: str, fix: str) -> None:
    """Raise an `AMAError` that names the first field that differs, both values and the fix."""
    difference = first_difference(ours, theirs)
    if difference is not None:
        field, our_value, their_value = difference
        raise AMAError(f"{what} made with {field}={their_value!r}, but this run has {field}={our_value!r}. {fix}")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AMAError(f"'{path}' is damaged ({error}). Delete it, and its stage is done again.") from error
