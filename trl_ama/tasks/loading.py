"""Loads the tasks of a recipe into one train and one held-out dataset, in TRL's preference format."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import common_prefix_length

from ..common.errors import AMAError, nearest, sentence
from .account import EMPTY, HELD_OUT, LIMITS, TRUNCATED, RowAccount
from .config import TaskConfig, TaskMixtureConfig, check_task_names
from .exact_texts import load_texts
from .features import unite_features, with_prompts
from .formats import own_format, warn_of_unread
from .forms import EXTRA_COLUMNS, PAIR_COLUMNS, says_something
from .image_tokens import image_pair_ids
from .images import check_places, image_folders, is_about_images, read_images
from .json_messages import refuse_json_text
from .local_files import cannot_load, check_text, exact_source, files_of
from .no_tasks import no_tasks
from .pairs import add_pair_ids, concatenate_tasks
from .rows import check_rows
from .template_kwargs import with_template_kwargs


_SPLITS = {"train": "train", "test": "held-out"}  # in messages


@dataclass
class LoadedTasks:
    """What [`read_tasks`] returns.

    Parameters:
        pairs (`DatasetDict`): As [`load_tasks`] returns them.
        commits (`dict[str, str]`): Task → commit of its dataset, of those that came from the Hub.
        accounts (`dict[str, dict[str, RowAccount]]`): Task → split → which rows were read, and what became of them.
    """

    pairs: DatasetDict
    commits: dict[str, str] = field(default_factory=dict)
    accounts: dict[str, dict[str, RowAccount]] = field(default_factory=dict)

    def dropped(self, is_one: Callable[[str], bool]) -> dict[str, dict[str, int]]:
        """Task → split → rows that were dropped for such reasons, only where there were any."""
        found = {
            task: {
                split: sum(count for reason, count in own.dropped.items() if is_one(reason))
                for split, own in splits.items()
            }
            for task, splits in self.accounts.items()
        }
        found = {task: {split: count for split, count in counts.items() if count} for task, counts in found.items()}
        return {task: counts for task, counts in found.items() if counts}

    @property
    def empty(self) -> dict[str, dict[str, int]]:
        """Task → split → rows that hold no pair: without an answer, or broken in what their `format` says."""
        return self.dropped(lambda reason: reason not in (TRUNCATED, HELD_OUT, *LIMITS.values()))

    @property
    def truncated(self) -> dict[str, dict[str, int]]:
        """The same of pairs that `fits` refused."""
        return self.dropped(lambda reason: reason == TRUNCATED)


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
    return read_tasks(config, seed, fits, ready).pairs


def read_tasks(
    config: TaskMixtureConfig,
    seed: int = 0,
    fits: Callable[[dict], bool] | None = None,
    ready: Mapping[str, Mapping[str, Dataset]] | None = None,
) -> LoadedTasks:
    """As [`load_tasks`], with what is worth knowing of where the pairs came from and what was dropped."""
    if not config.tasks:
        raise no_tasks(config)
    check_task_names([task.task for task in config.tasks])
    loaded = LoadedTasks(DatasetDict())
    parts: dict[str, dict[str, Dataset]] = {"train": {}, "test": {}}
    for task in config.tasks:
        for split, part in _load_task(task, config, seed, fits, (ready or {}).get(task.task), loaded).items():
            parts[split][task.task] = part
    places = [(split, task) for split, own in parts.items() for task in own]
    # Of both splits at once: they are published as one dataset
    united = unite_features([parts[split][task] for split, task in places], [task for _, task in places])
    for (split, task), part in zip(places, united, strict=True):
        parts[split][task] = part
    for split, own in parts.items():
        if own:
            # The same ClassLabel in both splits, also when only some tasks have held-out pairs
            named = {
                task: add_pair_ids(part, f"The {_SPLITS[split]} pairs of task '{task}'") for task, part in own.items()
            }
            loaded.pairs[split] = concatenate_tasks(named, names=list(parts["train"]))
    return loaded


def _load_task(
    task: TaskConfig,
    config: TaskMixtureConfig,
    seed: int,
    fits: Callable[[dict], bool] | None,
    ready: Mapping[str, Dataset] | None,
    loaded: LoadedTasks,
) -> dict[str, Dataset]:
    """A task's pairs by split; what else is found goes into `loaded`."""
    accounts = loaded.accounts[task.task] = {}
    if ready is not None:
        parts = {split: ready[split] for split in ("train", "test") if ready.get(split) is not None}
        accounts |= {split: RowAccount(task.task, split, len(part)) for split, part in parts.items()}
    else:
        parts = _read_splits(task, config, loaded)
        for split, part in parts.items():
            kept = _with_answers(part, task, split, config.drop_empty)
            if config.drop_empty:
                accounts[split].drop(EMPTY, len(part) - len(kept))
            folders = image_folders(task, config.tasks_dir)
            kept = read_images(_preference_columns(kept, task), task.task, _SPLITS[split], folders)
            check_places(kept, task.task, _SPLITS[split])
            parts[split] = with_template_kwargs(kept, task)
        if "test" not in parts and config.test_split_size is not None:
            parts = _held_out(parts["train"], task, config.test_split_size, seed)
            accounts["test"] = RowAccount(task.task, "test", len(parts["test"]))
            accounts["train"].drop(HELD_OUT, len(parts["test"]))
    if fits is not None:
        rows = {split: len(part) for split, part in parts.items()}
        parts = {
            split: part.filter(fits, desc=f"Dropping pairs of {task.task} that would be cut")
            for split, part in parts.items()
        }
        for split, part in parts.items():
            accounts[split].drop(TRUNCATED, rows[split] - len(part))
        if len(parts["train"]) == 0:
            raise AMAError(
                f"None of the {rows['train']} pairs of task '{task.task}' fits into max_length, and drop_truncated is on. Raise "
                "max_length, or turn drop_truncated off."
            )
    for split, limit in (("train", config.max_train_pairs), ("test", config.max_eval_pairs)):
        if split in parts:
            if limit is not None:
                accounts[split].drop(LIMITS[split], max(0, len(parts[split]) - limit))
            parts[split] = _at_most(parts[split], limit, seed)
            accounts[split].close(len(parts[split]))
    return {split: part for split, part in parts.items() if len(part)}


def _read_splits(task: TaskConfig, config: TaskMixtureConfig, loaded: LoadedTasks) -> dict[str, Dataset]:
    """`train` and, if the task names its held-out pairs, `test`; with the columns that the preference format wants.

    Opens their accounts in `loaded`.
    """
    accounts = loaded.accounts[task.task]
    parts = {}
    if config.tasks_dir is not None:
        for split, (loader, path) in files_of(task, Path(config.tasks_dir)).items():
            parts[split], _ = _load_split(task, split, path=loader, data_files={split: path})
            accounts[split] = RowAccount(task.task, split, len(parts[split]))
            refuse_json_text(parts[split], task.task, _SPLITS[split], formats=False)
        return parts
    if task.path is None:
        raise AMAError(
            f"Task '{task.task}' has no 'path', and no `reference_losses` hold its pairs. Every task needs 'task' and 'path'."
        )
    source = {key: getattr(task, key) for key in ("path", "name", "data_dir", "data_files", "revision")}
    for split, name in (("train", task.split), ("test", task.eval_split)):
        if name:
            rows, commit = _load_split(task, name, **source)
            accounts[split] = RowAccount(task.task, split, len(rows))
            parts[split] = own_format(rows, task, _SPLITS[split], accounts[split])
            if commit and split == "train":
                loaded.commits[task.task] = commit
    return parts


def _held_out(dataset: Dataset, task: TaskConfig, share: float, seed: int) -> dict[str, Dataset]:
    held_out = math.ceil(share * len(dataset))  # as `train_test_split` rounds
    if not 0 < held_out < len(dataset):
        raise AMAError(
            f"test_split_size {share} of the {len(dataset)} pairs of task '{task.task}' leaves none to train on. Give the task more pairs, or "
            "an `eval_split`."
        )
    return dict(dataset.train_test_split(test_size=share, seed=seed))


def _at_most(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or len(dataset) <= count:
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def _load_split(task: TaskConfig, split: str, **source: Any) -> tuple[Dataset, str | None]:
    """The rows of a split, and the commit that they are of."""
    where = source.get("data_files") or source["path"]
    check_text(task, source)
    source = exact_source(task, {key: value for key, value in source.items() if value is not None})
    try:
        dataset, commit = load_texts(split, **source)
    except AMAError as error:
        raise AMAError(f"Task '{task.task}': {error}") from error
    except Exception as error:  # load_dataset raises a dozen kinds; all mean that this entry cannot be read
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        coding = " Save the file as UTF-8." if isinstance(cause, UnicodeDecodeError) else ""
        raise cannot_load(task, split, where, sentence(cause) + coding) from error
    if len(dataset) == 0:
        raise AMAError(f"Task '{task.task}' has no rows in split '{split}'. Remove the task, or choose another split.")
    return dataset, commit


def _with_answers(dataset: Dataset, task: TaskConfig, split: str, drop_empty: bool) -> Dataset:
    """The pairs of which both answers say something.

    Raises:
        AMAError: If there are no answers' columns, a pair lacks an answer and `drop_empty` is off, or all do.
    """
    sides = ("chosen", "rejected")
    for column in sides:
        if column not in dataset.column_names:
            raise AMAError(
                f"Task '{task.task}' has no column '{column}'; found {dataset.column_names}.{nearest(column, dataset.column_names)} "
                "Name the dataset's own columns with `columns: {prompt: …, chosen: …, rejected: …}`."
            )
    check_rows(dataset, task.task, _SPLITS[split])
    answers = dataset.select_columns(list(sides))
    kept = [row for row, pair in enumerate(answers) if all(says_something(pair[side]) for side in sides)]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        raise AMAError(
            f"Task '{task.task}' has no pair with two answers in its {len(dataset)} rows of split '{split}'. Check its `columns`."
        )
    if not drop_empty:
        row = next((number for number, found in enumerate(kept) if number != found), len(kept))
        first = ", ".join(f"{side}={_short(answers[row][side])}" for side in sides)
        raise AMAError(
            f"Task '{task.task}' has pairs without an answer: {len(dataset) - len(kept)} of {len(dataset)} in split '{split}', "
            f"the first in row {row} ({first}). Set `drop_empty: true` to leave such pairs out, or mend them."
        )
    return dataset.select(kept)


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"…{text[-most:]}"  # of a conversation the answer is the end


def _preference_columns(dataset: Dataset, task: TaskConfig) -> Dataset:
    """Bring one task into TRL's preference format with an explicit prompt; what messages hold stays as it is."""
    warn_of_unread(dataset.column_names, task.task)
    if "prompt" not in dataset.column_names:
        dataset = with_prompts(dataset, task.task)
    return dataset.select_columns([*PAIR_COLUMNS, *(name for name in EXTRA_COLUMNS if name in dataset.column_names)])


def fits_into(processor: PreTrainedTokenizerBase | ProcessorMixin, max_length: int) -> Callable[[dict], bool]:
    """Whether `max_length` tokens hold a pair whole, both answers, as `DPOTrainer` will render it."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def fits(row: dict) -> bool:
        if is_about_images(row):
            prompt, *answers = map(len, image_pair_ids(processor, row).values())
            return prompt + max(answers) <= max_length
        return all(len(_tokens(tokenizer, row, side)) <= max_length for side in ("chosen", "rejected"))

    return fits


def prompt_fits_into(processor: PreTrainedTokenizerBase | ProcessorMixin, max_length: int) -> Callable[[dict], bool]:
    """Whether a pair's prompt leaves room for an answer; `DPOTrainer` drops the pairs whose prompt does not."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def fits(row: dict) -> bool:
        if is_about_images(row):
            return len(image_pair_ids(processor, row)["prompt_ids"]) < max_length
        prompt = _tokens(tokenizer, row)
        # As in DPOTrainer: an answer begins where it and the prompt alone part
        shared = (common_prefix_length(prompt, _tokens(tokenizer, row, side)) for side in ("chosen", "rejected"))
        return min(shared) < max_length

    return fits


def _tokens(tokenizer: PreTrainedTokenizerBase, row: dict, side: str | None = None) -> list[int]:
    """The tokens of a pair's prompt, and of one of its answers after it, as `DPOTrainer` makes them."""
    text = row["prompt"] if side is None else row["prompt"] + row[side]
    if isinstance(text, str):
        end = "" if side is None or text.endswith(tokenizer.eos_token or "") else tokenizer.eos_token
        return tokenizer(text + end)["input_ids"]
    tools = row.get("tools")
    try:
        return tokenizer.apply_chat_template(
            text,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=side is None,
            tokenize=True,
            return_dict=True,
            **(row.get("chat_template_kwargs") or {}),
        )["input_ids"]
    except Exception as error:  # a template is a program, which fails in its own ways
        raise AMAError(
            f"The chat template of '{tokenizer.name_or_path}' cannot render a pair: {type(error).__name__}: {sentence(error)} "
            "Use a model with another template, or give the pairs in the format that it expects."
        ) from error
