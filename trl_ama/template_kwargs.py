"""What the chat template is given with a pair beside its messages, e.g. `enable_thinking`: of its task, or of its own."""

from typing import Any

from datasets import Dataset, Features, Json

from .errors import AMAError, short
from .task_config import TaskConfig


TEMPLATE_KWARGS = "chat_template_kwargs"  # a column that `DPOTrainer` knows


def with_template_kwargs(dataset: Dataset, task: TaskConfig) -> Dataset:
    """Give every pair the task's `chat_template_kwargs`; those that a pair has of its own win.

    Always as Json, which keeps of every row the keys that it has: in a column of mappings all rows have all keys, and to a
    template null is a value (`is defined` holds for it). A task's tokens must not depend on what the other tasks are.
    """
    is_text = not isinstance(dataset[0]["prompt"], list)
    if not task.chat_template_kwargs and (is_text or TEMPLATE_KWARGS not in dataset.column_names):
        return dataset
    if is_text:
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
        return {TEMPLATE_KWARGS: {**task.chat_template_kwargs, **_given(own)}}

    features = Features({**dataset.features, TEMPLATE_KWARGS: Json()})
    return dataset.map(
        add, with_indices=True, features=features, desc=f"Adding the chat_template_kwargs of {task.task}"
    )


def _given(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def unite_template_kwargs(parts: dict[str, dict[str, Dataset]]) -> None:
    """Give an empty `chat_template_kwargs` to tasks that have none where others have, in place; and all the same type."""
    every = [part for own in parts.values() for part in own.values()]
    types = {repr(part.features.get(TEMPLATE_KWARGS)) for part in every}
    if len(types) < 2 or any(isinstance(part[0]["prompt"], str) for part in every):
        return

    def only_given(row: dict[str, Any]) -> dict[str, Any]:
        return {TEMPLATE_KWARGS: _given(row.get(TEMPLATE_KWARGS))}

    for own in parts.values():
        for task, part in own.items():
            if not isinstance(part.features.get(TEMPLATE_KWARGS), Json):
                features = Features({**part.features, TEMPLATE_KWARGS: Json()})
                own[task] = part.map(only_given, features=features, desc=f"Reading the chat_template_kwargs of {task}")
