"""Tasks that are read as streams, so that nothing holds a whole dataset.

A draw is a task and a number: the how-manieth pair of that task it is, over the whole run. Which pair that is follows from
the stream, the seed and `streaming_buffer` alone: the stream is read in windows of so many pairs, and each is shuffled by a
random stream of its own. So draws, and what is saved of them, are numbers, as those of a dataset in memory are, and every
process can find the pairs of its share by itself. A task that fits into one window is drawn exactly as if it were in memory.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from torch.utils.data import Dataset

from ..common.errors import AMAError, first_line
from ..mixing import MixingStrategy
from ..tasks.pairs import TASK_COLUMN
from .sampler import BlockSampler, shuffle_stream


@dataclass(frozen=True)
class Window:
    """Where a window of a task's stream begins, and what was found there.

    Args:
        first (`int`): Number of its first draw: pairs before it, over all passes.
        task_pass (`int`): The pass over the stream that it lies in.
        number (`int`): Its number within the pass.
        position (`dict`, *optional*): The stream's own name for the place, JSON types; `None` for its beginning.
        digest (`str`, *optional*): Hash of its pairs, once they were read.
    """

    first: int = 0
    task_pass: int = 0
    number: int = 0
    position: dict[str, Any] | None = None
    digest: str | None = None


class TaskStream:
    """One task's pairs by the number of their draw; holds one window of them.

    Args:
        name (`str`): Of the task, for messages.
        number (`int`): Of the task.
        stream ([`~datasets.IterableDataset`]): Prepared pairs; this object's own, as reading moves its position.
        buffer (`int`): Pairs of a window.
        seed (`int`): Seed of the shuffling.
        keep (`Callable`): Makes of a row what is held of it.
    """

    def __init__(
        self,
        name: str,
        number: int,
        stream: IterableDataset,
        buffer: int,
        seed: int,
        keep: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        self._name, self._number = name, number
        self._stream = stream
        self._buffer, self._seed = buffer, seed
        self._keep = keep
        self._begun: deque[Window] = deque()  # those that a resumed run may have to begin with
        self._close()

    def _close(self) -> None:
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._window = Window()
        self._rows: list[dict[str, Any]] = []
        self._order = np.arange(0)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """The pair of draw number `draw`. Reads on from where the last one was, or again if it was later."""
        if not self._rows or draw < self._window.first:
            self._open(self._window_before(draw))
        while draw >= self._window.first + len(self._rows):
            self._open_next()
        row = self._rows[self._order[draw - self._window.first]]
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()}

    def _window_before(self, draw: int) -> Window:
        """The last known window that begins at or before a draw."""
        return next((window for window in reversed(self._begun) if window.first <= draw), Window())

    def _open(self, window: Window) -> None:
        self._begun = deque(other for other in self._begun if other.first < window.first)
        self._go_to(window.position)
        if not self._read(window):
            raise AMAError(
                f"The stream of task '{self._name}' gives no pairs at {self._place(window)}: it is empty or shorter than it "
                "was, or all of its prompts fill max_length. Give it its pairs back, raise max_length, or leave the task out."
            )

    def _open_next(self) -> None:
        first = self._window.first + len(self._rows)
        following = Window(first, self._window.task_pass, self._window.number + 1, self._stream.state_dict())
        if not self._read(following):  # the pass has ended
            self._open(Window(first, self._window.task_pass + 1))

    def _go_to(self, position: dict[str, Any] | None) -> None:
        self._stream.load_state_dict(position)
        self._iterator = iter(self._stream)

    def _read(self, window: Window) -> bool:
        """Hold the next pairs as those of `window`; `False` if there are none."""
        rows: list[dict[str, Any]] = []
        try:
            for row in islice(self._iterator, self._buffer):
                rows.append(self._keep(row))
        except BaseException as error:
            self._close()  # the iterator is spent; what comes next begins at a window that is known
            if not isinstance(error, Exception) or isinstance(error, (AMAError, OSError, MemoryError)):
                if not isinstance(error, AMAError):
                    error.add_note(f"While reading the stream of task '{self._name}', {self._place(window)}.")
                raise
            raise AMAError(  # of the source's format, or of the chat template, which is a program
                f"The stream of task '{self._name}' cannot be read on after {len(rows)} pairs of {self._place(window)} "
                f"({type(error).__name__}: {first_line(error)}). Mend or drop that row, or use a model whose chat template takes it."
            ) from error
        if not rows:
            return False
        digest = _digest(rows)
        if window.digest not in (None, digest):
            self._close()
            raise AMAError(
                f"The stream of task '{self._name}' gives other pairs at {self._place(window)} than when the checkpoint was "
                "written, so the run cannot be continued exactly. A stream must give the same pairs in the same order each "
                "time; resume with the same data, tokenizer and max_length, or start a new output_dir."
            )
        self._window, self._rows = replace(window, digest=digest), rows
        self._order = np.arange(len(rows))
        later = [window.number] if window.number else []  # the first window is shuffled as a pass in memory is
        shuffle_stream(self._seed, self._number, window.task_pass, *later).shuffle(self._order)
        self._begun.append(self._window)
        return True

    def _place(self, window: Window) -> str:
        return f"pass {window.task_pass}, window {window.number}"

    def forget(self, draw: int) -> None:
        """Forget the windows that no draw from `draw` on lies in."""
        while len(self._begun) > 1 and self._begun[1].first <= draw:
            self._begun.popleft()

    def state_dict(self, draw: int) -> dict[str, Any]:
        """The window to begin with in order to read draw number `draw`, as JSON types."""
        return dict(vars(self._window_before(draw)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin with a window that `state_dict` returned."""
        self._close()
        self._begun = deque([Window(**state)])


def _digest(rows: list[dict[str, Any]]) -> str:
    hasher = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = row[key]
            if isinstance(value, np.ndarray):
                hasher.update(f"{key} {len(value)} ".encode())
                hasher.update(value.tobytes())
            elif isinstance(value, (str, int, float)):
                hasher.update(f"{key} {value!r} ".encode())
    return hasher.hexdigest()[:16]


class TaskStreams(Dataset):
    """The tasks' streams as a dataset whose indices are draws: task k's draw number n of K tasks has the index n K + k.

    Args:
        streams (`dict[str, IterableDataset]`): Task → prepared pairs.
        buffer (`int`): Pairs of a window.
        seed (`int`): Seed of all draws.
        length (`int`): Draws of the whole run.
        keep (`Callable`): Task and row → what is held of the row.
    """

    def __init__(
        self,
        streams: dict[str, IterableDataset],
        buffer: int,
        seed: int,
        length: int,
        keep: Callable[[str, dict[str, Any]], dict[str, Any]],
    ):
        self.buffer, self.seed = buffer, seed
        self._length = length
        self._streams = [
            TaskStream(name, number, stream, buffer, seed, lambda row, name=name: keep(name, row))
            for number, (name, stream) in enumerate(streams.items())
        ]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, task = divmod(index, len(self._streams))
        return {**self._streams[task][draw], TASK_COLUMN: task}

    def index(self, task: int, draw: int) -> int:
        """The index of a task's draw."""
        return draw * len(self._streams) + task

    def forget(self, draws: list[int]) -> None:
        """Forget what no draw from `draws` on needs. # (k,)"""
        for stream, draw in zip(self._streams, draws, strict=True):
            stream.forget(draw)

    def state_dict(self, draws: list[int]) -> list[dict[str, Any]]:
        """Where each task's stream has to be read from in order to continue at `draws`. # (k,)"""
        return [stream.state_dict(draw) for stream, draw in zip(self._streams, draws, strict=True)]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Read on from where a `state_dict` says."""
        for stream, window in zip(self._streams, state, strict=True):
            stream.load_state_dict(window)


class StreamSampler(BlockSampler):
    """Yields indices of [`TaskStreams`]; the whole run is one epoch, as a stream has no length.

    Args:
        streams ([`TaskStreams`]): What is drawn from.
        strategy, block_size: As in [`BlockSampler`].
        num_steps (`int`): Optimizer steps of the run.
    """

    def __init__(self, streams: TaskStreams, strategy: MixingStrategy, block_size: int, num_steps: int):
        super().__init__(strategy, block_size, streams.seed, num_steps * block_size)
        self._streams = streams

    def take(self, task: int) -> int:
        return self._streams.index(task, self.cursors[task])

    def _untrained(self) -> list[int]:
        """The number of each task's first draw that was not trained on. # (k,)"""
        first = np.array(self.cursors)
        for block in self.ahead:
            first -= np.bincount(np.array(block.indices) % len(first), minlength=len(first))
        return first.tolist()

    def pop_trained(self) -> np.ndarray:
        probabilities = super().pop_trained()
        self._streams.forget(self._untrained())
        return probabilities

    def must_equal(self) -> dict[str, Any]:
        # Not the length: a run may be given more steps
        return {"seed": self.seed, "block_size": self.block_size, "buffer": self._streams.buffer}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "buffer": self._streams.buffer,
            "streams": self._streams.state_dict(self._untrained()),
        }

    def load_state_dict(self, state: dict[str, Any], skips_data: bool = True) -> None:
        super().load_state_dict(state, skips_data)
        self._streams.load_state_dict(state["streams"])
