"""Loads the tasks of a recipe into one train and one held-out dataset, in TRL's preference format."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from .errors import AMAError, first_line
from .pair_rows import check_rows
from .task_config import TaskConfig, TaskMixtureConfig, check_task_names
from .task_formats import own_format
from .tasks import EXTRA_COLUMNS, PAIR_COLUMNS, add_pair_ids, concatenate_tasks


_LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_tasks(
    config: TaskMixtureConfig,
    seed: int = 0,
    fits: Callable[[dict], bool] | None = None,
    ready: Mapping[str, Mapping[str, Dataset]] | None = None,
) -> DatasetDict:
    """Load every task and concatenate them.

    Args:
        config ([`TaskMixtureConfig`]): The tasks of the recipe.
        seed (`int`): Seed of the held-out split and of the subsets, where the recipe asks for them.
        fits (`Callable`, *optional*): Says of a pair whether to keep it; see [`fits_into`].
        ready (`Mapping`, *optional*): Task → split → pairs, of tasks that have no `path`: `train` and, if any, `test`, with
            the columns of this function's result but `task`.

    Returns:
        `DatasetDict` with `train` and, if any task has held-out pairs, `test`; columns `prompt`, `chosen`, `rejected`,
        `pair_id` and `task` (a ClassLabel in the recipe's order).

    Raises:
        AMAError: If there are no tasks, one cannot be read, has no rows, or lacks the preference columns; or if a row is no
            preference pair.
    """
    if not config.tasks:
        raise AMAError("There are no tasks. List at least one under `tasks:` in the recipe, or pass `--tasks`.")
    return load_tasks_and_commits(config, seed, fits, ready)[0]


def load_tasks_and_commits(
    config: TaskMixtureConfig,
    seed: int = 0,
    fits: Callable[[dict], bool] | None = None,
    ready: Mapping[str, Mapping[str, Dataset]] | None = None,
) -> tuple[DatasetDict, dict[str, str]]:
    """As [`load_tasks`], and for each task that came from the Hub the commit of its dataset."""
    if not config.tasks:
        raise AMAError("There are no tasks. List at least one under `tasks:` in the recipe, or pass `--tasks`.")
    check_task_names([task.task for task in config.tasks])
    train, test, commits = {}, {}, {}
    for task in config.tasks:
        parts = _load_task(task, config, seed, fits, (ready or {}).get(task.task))
        train[task.task], held_out, commits[task.task] = parts
        if held_out is not None:
            test[task.task] = held_out
    splits = {"train": concatenate_tasks(train)}
    if test:
        # The same ClassLabel in both splits, also when only some tasks have held-out pairs
        splits["test"] = concatenate_tasks(test, names=list(train))
    return DatasetDict(splits), {task: commit for task, commit in commits.items() if commit}


def _commit(dataset: Dataset) -> str | None:
    """The commit of the Hub dataset that a dataset was just loaded from: `datasets` names the folder in its cache by it."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent
        if _COMMIT.fullmatch(folder.name) and "___" in str(folder):
            return folder.name
    return None


def _load_task(
    task: TaskConfig,
    config: TaskMixtureConfig,
    seed: int,
    fits: Callable[[dict], bool] | None,
    ready: Mapping[str, Dataset] | None,
) -> tuple[Dataset, Dataset | None, str | None]:
    commit = None
    if ready is not None:
        train, test = ready["train"], ready.get("test")
    elif config.tasks_dir is not None:
        loader, files = _local_files(task, Path(config.tasks_dir))
        train = _load_split(task, "train", path=loader, data_files={"train": files["train"]})
        test = _load_split(task, "test", path=loader, data_files={"test": files["test"]}) if "test" in files else None
    elif task.path is None:
        raise AMAError(
            f"Task '{task.task}' has no 'path', and no `reference_losses` hold its pairs. Every task needs 'task' and 'path'."
        )
    else:
        source = {key: getattr(task, key) for key in ("path", "name", "data_dir", "data_files", "revision")}
        train = _load_split(task, task.split, **source)
        test = _load_split(task, task.eval_split, **source) if task.eval_split else None
        commit = _commit(train)
        train, test = (
            part if part is None else own_format(part, task, split)
            for part, split in ((train, "train"), (test, "held-out"))
        )
    if ready is None:
        train, test = (
            part if part is None else _preference_columns(part, task, split)
            for part, split in ((train, "train"), (test, "held-out"))
        )
    if test is None and ready is None and config.test_split_size is not None:
        halves = train.train_test_split(test_size=config.test_split_size, seed=seed)
        train, test = halves["train"], halves["test"]
    if fits is not None:
        rows = len(train)
        train, test = (
            part if part is None else part.filter(fits, desc=f"Dropping pairs of {task.task} that would be cut")
            for part in (train, test)
        )
        if len(train) == 0:
            raise AMAError(
                f"None of the {rows} pairs of task '{task.task}' fits into max_length, and drop_truncated is on. Raise "
                "max_length, or turn drop_truncated off."
            )
        test = None if test is None or len(test) == 0 else test
    train = _at_most(train, config.max_train_pairs, seed)
    test = None if test is None else add_pair_ids(_at_most(test, config.max_eval_pairs, seed))
    return add_pair_ids(train), test, commit


def _at_most(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or len(dataset) <= count:
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def _local_files(task: TaskConfig, folder: Path) -> tuple[str, dict[str, str]]:
    files, loader = {}, None
    for split in ("train", "test"):
        for path in sorted(folder.glob(f"{task.task}_{split}.*")):
            suffix = next((part for part in reversed(path.suffixes) if part in _LOCAL_FORMATS), None)
            if suffix is not None:
                files[split], loader = str(path), _LOCAL_FORMATS[suffix]
                break
    if "train" not in files:
        raise AMAError(
            f"tasks_dir '{folder}' has no file for task '{task.task}'; looked for '{task.task}_train' with one of "
            f"{list(_LOCAL_FORMATS)}, possibly compressed."
        )
    return loader, files


def _load_split(task: TaskConfig, split: str, **source: Any) -> Dataset:
    try:
        dataset = load_dataset(split=split, **{key: value for key, value in source.items() if value is not None})
    except Exception as error:  # load_dataset raises a dozen kinds; all mean that this entry cannot be read
        where = source.get("data_files") or source["path"]
        raise AMAError(
            f"Task '{task.task}' cannot be loaded: split '{split}' of {where!r}: {first_line(error)} Check `path`, `data_files` and "
            "`split` of the task, or point it at local files with --tasks_dir."
        ) from error
    if len(dataset) == 0:
        raise AMAError(f"Task '{task.task}' has no rows in split '{split}'. Remove the task, or choose another split.")
    return dataset


def _preference_columns(dataset: Dataset, task: TaskConfig, split: str) -> Dataset:
    """Bring one task into TRL's preference format with an explicit prompt."""
    for column in ("chosen", "rejected"):
        if column not in dataset.column_names:
            raise AMAError(
                f"Task '{task.task}' has no column '{column}'; found {dataset.column_names}. Name the dataset's own columns "
                "with `columns: {chosen: …, rejected: …}`."
            )
    check_rows(dataset, task.task, split)
    for row, example in enumerate(dataset.select_columns(["chosen", "rejected"])):
        if any(not _answer(example[side]).strip() for side in ("chosen", "rejected")):
            raise AMAError(
                f"Task '{task.task}' has a pair without an answer (row {row}: chosen={example['chosen']!r}, "
                f"rejected={example['rejected']!r}). Drop such rows."
            )
    if "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt, desc=f"Extracting the prompts of {task.task}")
    extra = [column for column in EXTRA_COLUMNS if column in dataset.column_names]
    dataset = dataset.select_columns([*PAIR_COLUMNS, *extra])
    if isinstance(dataset[0]["prompt"], list) and dataset[0]["prompt"]:
        dataset = _plain_messages(dataset)
    return dataset


def _answer(completion: str | list[dict[str, Any]] | None) -> str:
    """The text of a completion; of a conversation, its last message's."""
    if isinstance(completion, list):
        content = completion[-1]["content"] if completion else ""
        return content if isinstance(content, str) else str(content or "")
    return completion or ""


def _plain_messages(dataset: Dataset) -> Dataset:
    """Keep role and content of messages, so that tasks with other message keys can be concatenated."""

    def strip(row):
        return {
            column: [{"role": message["role"], "content": message["content"]} for message in row[column]]
            for column in PAIR_COLUMNS
        }

    features = dict(dataset.features)
    plain = List({"role": Value("string"), "content": Value("string")})
    if all(features[column] == plain for column in PAIR_COLUMNS) or not isinstance(
        dataset[0]["prompt"][0]["content"], str
    ):
        return dataset
    # The features are given because a message's other keys would otherwise stay, empty
    return dataset.map(strip, features=Features({**features, **dict.fromkeys(PAIR_COLUMNS, plain)}))


def fits_into(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[dict], bool]:
    """Whether `max_length` tokens hold a pair whole, both answers, as `DPOTrainer` will render it."""

    def fits(row: dict) -> bool:
        return all(_tokens(tokenizer, row, row["prompt"] + row[side]) <= max_length for side in ("chosen", "rejected"))

    return fits


def prompt_fits_into(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[dict], bool]:
    """Whether a pair's prompt leaves room for an answer; `DPOTrainer` drops the pairs whose prompt does not."""

    def fits(row: dict) -> bool:
        return _tokens(tokenizer, row, row["prompt"], is_prompt=True) < max_length

    return fits


def _tokens(tokenizer: PreTrainedTokenizerBase, row: dict, text: str | list, is_prompt: bool = False) -> int:
    if isinstance(text, str):
        ends = not is_prompt and not text.endswith(tokenizer.eos_token or "")  # DPOTrainer adds the token
        return len(tokenizer(text)["input_ids"]) + ends
    tools = row.get("tools")
    try:
        return len(
            tokenizer.apply_chat_template(
                text,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                add_generation_prompt=is_prompt,
                tokenize=True,
                return_dict=True,
                **(row.get("chat_template_kwargs") or {}),
            )["input_ids"]
        )
    except Exception as error:  # a template is a program, which fails in its own ways
        raise AMAError(
            f"The chat template of '{tokenizer.name_or_path}' cannot render a pair: {type(error).__name__}: {first_line(error)} "
            "Use a model with another template, or give the pairs in the format that it expects."
        ) from error
