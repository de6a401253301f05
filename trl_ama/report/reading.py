"""The files of a run's folder, read without trust and without torch: what cannot be read is named, the rest is shown."""

import json
import re
from pathlib import Path
from typing import Any

from ..common.run_folder import RunFolder
from ..common.versions import is_newer


_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")


class RunReader:
    """Reads the files of a run's folder and collects what is to be said about those that cannot be read.

    Args:
        folder ([`RunFolder`]): Where they are.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.missing: list[str] = []

    def json(self, path: Path) -> dict[str, Any]:
        """A file's JSON object; an empty one if there is none, it is damaged, or of a version that is not known."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            self.missing.append(f"{path.relative_to(self.folder.path)} is damaged and was left out.")
            return {}
        if is_newer(path.name, content):
            self.missing.append(
                f"{path.relative_to(self.folder.path)} is of version {content['version']:.3g}, newer than this trl-ama, and was left out."
            )
            return {}
        return content


def parts(folder: Path) -> dict[str, Path]:
    """The folders within a folder, by name. Names in files are looked up here and never joined to a path."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return {}
    return {path.name: path for path in paths if path.is_dir() and not path.name.startswith(".")}


def as_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def as_names(value: Any) -> list[str]:
    """The texts of a JSON list, each once."""
    return list(dict.fromkeys(name for name in value if isinstance(name, str))) if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """`value` if it is a number that can be drawn."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
        return value
    return None


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the last checkpoint of a training; `None` if there is none."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return max(found, default=None)


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` → value."""
    result = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        result.update(flat(entry, f"{name}.") if isinstance(entry, dict) and entry else {name: entry})
    return result
