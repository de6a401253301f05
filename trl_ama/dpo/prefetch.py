"""The next batch is made ready while the device runs this one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ..fast_path.collating import PairBatch


Item = TypeVar("Item")
Result = TypeVar("Result")


def works_ahead(device: torch.device) -> bool:
    """Whether it pays to make batches ready in a thread: a CPU that runs the model has no core to spare for it."""
    return device.type != "cpu"


def one_ahead(items: Iterable[Item], prepare: Callable[[Item], Result]) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Each item with what waits for its `prepare`, which one thread has begun when the item before it was given out.

    An error of `prepare` is raised where its result is asked for, so after all that came before it was used. Closing the generator
    ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
    try:
        before = None
        for item in items:
            waiting = item, pool.submit(prepare, item).result
            if before is not None:
                yield before
            before = waiting
        if before is not None:
            yield before
    finally:
        pool.shutdown(cancel_futures=True)


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in page-locked memory, from which a GPU copies without anybody's waiting."""
    if isinstance(batch, PairBatch):
        return batch.pin_memory()
    return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}
