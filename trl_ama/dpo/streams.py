"""What a user gives to stream tasks from: what it must be, what is refused, and what is checked row by row."""

import copy
import json
import math
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from trl import DPOTrainer

from ..common.errors import AMAError, short
from ..mixing import MixingStrategy
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, TOKEN_COLUMNS
from ..sampling.streams import TaskStreams
from ..tasks.config import check_task_names
from ..tasks.forms import PAIR_COLUMNS, TEMPLATE_KWARGS
from ..tasks.pairs import TASK_COLUMN
from ..tasks.rows import check_pair
from .checks import kept_tokens
from .config import AMAConfig


logger = get_logger(__name__)

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_AS_DICT = (
    "Give AMATrainer a stream per task: train_dataset={'helpful': stream, …}; of a stream that holds all tasks, "
    "{'helpful': stream.filter(lambda row: row['task'] == 'helpful'), …}."
)


def is_streamed(train_dataset: Any) -> bool:
    """Whether training pairs are to be streamed: one `IterableDataset`, or a dict of tasks."""
    return isinstance(train_dataset, (IterableDataset, dict))


class StreamedTasks:
    """The tasks' streams as they were given, of each of which one row was read.

    Args:
        train_dataset (`dict` or [`~datasets.IterableDataset`]): Task → stream; or one stream whose `task` is a `ClassLabel`,
            which each task then reads by itself.

    Attributes:
        names (`list[str]`): The tasks.
        column_names (`list[str]`): Columns that all tasks have.

    Raises:
        AMAError: If these are no streams of preference pairs, or none that can be resumed.
    """

    def __init__(self, train_dataset: Any):
        given = _by_task(train_dataset) if isinstance(train_dataset, IterableDataset) else _streams_in(train_dataset)
        self.names = list(given)
        check_task_names(self.names)
        # Streams of one source share its objects, where it notes how far it was read
        self._streams = {name: _own_copy(stream, name) for name, stream in given.items()}
        self._kinds: dict[str, str | None] = {}
        columns = {name: self._first_columns(name) for name in self.names}
        self.column_names = [
            column for column in columns[self.names[0]] if all(column in own for own in columns.values())
        ]
        for name, own in columns.items():
            extra = [column for column in LOGP_COLUMNS if column in own and column not in self.column_names]
            if extra:
                other = next(name for name, own in columns.items() if extra[0] not in own)
                raise AMAError(
                    f"Task '{name}' streams the column '{extra[0]}', and task '{other}' does not. Give all tasks their reference "
                    "losses, or none."
                )

    def _first_columns(self, name: str) -> list[str]:
        stream = self._streams[name]
        row = next(iter(stream), None)
        if row is None:
            raise AMAError(f"Task '{name}' streams no rows. Give it preference pairs, or leave the task out.")
        if not isinstance(row, dict):
            raise AMAError(
                f"Task '{name}', row 0 of its stream is {short(row)}, of type {type(row).__name__}. A row is a mapping with prompt, chosen "
                "and rejected."
            )
        lacking = [column for column in PAIR_COLUMNS[1:] if column not in row]
        if lacking:
            raise AMAError(
                f"Task '{name}' streams rows with the columns {list(row)}, which lack '{lacking[0]}'. Rename yours with "
                "`stream.rename_columns`; reference losses stream their texts if they were made with include_text."
            )
        if "image" in row or "images" in row:
            raise AMAError(f"Task '{name}' streams images, and only text can be streamed. Load it without streaming.")
        self._kinds[name] = check_pair(
            {column: row[column] for column in PAIR_COLUMNS if column in row}, f"Task '{name}', row 0"
        )
        return list(row)

    @property
    def first(self) -> IterableDataset:
        """The first task's stream, for code that only looks at what pairs look like."""
        return self._streams[self.names[0]]

    def prepared(self, trainer: DPOTrainer) -> TaskStreams:
        """The streams as the trainer's dataset: rows checked, then tokenised by `DPOTrainer`, when they are read."""
        args = trainer.args
        trainer._set_signature_columns_if_needed()
        kept = {*trainer._signature_columns} if args.remove_unused_columns else None
        needed = [column for column in LOGP_COLUMNS if column in self.column_names]

        def keep(name: str, row: dict[str, Any]) -> dict[str, Any]:
            _check_token_counts(f"task '{name}'", row, args)
            held = row if kept is None else {column: value for column, value in row.items() if column in kept}
            return {**held, **{column: np.array(row[column], dtype=np.int32) for column in _IDS}}

        streams = {}
        for name, stream in self._streams.items():
            checked = stream.map(
                _checked,
                with_indices=True,
                fn_kwargs={"task": name, "tasks": self.names, "kind": self._kinds[name], "needed": needed},
            )
            streams[name] = trainer._prepare_dataset(checked, trainer.processing_class, args, "train")
        seed = args.data_seed if args.data_seed is not None else args.seed
        block = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return TaskStreams(streams, args.streaming_buffer, seed, args.max_steps * block, keep)


# ---- What is given ----


def _streams_in(tasks: dict[str, Any]) -> dict[str, IterableDataset]:
    if isinstance(tasks, (IterableDatasetDict, DatasetDict)):
        raise AMAError(
            f"train_dataset is a {type(tasks).__name__} with the splits {list(tasks)}. Give one split, or a plain dict from "
            "tasks to their streams."
        )
    for name, stream in tasks.items():
        if not isinstance(stream, (IterableDataset, Dataset)):
            raise AMAError(
                f"train_dataset maps '{name}' to a {type(stream).__name__}, and a task is a datasets.IterableDataset. {_AS_DICT}"
            )
    if tasks and all(isinstance(stream, Dataset) for stream in tasks.values()):
        raise AMAError(
            f"train_dataset is a dict, and all of its tasks {list(tasks)} are in memory. Concatenate them into one Dataset with "
            "a 'task' column; a dict is for tasks that are streamed."
        )
    return {
        name: stream.to_iterable_dataset() if isinstance(stream, Dataset) else stream for name, stream in tasks.items()
    }


def _by_task(stream: IterableDataset) -> dict[str, IterableDataset]:
    """Each task's rows of a stream that holds all: every one of them reads it by itself."""
    feature = (stream.features or {}).get(TASK_COLUMN)
    if not isinstance(feature, ClassLabel):
        raise AMAError(
            "train_dataset is one IterableDataset, whose tasks cannot be known without reading it whole (its 'task' column is "
            f"no ClassLabel). {_AS_DICT}"
        )
    return {
        name: stream.filter(_is_of, fn_kwargs={"number": number, "name": name})
        for number, name in enumerate(feature.names)
    }


def _is_of(row: dict[str, Any], number: int, name: str) -> bool:
    if row[TASK_COLUMN] is None:
        raise AMAError(
            "train_dataset streams a row whose 'task' is empty. Name the task of every row, or drop those rows."
        )
    return row[TASK_COLUMN] in (number, name)


def _own_copy(stream: IterableDataset, name: str) -> IterableDataset:
    """The same stream with a position of its own, and plain Python values.

    Raises:
        AMAError: If the stream is shuffled, or is a process's share of another.
    """
    if stream._distributed is not None:
        raise AMAError(
            f"Task '{name}' streams one process's share of a dataset, and every process must read all of it, as AMATrainer "
            "shares out each step's pairs. Leave out `split_dataset_by_node`."
        )
    return IterableDataset(
        _copied(stream._ex_iterable, name),
        info=stream.info,
        split=stream.split,
        token_per_repo_id=stream._token_per_repo_id,
    )


def _copied(source: Any, name: str) -> Any:
    """A copy of what a stream reads from, down to its sources: each of these objects notes how far it was read."""
    if isinstance(source, BufferShuffledExamplesIterable):
        raise AMAError(
            f"Task '{name}' streams a shuffled dataset, whose buffer is lost when a run is resumed. Leave out `.shuffle()`: "
            "AMATrainer shuffles within windows of `streaming_buffer` pairs. (For another order of files, list them so.)"
        )
    source = copy.copy(source)
    if hasattr(source, "ex_iterable"):
        source.ex_iterable = _copied(source.ex_iterable, name)
    if hasattr(source, "ex_iterables"):
        source.ex_iterables = [_copied(part, name) for part in source.ex_iterables]
    return source


# ---- Row by row ----


def _checked(
    row: dict[str, Any], index: int, task: str, tasks: list[str], kind: str | None, needed: list[str]
) -> dict[str, Any]:
    """A row that is a preference pair of its task, or an `AMAError` that says which one is not.

    Args:
        row (`dict`), index (`int`): A row of the stream, and its number there.
        task (`str`), tasks (`list[str]`): Its task, and all tasks.
        kind (`str`): Of the first row: plain text, or messages.
        needed (`list[str]`): The log-prob columns that it must have.
    """
    where = f"Task '{task}', row {index} of its stream"
    pair = {column: row[column] for column in PAIR_COLUMNS if column in row}
    ours = check_pair(pair, where)
    lacking = [column for column in PAIR_COLUMNS[1:] if pair.get(column) is None]
    if lacking:
        raise AMAError(f"{where} has no '{lacking[0]}'. Drop such rows.")
    if ours != kind:
        raise AMAError(
            f"{where} is {ours}, but its first row is {kind}. Bring all rows into one form: all strings, or all lists of "
            "{role, content}."
        )
    if row.get(TASK_COLUMN) in tasks and row[TASK_COLUMN] != task:
        raise AMAError(
            f"{where} says that it is of task '{row[TASK_COLUMN]}'. Give each task a stream of its own rows."
        )
    _check_finite(row, needed, where)
    if TEMPLATE_KWARGS not in row:
        return {}
    kwargs = row[TEMPLATE_KWARGS]
    if isinstance(kwargs, str):  # JSON in a dataset of reference losses
        try:
            kwargs = json.loads(kwargs)
        except ValueError:
            pass
    if not isinstance(kwargs or {}, dict):
        raise AMAError(
            f"{where}: {TEMPLATE_KWARGS} is {short(kwargs)}, of type {type(kwargs).__name__}. Give a mapping like "
            '{"enable_thinking": false}, or leave the column out.'
        )
    return {TEMPLATE_KWARGS: kwargs or {}}


def _check_finite(row: dict[str, Any], columns: list[str], where: str) -> None:
    for column in columns:
        value = row.get(column)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AMAError(
                f"{where}: '{column}' is missing or not finite ({value}). Compute the reference losses again with "
                "`trl ama-losses`, or drop such pairs."
            )


def _check_token_counts(whose: str, row: dict[str, Any], args: AMAConfig) -> None:
    """As `check_token_counts` of a dataset in memory, of one row."""
    for column, ids in zip(TOKEN_COLUMNS, _IDS[1:], strict=True):
        if row.get(column) is None:
            continue
        ours = kept_tokens(len(row["prompt_ids"]), len(row[ids]), args.max_length, args.truncation_mode)
        if ours != row[column]:
            raise AMAError(
                f"The log-probs of {whose} were summed over other tokens: '{column}' of a pair is {row[column]}, and this "
                f"run's tokenisation has {ours}. Use the tokenizer, chat template and max_length that the reference losses were "
                "made with, or compute them again with `trl ama-losses`."
            )


def checked_losses(stream: IterableDataset, columns: list[str], args: AMAConfig) -> IterableDataset:
    """A prepared stream whose log-probs are looked at when they are read, pair by pair.

    Args:
        stream ([`~datasets.IterableDataset`]): Tokenised pairs.
        columns (`list[str]`): What was found in the first of them.
        args ([`AMAConfig`]): Says how answers are cut.
    """
    needed = [column for column in LOGP_COLUMNS if column in columns]
    return (
        stream.map(_with_checked_losses, with_indices=True, fn_kwargs={"needed": needed, "args": args})
        if needed
        else stream
    )


def _with_checked_losses(row: dict[str, Any], index: int, needed: list[str], args: AMAConfig) -> dict[str, Any]:
    _check_finite(row, needed, f"train_dataset, row {index} of its stream")
    _check_token_counts("train_dataset's stream", row, args)
    return {}


# ---- What goes with streams ----


def stream_arguments(
    args: AMAConfig, strategy: MixingStrategy, has_reference: bool, has_specialist: bool, specialists: Any
) -> AMAConfig:
    """The arguments with which streams are read.

    Raises:
        AMAError: If an argument needs the number of pairs, or all of them at once.
    """
    if args.max_steps <= 0:
        raise AMAError(
            "A stream has no length, so max_steps must say how many optimizer steps to train (num_train_epochs cannot). Set "
            "max_steps in AMAConfig."
        )
    if not strategy.uses_own_sampler or (args.mixing == "ama_r" and args.sampling == "proportional"):
        setting = f"mixing='{args.mixing}'" if not strategy.uses_own_sampler else "sampling='proportional'"
        raise AMAError(
            f"{setting} draws in proportion to the tasks' numbers of pairs, which streams by task do not tell. Use mixing='ama_s', "
            "'ama_r' with sampling='uniform', or 'uniform'; load the tasks without streaming; or, with mixing='proportional', give "
            "one stream of all of them, which is read as it comes."
        )
    if specialists is not None and not has_specialist:
        raise AMAError(
            "Specialists score all pairs before training, and streams are not read whole. Compute their losses with "
            "`trl ama-losses` and stream that dataset, or load the tasks without streaming."
        )
    if args.precompute_ref_log_probs and not has_reference:
        raise AMAError(
            f"precompute_ref_log_probs goes over all pairs before training, and streams are not read whole. Turn it off, or "
            f"stream pairs with the columns {list(REFERENCE_COLUMNS)}."
        )
    if args.dataloader_num_workers == 0:
        return args
    logger.warning(
        f"dataloader_num_workers={args.dataloader_num_workers} is taken as 0: of a stream, each worker process would be given "
        "its own files and no other."
    )
    args = copy.copy(args)  # the caller's stays as it is
    args.dataloader_num_workers, args.dataloader_prefetch_factor, args.dataloader_persistent_workers = 0, None, False
    return args
