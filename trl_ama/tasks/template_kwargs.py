"""What the chat template is given with a pair beside its messages, e.g. `enable_thinking`: of its task, or of its own."""

from typing import Any

from datasets import Dataset, Features, Json

from ..common.errors import AMAError, short
from .config import TaskConfig
from .exact_json import exact_json
from .forms import TEMPLATE_KWARGS, without_nulls


def with_template_kwargs(dataset: Dataset, task: TaskConfig) -> Dataset:
    """Give every pair the task's `chat_template_kwargs`; those that a pair has of its own win.

    Always as Json, which keeps of every row the keys that it has: in a column of mappings all rows have all keys, and to a
    template null is a value (`is defined` holds for it). A task's tokens must not depend on what the other tasks are.
    """
    if not task.chat_template_kwargs and TEMPLATE_KWARGS not in dataset.column_names:
        return dataset
    if task.chat_template_kwargs and not isinstance(dataset[0]["prompt"], list):
        raise AMAError(
            f"Task '{task.task}' sets chat_template_kwargs, but its pairs are plain text, which no chat template is applied to. "
            "Leave the key out, or bring the pairs into messages, e.g. with `format: single_turn`."
        )

    def add(row: dict[str, Any], number: int) -> dict[str, Any]:
        own = row.get(TEMPLATE_KWARGS)
        if own is not None and not isinstance(own, dict):
            raise AMAError(
                f"Task '{task.task}', row {number}: {TEMPLATE_KWARGS} is {short(own)}, of type {type(own).__name__}. Give a mapping like "
                '{"enable_thinking": false}, or leave the column out.'
            )
        given = {**task.chat_template_kwargs, **without_nulls(own or {})}
        try:
            return {TEMPLATE_KWARGS: exact_json(given)}
        except ValueError:
            raise AMAError(
                f"Task '{task.task}', row {number}: {TEMPLATE_KWARGS} hold what JSON cannot: {short(given)} Make it a string."
            ) from None

    features = Features({**dataset.features, TEMPLATE_KWARGS: Json()})
    return dataset.map(
        add, with_indices=True, features=features, desc=f"Adding the chat_template_kwargs of {task.task}"
    )
