"""The version of trl-ama, and those of the files that trl-ama writes and reads again: an older one is read, a newer one is refused by name."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import AMAError
from .run_folder import FINGERPRINT_FILE, RESULTS_FILE, SHARDS_FILE, STAGE_FILE, STATE_FILE


try:
    __version__ = version("trl-ama")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

# Raised when a file of today would be misread by the release before. A field that readers may do without raises nothing.
# The first releases wrote no version into `stage.json`, `results.json` and the shards' `run.json`: that is version 1.
VERSIONS = {
    STATE_FILE: 1,  # the mixing state in it
    "ama_progress": 1,  # in it, too
    STAGE_FILE: 1,
    RESULTS_FILE: 1,
    SHARDS_FILE: 1,  # of shards, and of a run's page
    FINGERPRINT_FILE: 2,
    "ama_merge.json": 1,
}
OLDEST = {FINGERPRINT_FILE: 2}  # version 1 lacks the files' hashes, without which nothing is trusted


def is_newer(name: str, content: dict[str, Any]) -> bool:
    """Whether a file of this name was written by a trl-ama that is newer than this one; others have no version."""
    number = content.get("version", 1)
    return type(number) is int and number > VERSIONS.get(name, number)


def is_known(name: str, content: dict[str, Any]) -> bool:
    """Whether the content of a file, whose name is a key of `VERSIONS`, is of a version that this trl-ama reads."""
    number = content.get("version", 1)
    return type(number) is int and OLDEST.get(name, 1) <= number <= VERSIONS[name]


def check_version(path: "str | Path", content: Any, fix: str) -> None:
    """Raise an `AMAError` unless a file's content can be read.

    Args:
        path (`str` or `Path`): The file, whose name is a key of `VERSIONS`.
        content (`Any`): Its JSON.
        fix (`str`): What to do beside an update, e.g. `"delete it, and its stage is done again"`.
    """
    name = Path(path).name
    if not isinstance(content, dict):
        raise AMAError(f"'{path}' is damaged: it holds a {type(content).__name__} and no mapping. To mend it, {fix}.")
    if not is_known(name, content):
        number, ours = content.get("version", 1), VERSIONS[name]
        update = "Update trl-ama, or" if is_newer(name, content) else "To mend it,"
        raise AMAError(f"'{path}' is of version {number!r:.40}, this trl-ama reads version {ours}. {update} {fix}.")
