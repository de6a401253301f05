"""Fingerprints: what decided a number, as plain values. Equal fingerprints, equal log-probs."""

import functools
import hashlib
import math
from importlib.metadata import version
from typing import Any

from .errors import AMAError


_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets")

# Fields of training arguments that split an optimizer step, and the number that stands for them in a fingerprint
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
PAIRS_PER_STEP = "pairs_per_step"
DEVICE = "device"  # the kind of device that computed in 16 bits: `"cpu"`, `"cuda"`; trl-ama 0.1 did not note it


def digest(*parts: str | bytes) -> str:
    """16 digits of a hash of the parts, in order."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else part.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return dict(_package_versions())


@functools.cache  # a run asks for every task in every stage, and they are read from the disk
def _package_versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field whose values differ, as (name, ours, theirs); versions and places of data are not compared."""
    for field in [*ours, *(field for field in theirs if field not in ours)]:
        our_value, their_value = ours.get(field), theirs.get(field)
        if field in ("versions", "data") or _weights(our_value) == _weights(their_value):
            continue
        if field == DEVICE and None in (our_value, their_value):  # of one of them it is not known
            continue
        if isinstance(our_value, dict) and isinstance(their_value, dict):
            inner = first_difference(our_value, their_value)
            if inner is None:
                continue
            field, our_value, their_value = f"{field}.{inner[0]}", *inner[1:]
        return field, our_value, their_value
    return None


def _weights(value: Any) -> Any:
    """Of a folder's identity the hash of its weights, as folders are renamed and copied; any other value as it is."""
    if isinstance(value, str) and "@sha256:" in value:
        return value.partition("@")[2]
    return {key: _weights(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def check_fingerprint(ours: dict[str, Any], theirs: dict[str, Any], what: str, fix: str) -> None:
    """Raise an `AMAError` that names the first field that differs, both values and the fix."""
    if PAIRS_PER_STEP in ours and set(SPLIT) <= set(theirs):  # as trl-ama 0.1 noted it, which knew one process
        theirs = {PAIRS_PER_STEP: math.prod(theirs[name] for name in SPLIT), **theirs}
        theirs = {name: value for name, value in theirs.items() if name not in SPLIT}
    difference = first_difference(ours, theirs)
    if difference is not None:
        field, our_value, their_value = difference
        if field == "base_model" and "@sha256:" not in str(their_value):
            fix = f"A commit of the base model is pinned with model_revision. {fix}"
        if field.rpartition(".")[2] == DEVICE:
            fix = (
                "In 16 bits, log-probs of a CPU and of a GPU differ by as much as a small excess, and in 32 they agree: run on the kind of "
                f"device that made them, or make them again on this one. {fix}"
            )
        raise AMAError(f"{what} made with {field}={their_value!r}, but this run has {field}={our_value!r}. {fix}")
