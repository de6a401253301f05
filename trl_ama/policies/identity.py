"""What a model, a tokenizer or an adapter is, whatever it is called and wherever it lies: hashes of what decides its numbers."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..common.errors import AMAError
from ..common.files import file_digest, read_json
from ..common.fingerprint import digest
from ..common.hub import split_revision
from .files import hub_commit


_WEIGHT_STEMS = ("model", "pytorch_model", "adapter_model")  # not the training_args.bin beside them
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Keys of config.json and adapter_config.json that say where a model was or what wrote it
_NOT_THE_MODEL = {"base_model_name_or_path", "_name_or_path", "transformers_version", "peft_version", "inference_mode"}
_SHA256 = re.compile("[0-9a-f]{64}")
_INDEX = "model.safetensors.index.json"


def _file_hash(path: Path) -> str:
    """SHA-256 of a file; of a large file in the Hub's cache it is the name that the Hub has given it."""
    place = path.resolve()
    return place.name if place.parent.name == "blobs" and _SHA256.fullmatch(place.name) else file_digest(path)


def _weight_digest(folder: Path) -> str:
    """Hash of a model folder's weights and of the settings that decide what is computed with them."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.name.startswith(_WEIGHT_STEMS) and path.is_file()):
        if path.suffix in _WEIGHT_SUFFIXES:
            parts.append(_file_hash(path))
    for name in ("config.json", "adapter_config.json"):
        config = read_json(folder / name) or {}
        parts.append(json.dumps({key: config[key] for key in sorted(config) if key not in _NOT_THE_MODEL}))
    return digest(*parts)


def model_identity(source: str, revision: str | None = None) -> str:
    """What weights `source` stands for: `org/name@commit` for a Hub id, `name@sha256:…` for a folder's contents.

    Raises:
        AMAError: If there is no such repository or revision, or it can neither be reached nor is cached.
    """
    name, pinned = split_revision(source)
    if os.path.isdir(name):
        return f"{Path(name).resolve().name}@sha256:{_weight_digest(Path(name))}"
    return f"{name}@{hub_commit(name, pinned or revision)}"


def weights_identity(name: str, revision: str | None) -> str | None:
    """Hash of a model's weights, wherever they are: equal for a Hub repository and a copy of it. `None` if they are not here.

    Args:
        name (`str`): Folder or Hub id; it does not matter if `revision` is a hash.
        revision (`str`, *optional*): Of a Hub id; or the `sha256:…` that [`model_identity`] noted of a folder.
    """
    if revision is not None and revision.startswith("sha256:"):
        return revision.removeprefix("sha256:")
    if os.path.isdir(name):
        return _weight_digest(Path(name))
    try:
        config = try_to_load_from_cache(name, "config.json", revision=hub_commit(name, revision))
    except (AMAError, HFValidationError):
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    names = {path.name for path in folder.iterdir()} if folder is not None else set()
    index = read_json(folder / _INDEX) if _INDEX in names else {"weight_map": {"": "model.safetensors"}}
    needed = set(index.get("weight_map", {"": ""}).values())
    return _weight_digest(folder) if needed <= names else None


def tokenizer_identity(processor: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """Hash of the vocabulary, its rules and the chat template; of a processor also of what it does to images."""
    if isinstance(processor, ProcessorMixin):
        settings = {key: value for key, value in processor.to_dict().items() if key not in _NOT_THE_MODEL}
        rules = json.dumps(settings, sort_keys=True, default=str)
        return digest(tokenizer_identity(processor.tokenizer), str(processor.chat_template), rules)
    tokenizer = processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return digest(rules, str(tokenizer.chat_template), str(tokenizer.eos_token), str(tokenizer.pad_token))
