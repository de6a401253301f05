"""What a user gives to train on: pairs of several tasks in memory or as streams, or pairs as `DPOTrainer` takes them."""

from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset, IterableDataset

from ..common.errors import AMAError
from ..reference_losses.columns import SPECIALIST_COLUMNS
from ..tasks.forms import PAIR_COLUMNS
from ..tasks.pairs import TASK_COLUMN, task_names_of, with_task_labels
from .config import AMAConfig
from .streams import StreamedTasks, is_streamed


logger = get_logger(__name__)

ONE_TASK = "all"  # the name of pairs that name no task
_AS_DPO = "proportional"


@dataclass
class TrainingPairs:
    """
    Args:
        dataset (`Dataset` or `IterableDataset`): What `DPOTrainer` is given; of streams by task, the first.
        task_names (`list[str]`): Names of the task numbers.
        column_names (`list[str]`): Columns that all pairs have.
        streams ([`StreamedTasks`], *optional*): The streams by task.
    """

    dataset: Dataset | IterableDataset
    task_names: list[str]
    column_names: list[str]
    streams: StreamedTasks | None = None

    @property
    def have_tasks(self) -> bool:
        """Whether the pairs name their tasks; if not, they are all of one."""
        return self.streams is not None or TASK_COLUMN in self.column_names

    @property
    def source(self) -> "Dataset | StreamedTasks | TrainingPairs":
        """What tells the columns of the whole and, in memory, their values."""
        return self.dataset if isinstance(self.dataset, Dataset) else self.streams or self


def training_pairs(train_dataset: Any, mixing: str | None, specialists: dict[str, Any] | None) -> TrainingPairs:
    """Find out what there is to train on.

    Args:
        train_dataset: What the user has given.
        mixing (`str`, *optional*): How tasks are to be mixed; `None` if nothing was said.
        specialists (`dict`, *optional*): Those that the user has given.

    Raises:
        AMAError: If the pairs' tasks cannot be told.
    """
    # Then tasks need not be told apart
    as_dpo = mixing in (None, _AS_DPO) and not specialists
    if isinstance(train_dataset, (Dataset, IterableDataset)) and as_dpo:
        in_order = isinstance(train_dataset, IterableDataset)
        columns = _columns_in_stream(train_dataset) if in_order else train_dataset.column_names
        if not {TASK_COLUMN, *SPECIALIST_COLUMNS} & set(columns):
            return TrainingPairs(train_dataset, [ONE_TASK], columns)
        if in_order and mixing is not None:
            return TrainingPairs(train_dataset, _names_in_order(train_dataset), columns)
    if is_streamed(train_dataset):
        streams = StreamedTasks(train_dataset)
        return TrainingPairs(streams.first, streams.names, streams.column_names, streams)
    names = task_names_of(train_dataset)
    labelled = with_task_labels(train_dataset, names)
    return TrainingPairs(labelled, names, labelled.column_names)


def _columns_in_stream(stream: IterableDataset) -> list[str]:
    """The columns of a stream's first row, which has to be a preference pair."""
    row = next(iter(stream), None)
    if row is None:
        raise AMAError("train_dataset streams no rows. Give it preference pairs.")
    lacking = [column for column in PAIR_COLUMNS[1:] if column not in row]
    if lacking:
        raise AMAError(
            f"train_dataset streams rows with the columns {list(row)}, which lack '{lacking[0]}'. Rename yours with "
            "`stream.rename_columns`."
        )
    return list(row)


def _names_in_order(stream: IterableDataset) -> list[str]:
    """The tasks of one stream that is read as it comes."""
    feature = (stream.features or {}).get(TASK_COLUMN)
    if not isinstance(feature, ClassLabel):
        raise AMAError(
            "train_dataset is one IterableDataset, whose tasks cannot be known without reading it whole (its 'task' column is no "
            "ClassLabel). Name them: `stream.cast_column('task', ClassLabel(names=[…]))`, or load it with such `features`. Or train "
            "without figures by task: `stream.remove_columns('task')`."
        )
    return list(feature.names)


def default_arguments(model_name: str, pairs: TrainingPairs) -> AMAConfig:
    """The arguments of a trainer that was given none: for one task those of `DPOTrainer`, as there is nothing to mix."""
    output_dir = f"{model_name.split('/')[-1]}-AMA"
    if len(pairs.task_names) > 1:
        return AMAConfig(output_dir)
    logger.warning_once(
        f"There is one task and no `args`, so AMATrainer trains as DPOTrainer does (mixing='{_AS_DPO}'). To balance several tasks, "
        "give every pair's in a 'task' column."
    )
    return AMAConfig(output_dir, mixing=_AS_DPO)
