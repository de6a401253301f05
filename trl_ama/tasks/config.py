"""The preference tasks of a recipe: what `tasks:` may hold, and what a task may be called.

Nothing here imports `datasets`, which takes a second: every command's parser needs these classes, `--help` included.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from ..common.errors import AMAError, nearest, short
from ..common.limits import check_limits
from ..common.value_types import check_value
from ..common.yaml_files import load_yaml


# Task names become folder names, metric names and Hub config names
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Windows takes these for devices, also with an ending, and cannot hold a folder whose name ends in a dot
_NO_FOLDER = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.\..*|.*\.")


# To those who come from `trl dpo`, where a mixture may stream
NO_STREAMING = (
    "The pipeline scores every pair before it trains, so it loads its tasks without streaming; the reference losses that it "
    "makes can be streamed into AMATrainer."
)


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and bool(_TASK_NAME.fullmatch(name)) and not _NO_FOLDER.fullmatch(name)


def check_task_names(names: list[str]) -> None:
    """Raise an `AMAError` unless every name can be a folder name and no two are alike but for case."""
    if not names:
        raise AMAError("There are no tasks. List at least one under `tasks:`, or add rows to the dataset.")
    seen: dict[str, str] = {}
    for name in names:
        if not _is_folder_name(name):
            raise AMAError(
                f"Task name {short(name)} cannot be a folder name everywhere. Use 1 to 64 letters, digits, '_', '-' or '.', beginning "
                "with a letter or digit, and no name that Windows keeps for devices."
            )
        if seen.get(name.lower()) == name:
            raise AMAError(f"Two tasks are named {name!r}. Rename one, or leave one out.")
        if name.lower() in seen:
            raise AMAError(
                f"Task names {seen[name.lower()]!r} and {name!r} are alike on file systems that ignore case. Rename one."
            )
        seen[name.lower()] = name


def check_config_name(name: str) -> None:
    """Raise an `AMAError` unless a config (run) of a loss dataset can be called `name`: it becomes a folder there."""
    if not _is_folder_name(name):
        raise AMAError(
            f"losses_config {name!r} cannot be a folder name. Use 1 to 64 letters, digits, '_', '-' or '.', beginning with a "
            "letter or digit."
        )


@dataclass
class TaskConfig:
    """
    One task of the mixture: an entry of TRL's `datasets:` ([`~trl.scripts.utils.DatasetConfig`]) with a few more keys.

    Parameters:
        task (`str`):
            Name of the task; becomes a folder name and part of metric names.
        path (`str`, *optional*):
            Path or name of the dataset, as in [`~datasets.load_dataset`]. May be left out if the recipe's
            `reference_losses` hold the pairs.
        name, data_dir, data_files, revision, split:
            As in [`~datasets.load_dataset`]; `split` defaults to `"train"`.
        eval_split (`str`, *optional*):
            Split with the held-out pairs. Without it, `test_split_size` of the training pairs are held out.
        columns (`list[str]` or `dict[str, str]`, *optional*):
            Columns to keep, or a mapping from `prompt`, `chosen`, `rejected` to the dataset's own names.
        format (`str`, *optional*):
            `"hh_rlhf"` turns `"\\n\\nHuman: … \\n\\nAssistant: …"` transcripts into conversations, `"single_turn"` plain
            strings `prompt`, `chosen`, `rejected` into one user and one assistant message, `"json_messages"` reads messages
            out of columns that hold them as the text of a JSON list.
        chat_template_kwargs (`dict`, *optional*):
            What the chat template is given with every pair of the task, e.g. `{enable_thinking: false}`. A pair's own, in a
            column of that name, win. Also for files of `tasks_dir`.
        specialist (`str`, *optional*):
            A ready specialist (local folder, or Hub id with an optional `@revision`), which is then not trained.
        specialist_args (`dict`, *optional*):
            Training arguments of this task's specialist, on top of the recipe's `specialist_args`.
    """

    task: str
    path: str | None = None
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    revision: str | None = None
    split: str = "train"
    eval_split: str | None = None
    columns: list[str] | dict[str, str] | None = None
    format: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    specialist: str | None = None
    specialist_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_entry(cls, entry: Any) -> "TaskConfig":
        """Build from a YAML mapping, or from its text as the command line passes it.

        Raises:
            AMAError: If a key is unknown (the nearest is suggested) or one that is needed is missing.
        """
        if isinstance(entry, cls):
            return entry
        if isinstance(entry, str):
            try:
                entry = load_yaml(entry, f"The task {short(entry)}")
            except yaml.YAMLError:
                entry = None
        if not isinstance(entry, dict):
            raise AMAError(
                f"An entry of `tasks` must be a mapping like {{task: helpful, path: org/dataset}}, got {short(entry)}."
            )
        known = [field.name for field in fields(cls)]
        for key in entry:
            if key not in known:
                hints = {"fraction": " The mixing strategy sets the shares.", "streaming": f" {NO_STREAMING}"}
                hint = hints.get(key) or nearest(str(key), known)
                raise AMAError(
                    f"Unknown key '{key}' in task {short(entry.get('task', '?'))}; known are {known}.{hint}"
                )
        kwargs = entry.get("chat_template_kwargs")
        if kwargs is not None and not isinstance(kwargs, dict):
            raise AMAError(
                f"chat_template_kwargs of task {short(entry.get('task', '?'))} must be a mapping like {{enable_thinking: false}}, "
                f"got {short(kwargs)}."
            )
        columns = entry.get("columns")
        names = [*columns, *columns.values()] if isinstance(columns, dict) else columns
        for name in names if isinstance(names, list) else ():
            if not isinstance(name, str):
                raise AMAError(
                    f"columns of task {short(entry.get('task', '?'))} names {short(name)}, of type {type(name).__name__}. Columns have names "
                    "of text: columns: {prompt: question}, or a list of those to keep."
                )
        if not entry.get("task"):
            raise AMAError(
                f"An entry of `tasks` has no 'task'; found {short(entry)}. Every task needs 'task' and 'path'."
            )
        entry = {key: value for key, value in entry.items() if value is not None}  # `key:` with nothing is the default
        for key, value in entry.items():
            if key != "task":  # whose own check says more
                check_value(cls, key, value, f"Of task {short(entry['task'])},", parses_text=False)
        return cls(**entry)


@dataclass
class TaskMixtureConfig:
    r"""
    The preference tasks of a run.

    Parameters:
        tasks (`list`):
            The tasks; see [`TaskConfig`]. On the command line, each as inline YAML, replacing the recipe's list:
            `--tasks '{task: helpful, path: json, data_files: helpful.jsonl}' '{task: code, path: org/code}'`.
        tasks_dir (`str`, *optional*):
            Folder to read every task from instead: `<task>_train.*` and `<task>_test.*` (JSON lines, Parquet, CSV or TSV,
            possibly compressed), in TRL's preference format: `columns` and `format` do not apply. Points a recipe at local
            data without editing it.
        test_split_size (`float`, *optional*):
            Share of a task's training pairs to hold out if it has no `eval_split`.
        max_train_pairs, max_eval_pairs (`int`, *optional*):
            Keep at most that many pairs of each task, drawn with the run's seed.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Drop pairs of which an answer is empty, and say how many. By default they are an error, because in pairs of your own
            an empty answer is a mistake more often than not.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Drop pairs of which `max_length` would cut an answer, in training and evaluation, instead of training on the
            part that is left.
    """

    tasks: list[str] = field(
        default_factory=list, metadata={"help": "The preference tasks: a list of mappings (see `TaskConfig`)."}
    )
    tasks_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to read `<task>_train.*` and `<task>_test.*` from, instead of the recipe's paths."},
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of a task's pairs to hold out if it has no `eval_split`."}
    )
    max_train_pairs: int | None = field(
        default=None, metadata={"help": "Keep at most that many training pairs of each task."}
    )
    max_eval_pairs: int | None = field(
        default=None, metadata={"help": "Keep at most that many held-out pairs of each task."}
    )
    drop_empty: bool = field(
        default=False, metadata={"help": "Drop pairs without an answer, instead of ending with an error."}
    )
    drop_truncated: bool = field(
        default=False, metadata={"help": "Drop pairs of which `max_length` would cut an answer."}
    )

    def __post_init__(self):
        if not isinstance(self.tasks, list):
            raise AMAError(f"`tasks` must be a list of mappings, got {short(self.tasks)}.")
        self.tasks: list[TaskConfig] = [TaskConfig.from_entry(entry) for entry in self.tasks]
        if self.tasks:
            check_task_names([task.task for task in self.tasks])
        check_limits(vars(self), "Of the tasks,")
