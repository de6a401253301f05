"""Draws tasks by the mixing strategy's probabilities, and pairs within a task without replacement.

Draws happen in blocks of one optimizer step, whatever the micro-batch, so that a step's pairs share one p and the draws
do not depend on how the step is split. Loaders read ahead: a block is therefore kept, with its p, from the moment it is
drawn until the trainer says that it was trained on, and those blocks are part of the state.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..common.errors import AMAError
from ..mixing import MixingStrategy


# Salts that keep the two kinds of random streams of one seed apart
_ALLOCATION_STREAM, _SHUFFLE_STREAM = 0, 1
# Fields of a state, as messages call them; only streams have a buffer
_NAMES = {
    "seed": "seed",
    "length": "number of training pairs",
    "block_size": "pairs per optimizer step",
    "buffer": "streaming_buffer",
}
_CHUNK = 1 << 18  # rows; bounds the memory that counting and sorting need beside their results


def shuffle_stream(seed: int, task: int, task_pass: int, *window: int) -> np.random.Generator:
    """The random stream that shuffles a pass over a task's rows, or a later window of a streamed pass."""
    return np.random.default_rng([_SHUFFLE_STREAM, seed, task, task_pass, *window])


@dataclass
class Block:
    """The draws of one optimizer step: row numbers, and the p that they were drawn with."""

    indices: list[int]
    probabilities: list[float]


def count_tasks(task_ids: np.ndarray, num_tasks: int) -> np.ndarray:
    """Number of rows of each task. # (k,)"""
    # In pieces, because `bincount` copies what it may not write to, and a column in Arrow's memory is read-only
    pieces = (task_ids[first : first + _CHUNK] for first in range(0, len(task_ids), _CHUNK))
    return sum((np.bincount(piece, minlength=num_tasks) for piece in pieces), np.zeros(num_tasks, dtype=np.int64))


class _RowsByTask:
    """The row numbers of each task in ascending order, as little of them in memory as there can be.

    Args:
        task_ids (`np.ndarray`): Task of each row. # (N,)
        num_tasks (`int`): k.
    """

    def __init__(self, task_ids: np.ndarray, num_tasks: int):
        self.sizes = count_tasks(task_ids, num_tasks)
        self._dtype = np.min_scalar_type(max(len(task_ids) - 1, 0))
        changes = task_ids[1:] != task_ids[:-1]
        # Concatenated datasets hold each task in one piece: then its first row says it all, and nothing grows with N
        self._is_grouped = np.count_nonzero(changes) + 1 == np.count_nonzero(self.sizes)
        if self._is_grouped:
            firsts = np.concatenate([[0], np.flatnonzero(changes) + 1])
            self._firsts = np.zeros(len(self.sizes), dtype=np.int64)
            self._firsts[task_ids[firsts]] = firsts
        else:
            self._firsts = np.cumsum(self.sizes) - self.sizes
            self._order = self._sorted(task_ids)

    def _sorted(self, task_ids: np.ndarray) -> np.ndarray:
        """Row numbers by task: a counting sort, in chunks to save memory. # (N,)"""
        order = np.empty(len(task_ids), dtype=self._dtype)
        ends = self._firsts.copy()
        small = np.min_scalar_type(len(self.sizes) - 1)  # numpy sorts 8 and 16 bits in linear time
        for first in range(0, len(task_ids), _CHUNK):
            chunk = task_ids[first : first + _CHUNK].astype(small)
            counts = np.bincount(chunk, minlength=len(self.sizes))
            shifts = ends - (np.cumsum(counts) - counts)  # from places in the chunk's order to places in `order`
            order[np.arange(len(chunk)) + np.repeat(shifts, counts)] = np.argsort(chunk, kind="stable") + first
            ends += counts
        return order

    def copy_of(self, task: int) -> np.ndarray:
        """A task's rows, to keep. # (n_i,)"""
        first, last = self._firsts[task], self._firsts[task] + self.sizes[task]
        return np.arange(first, last, dtype=self._dtype) if self._is_grouped else self._order[first:last].copy()


class BlockSampler(Sampler[int]):
    """What samplers of tasks share: blocks, what is drawn ahead of training, and the state.

    Every process of a distributed run holds the same sampler in the same state and draws the same rows; Accelerate's
    shards split them. Subclasses say in `take` what a draw of a task yields.

    Args:
        strategy ([`MixingStrategy`]): Asked for its probabilities before each block.
        block_size (`int`): Pairs of one optimizer step, over all micro-batches and processes.
        seed (`int`): Seed of all draws.
        length (`int`): Draws of an epoch.
        epoch_draws (`int`, *optional*): Draws of an epoch that reach the trainer; less than `length` when the last,
            incomplete batch is dropped.

    Attributes:
        seed, block_size: As given.
        cursors (`list[int]`): Pairs taken of each task, over all its passes. # (k,)
        ahead (`deque[Block]`): Blocks that were drawn and not yet trained on.

    Raises:
        AMAError: If `block_size` is not positive.
    """

    def __init__(
        self, strategy: MixingStrategy, block_size: int, seed: int, length: int, epoch_draws: int | None = None
    ):
        if block_size < 1:
            raise AMAError(f"block_size is the number of pairs of an optimizer step, got {block_size}.")
        self._strategy = strategy
        self.block_size = block_size
        self.seed = seed
        self._length = length
        self._epoch_draws = self._length if epoch_draws is None else epoch_draws
        self._blocks_drawn = 0  # over the whole run: the counter of the allocation's random stream
        self.cursors = [0] * strategy.num_tasks
        self.ahead: deque[Block] = deque()
        self._trained_draws = 0  # of this epoch
        self._resume_at: int | None = None
        # Its first block, which several processes repeat where the epoch's end is uneven
        self._epoch_start: list[int] = []

    @abstractmethod
    def take(self, task: int) -> int:
        """What draw number `self.cursors[task]` of a task yields."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        """Yield an epoch's rows. After `load_state_dict`, first stand-ins for what the trainer will skip."""
        if self._resume_at is None:
            self.ahead.clear()  # what a dropped last batch left over
            self._trained_draws = 0
            position = 0
        else:
            # `skip_first_batches` throws these away unread: row 0 stands in for the rows that were trained on
            position, self._resume_at = self._resume_at, None
            yield from islice(chain(self._epoch_start, repeat(0)), position)
            for block in list(self.ahead):
                position = self._begin_block(block, position)
                yield from block.indices
        while position < self._length:
            block = self._draw(min(self.block_size, self._length - position))
            self.ahead.append(block)
            position = self._begin_block(block, position)
            yield from block.indices

    def _begin_block(self, block: Block, position: int) -> int:
        """Where in the epoch a block that begins at `position` ends."""
        if position == 0:
            self._epoch_start = list(block.indices)
        return position + len(block.indices)

    def pop_trained(self) -> np.ndarray:
        """Forget the oldest block, because its step is done, and return the p that it was drawn with. # (k,)"""
        block = self.ahead.popleft()
        self._trained_draws += len(block.indices)
        return np.asarray(block.probabilities)

    def _draw(self, size: int) -> Block:
        probabilities = self._strategy.probabilities()
        rng = np.random.default_rng([_ALLOCATION_STREAM, self.seed, self._blocks_drawn])
        self._blocks_drawn += 1
        # Systematic allocation: one uniform shift of an even grid. Each task gets size * p_i draws, rounded up or down
        # so that the expectation is exact, with far less variance than independent draws.
        grid = (rng.random() + np.arange(size)) / size
        tasks = np.searchsorted(np.cumsum(probabilities), grid, side="right").clip(max=len(probabilities) - 1)
        rng.shuffle(tasks)  # else every micro-batch would hold a single task
        rows = tasks.tolist()
        for place, task in enumerate(rows):
            rows[place] = self.take(task)
            self.cursors[task] += 1
        return Block(rows, probabilities.tolist())

    def state_dict(self) -> dict[str, Any]:
        """State at the head of the draws plus the blocks drawn ahead and not yet trained on, as JSON types."""
        return {
            "seed": self.seed,
            "length": self._length,
            "block_size": self.block_size,
            "blocks_drawn": self._blocks_drawn,
            "cursors": list(self.cursors),
            "trained_draws": self._trained_draws,
            "epoch_start": list(self._epoch_start),
            "ahead": [dict(vars(block)) for block in self.ahead],
        }

    def must_equal(self) -> dict[str, Any]:
        """What a state must have been written with to be continued."""
        return {"seed": self.seed, "length": self._length, "block_size": self.block_size, "buffer": None}

    def load_state_dict(self, state: dict[str, Any], skips_data: bool = True) -> None:
        """Continue from a `state_dict`: the next `__iter__` goes on where training stopped.

        Args:
            state (`dict`): What `state_dict` returned.
            skips_data (`bool`): Whether the trainer skips the batches it already trained on, as the Trainer does unless
                `ignore_data_skip` is set.

        Raises:
            AMAError: If the data, the seed or the pairs per optimizer step are not those of the state.
        """
        for field, value in self.must_equal().items():
            if state.get(field) != value:
                raise AMAError(
                    f"The checkpoint was written with {_NAMES[field]} {state.get(field)}, this run has {value}, so its draws "
                    "cannot be continued. Resume with the same settings and data, or start a new output_dir."
                )
        self._blocks_drawn = state["blocks_drawn"]
        self.cursors = list(state["cursors"])
        self._trained_draws = state["trained_draws"]
        self._epoch_start = list(state.get("epoch_start", ()))  # not in the states of trl-ama 0.1
        self.ahead = deque(Block(**block) for block in state["ahead"])
        if self._trained_draws >= self._epoch_draws:  # the checkpoint was written at an epoch's end
            self._resume_at = None
        else:
            if not skips_data:  # the trainer begins this epoch's count anew
                self._trained_draws = 0
            self._resume_at = self._trained_draws


class TaskMixtureSampler(BlockSampler):
    """Yields row numbers of a dataset; an epoch is N = Σ n_i draws.

    Args:
        task_ids (`np.ndarray`): Task of each row. # (N,)
        strategy, block_size, seed, epoch_draws: As in [`BlockSampler`].
    """

    def __init__(
        self,
        task_ids: np.ndarray,
        strategy: MixingStrategy,
        block_size: int,
        seed: int,
        epoch_draws: int | None = None,
    ):
        task_ids = np.asarray(task_ids)
        super().__init__(strategy, block_size, seed, len(task_ids), epoch_draws)
        self._rows = _RowsByTask(task_ids, strategy.num_tasks)
        self._forget_passes()

    def _forget_passes(self) -> None:
        # What is left of each task's pass, which is made when the task is drawn
        self._passes: list[Iterator[int]] = [iter(()) for _ in self.cursors]

    def take(self, task: int) -> int:
        row = next(self._passes[task], None)
        if row is None:
            self._passes[task] = self._pass_from(task, self.cursors[task])
            row = next(self._passes[task])
        return row

    def _pass_from(self, task: int, cursor: int) -> Iterator[int]:
        """The rows of the pass over `task` that its draw number `cursor` lies in, from that draw on."""
        task_pass, position = divmod(cursor, int(self._rows.sizes[task]))
        rows = self._rows.copy_of(task)
        # Shuffling the rows themselves gives `rows[rng.permutation(n)]`, without a second array
        shuffle_stream(self.seed, task, task_pass).shuffle(rows)
        return iter(memoryview(rows)[position:])  # hands out Python integers, made as they are drawn

    def load_state_dict(self, state: dict[str, Any], skips_data: bool = True) -> None:
        super().load_state_dict(state, skips_data)
        self._forget_passes()
