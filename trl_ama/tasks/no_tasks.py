"""What to say where a recipe has no tasks: with `tasks_dir`, which ones its files would make."""

import os
import re

from ..common.errors import AMAError
from .config import TaskMixtureConfig


_SHOWN = 8
_FILE = re.compile(r"(?P<task>.+)_train(?:\.\w+)*\.(?:jsonl?|parquet|csv|tsv)(?:\.\w+)?", re.IGNORECASE)


def no_tasks(config: TaskMixtureConfig) -> AMAError:
    """The error for a recipe that names no tasks.

    Args:
        config ([`TaskMixtureConfig`]): The recipe's part about tasks.
    """
    folder = config.tasks_dir
    if folder is None:
        return AMAError("There are no tasks. List at least one under `tasks:` in the recipe, or pass `--tasks`.")
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        return AMAError(
            f"There are no tasks, and tasks_dir '{folder}' cannot be read ({error.strerror}). Name a folder of pairs, and the tasks in it "
            "under `tasks:` in the recipe."
        )
    found = list(dict.fromkeys(match["task"] for name in names if (match := _FILE.fullmatch(name))))
    if found:
        entries = ", ".join(f"{{task: {task}}}" for task in found)
        return AMAError(
            f"There are no tasks: tasks_dir says where their files are, and `tasks` which ones to take. '{folder}' holds files of "
            f"{_words(found)}; for all of them, set `tasks: [{entries}]` in the recipe."
        )
    held = f"holds {_words(names)}" if names else "is empty"
    return AMAError(
        f"There are no tasks, and tasks_dir '{folder}' {held}. Name the files of a task `<task>_train.jsonl` and `<task>_test.jsonl` (or "
        "Parquet, CSV), and list the tasks under `tasks:` in the recipe."
    )


def _words(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more
