"""TaskMixtureSampler: what an epoch is, who shares a p, and that a resumed run draws what an undisturbed one draws."""

import hashlib
import itertools
import json
import math

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from moving_strategies import Fixed, Moving
from torch.utils.data import BatchSampler, DataLoader

from trl_ama.common.errors import AMAError
from trl_ama.mixing import StepStatistics, build_strategy
from trl_ama.sampling.sampler import TaskMixtureSampler


SIZES = [20, 7, 3]
TASK_IDS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], SIZES))  # the rows of a task lie scattered


def make_sampler(strategy=None, block_size=4, seed=1, **kwargs) -> TaskMixtureSampler:
    return TaskMixtureSampler(TASK_IDS, strategy or Fixed([0.5, 0.2, 0.3]), block_size, seed, **kwargs)


def take(iterator, count) -> list[int]:
    return list(itertools.islice(iterator, count))


# ---- An epoch ----


@pytest.mark.parametrize("block_size", [1, 4, 7, 30, 64])
def test_an_epoch_is_n_draws(block_size):
    sampler = make_sampler(block_size=block_size)
    assert len(sampler) == 30
    for _ in range(2):
        assert len(list(sampler)) == 30


def test_within_a_task_every_row_comes_once_per_pass():
    sampler = make_sampler()
    rows = np.array([row for _ in range(10) for row in sampler])
    passes = []
    for task, size in enumerate(SIZES):
        of_task = rows[TASK_IDS[rows] == task]
        mine = np.flatnonzero(TASK_IDS == task)
        complete = len(of_task) // size
        assert complete >= 5
        for number in range(complete):
            one_pass = of_task[number * size : (number + 1) * size]
            np.testing.assert_array_equal(np.sort(one_pass), mine)
            passes.append((task, tuple(one_pass)))
        rest = of_task[complete * size :]
        assert len(set(rest)) == len(rest)  # the pass that the last epoch left unfinished
    orders = [order for task, order in passes if task == 0]
    assert len(set(orders)) == len(orders)  # reshuffled, every time


def test_a_blocks_rows_share_one_p():
    """p changes after every eighth row is taken, in the middle of a block of eight: no block mixes two of them."""
    strategy = Fixed([1.0, 0.0, 0.0])
    rows = iter(make_sampler(strategy, block_size=8))
    tasks = []
    for number in range(24):
        if number == 4:
            strategy.p = np.array([0.0, 1.0, 0.0])
        if number == 12:
            strategy.p = np.array([0.0, 0.0, 1.0])
        tasks.append(int(TASK_IDS[next(rows)]))
    assert tasks == [0] * 8 + [1] * 8 + [2] * 8


def test_micro_batches_of_a_block_are_not_sorted_by_task():
    rows = take(iter(make_sampler(Fixed([0.5, 0.5, 0.0]), block_size=16)), 16)
    tasks = TASK_IDS[rows].tolist()
    assert tasks.count(0) == tasks.count(1) == 8 and tasks != sorted(tasks)


# ---- Allocation ----


@settings(max_examples=100, deadline=None)
@given(
    raw=st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda raw: sum(raw) > 0.1),
    block_size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_counts_are_within_one_of_their_expectation(raw, block_size, seed):
    p = np.array(raw) / sum(raw)
    task_ids = np.arange(len(p)).repeat(3)
    sampler = TaskMixtureSampler(np.tile(task_ids, 14), Fixed(p), block_size, seed)
    counts = np.bincount(np.tile(task_ids, 14)[take(iter(sampler), block_size)], minlength=len(p))
    assert (np.abs(counts - block_size * p) < 1 + 1e-9).all()
    assert (counts[p == 0] == 0).all()


def test_counts_are_unbiased_over_seeds_and_steps():
    p = np.array([0.43, 0.37, 0.2])  # 5·p = 2.15, 1.85, 1.0
    by_seed = [np.bincount(TASK_IDS[take(iter(make_sampler(Fixed(p), 5, seed)), 5)], minlength=3) for seed in range(3000)]  # fmt: skip
    # An epoch is 6 blocks of 5, so that steps of one seed are tried, too
    by_step = [
        np.bincount(TASK_IDS[block], minlength=3)
        for seed in range(500)
        for block in np.array(list(make_sampler(Fixed(p), 5, seed))).reshape(6, 5)
    ]
    for counts in (np.array(by_seed), np.array(by_step)):
        error = counts.std(axis=0) / math.sqrt(len(counts))
        assert (np.abs(counts.mean(axis=0) - 5 * p) <= 3.5 * error + 1e-12).all()
        assert (error[:2] > 0).all()
        # 5·p_2 is whole, so nothing about it is random
        assert set(counts[:, 2]) == {1}


def test_every_row_of_a_task_is_equally_likely():
    first = np.bincount([take(iter(make_sampler(Fixed([0, 1, 0]), 1, seed)), 1)[0] for seed in range(1400)], minlength=30)  # fmt: skip
    mine = first[TASK_IDS == 1]
    assert mine.sum() == 1400 and len(mine) == 7
    assert (np.abs(mine - 200) < 4 * math.sqrt(1400 * (1 / 7) * (6 / 7))).all()


# ---- Who draws the same ----


def test_equal_seeds_draw_equally_and_others_do_not():
    ours, twin, other = make_sampler(seed=1), make_sampler(seed=1), make_sampler(seed=2)
    for _ in range(3):
        rows = list(ours)
        assert rows == list(twin)
        assert rows != list(other)


def test_epochs_differ():
    sampler = make_sampler()
    assert list(sampler) != list(sampler)


def test_ranks_share_each_block():
    """Two processes with their own samplers: Accelerate's shards of a round together are one block, no row twice."""
    blocks = np.array_split(list(make_sampler(block_size=8)), [8, 16, 24])
    shards = [
        iter(
            BatchSamplerShard(BatchSampler(make_sampler(block_size=8), 4, False), num_processes=2, process_index=rank)
        )
        for rank in range(2)
    ]
    for block in blocks[:3]:
        assert next(shards[0]) + next(shards[1]) == block.tolist()


# ---- The draws of a seed ----


# Written by the first release. Figures that were published rest on these draws: they must never change for a seed.
# fmt: off
PUBLISHED_DRAWS = {
    0: [
        [8, 24, 1, 18, 13, 27, 16, 28, 26, 23, 6, 12, 2, 17, 19, 26, 25, 13, 6, 26, 3, 11, 8, 6, 13, 22, 2, 4, 18, 27],
        [13, 5, 3, 7, 9, 14, 6, 26, 6, 26, 0, 13, 24, 11, 13, 27, 26, 15, 18, 8, 21, 11, 20, 3, 10, 2, 6, 29, 6, 17],
    ],
    1: [
        [3, 12, 24, 11, 13, 26, 10, 18, 29, 23, 8, 19, 6, 26, 6, 7, 13, 27, 26, 2, 13, 28, 3, 6, 24, 4, 8, 21, 6, 27],
        [22, 15, 13, 18, 2, 25, 1, 26, 13, 0, 26, 6, 11, 11, 3, 13, 5, 26, 2, 9, 24, 18, 8, 14, 6, 17, 16, 27, 26, 20],
    ],
    42: [
        [27, 6, 26, 8, 5, 1, 18, 3, 16, 13, 26, 13, 10, 21, 24, 7, 2, 6, 13, 11, 4, 6, 27, 26, 9, 13, 28, 11, 8, 3],
        [20, 18, 2, 17, 6, 19, 26, 15, 6, 26, 24, 8, 0, 13, 18, 13, 24, 14, 27, 6, 2, 11, 25, 22, 12, 23, 26, 3, 29, 26],
    ],
}
# fmt: on


@pytest.mark.parametrize("seed", PUBLISHED_DRAWS)
def test_draws_of_a_seed_never_change(seed):
    """Scattered rows, blocks of 8 that an epoch of 30 cuts, and up to seven passes over a task."""
    assert len(TASK_IDS) == 30 and TASK_IDS[:12].tolist() == [0, 0, 1, 1, 0, 0, 2, 0, 1, 0, 0, 1]
    sampler = TaskMixtureSampler(TASK_IDS, Moving(3), 8, seed)
    assert [list(sampler) for _ in range(2)] == PUBLISHED_DRAWS[seed]


LARGE_SIZES = np.random.default_rng(5).integers(3, 700, 16)  # 4,960 rows
GROUPED = np.repeat(np.arange(16), LARGE_SIZES)


@pytest.mark.parametrize(
    ("task_ids", "block_size", "epochs", "seed", "digest"),
    [
        (GROUPED, 64, 3, 7, "2a020ef12260401486b0b639f8193c68c98c70cedc0b9b821a275625cfd4c8d1"),
        (
            np.repeat(np.arange(16)[::-1], LARGE_SIZES),
            64,
            3,
            7,
            "0ae353be0f72bf71ba42d105698c14c8c97cf5da011f2afa24f85b295d62a37b",
        ),
        (
            np.random.default_rng(6).permutation(GROUPED),
            64,
            3,
            7,
            "d2ba5d86e5ea8c83cfcfb1118611e6ed3a7710513d2589ac6e09c2c8b1998a8f",
        ),
        (np.zeros(1000, dtype=int), 7, 2, 3, "8d6144f413cd9ab36880783bdcb9047307e36c7b39e91cc9199a9885c9e9eedc"),
    ],
    ids=["grouped", "grouped in another order", "scattered", "one task"],
)
def test_many_draws_of_a_seed_never_change(task_ids, block_size, epochs, seed, digest):
    sampler = TaskMixtureSampler(task_ids, Moving(int(task_ids.max()) + 1), block_size, seed)
    drawn = np.array([row for _ in range(epochs) for row in sampler], dtype=np.int64)
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("is_scattered", [False, True])
def test_a_pass_is_numpys_permutation_also_of_many_rows(is_scattered):
    """More rows than 16 bits count, and more than one chunk of the sort."""
    task_ids = np.repeat([0, 1], [300_000, 100_000])
    if is_scattered:
        task_ids = np.random.default_rng(8).permutation(task_ids)
    drawn = take(iter(TaskMixtureSampler(task_ids, Fixed([0.0, 1.0]), 512, seed=3)), 1024)
    order = np.random.default_rng([1, 3, 1, 0]).permutation(100_000)[:1024]
    assert drawn == np.flatnonzero(task_ids == 1)[order].tolist()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_resumed_sampler_draws_what_was_published(blocks):
    strategy = Moving(3)
    sampler = TaskMixtureSampler(TASK_IDS, strategy, 8, 42)
    assert len(list(sampler)) == 30
    second = take(iter(sampler), 8 * blocks)
    for _ in range(blocks):
        sampler.pop_trained()
    resumed = TaskMixtureSampler(TASK_IDS, strategy, 8, 42)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert second + list(resumed)[len(second) :] == PUBLISHED_DRAWS[42][1]


# ---- Reading ahead, and resuming ----


class Run:
    """The Trainer's order of things around a sampler, with torch's DataLoader and Accelerate's, which reads ahead.

    `steps` holds each optimizer step's rows and the p that the sampler said they were drawn with, `saved` the JSON that
    a checkpoint after each step would hold. A row's excess is a fixed number, so that runs can be compared.
    """

    excess = np.random.default_rng(9).exponential(size=30)

    def __init__(self, name="ama_s", micro_batch=4, accumulation=2, drop_last=False, seed=1):
        self.strategy = build_strategy(name, SIZES, mixing_lr=0.1)
        self.micro_batch, self.accumulation, self.drop_last = micro_batch, accumulation, drop_last
        block = micro_batch * accumulation
        self.sampler = make_sampler(
            self.strategy, block, seed, epoch_draws=30 - 30 % micro_batch if drop_last else None
        )
        self.steps: list[tuple[list[int], list[float]]] = []
        self.saved: list[str] = []

    def load(self, saved: str, skips_data=True):
        state = json.loads(saved)
        self.strategy.load_state_dict(state["strategy"])
        self.sampler.load_state_dict(state["sampler"], skips_data)
        return self

    def train(self, epochs, start=0):
        loader = DataLoader(range(30), self.micro_batch, sampler=self.sampler, drop_last=self.drop_last)
        loader = Accelerator(cpu=True).prepare(loader)
        per_epoch = math.ceil(len(loader) / self.accumulation)
        first_epoch, skipped = divmod(start, per_epoch)
        for _ in range(first_epoch, epochs):
            batches = iter(skip_first_batches(loader, skipped * self.accumulation) if skipped else loader)
            for _ in range(skipped, per_epoch):
                rows = [row for batch in itertools.islice(batches, self.accumulation) for row in batch.tolist()]
                self._finish_step(rows)
            skipped = 0
        return self

    def _finish_step(self, rows):
        p = self.sampler.pop_trained()
        counts = np.bincount(TASK_IDS[rows], minlength=3)
        sums = np.bincount(TASK_IDS[rows], weights=self.excess[rows], minlength=3)
        self.strategy.observe(StepStatistics(counts, sums, sums, p))
        self.steps.append((rows, p.tolist()))
        self.saved.append(
            json.dumps({"strategy": self.strategy.state_dict(), "sampler": self.sampler.state_dict()}, allow_nan=False)
        )


def test_pop_trained_returns_the_p_of_each_block_in_order():
    strategy = Fixed([0.5, 0.2, 0.3])
    sampler = make_sampler(strategy, block_size=4)
    rows = iter(sampler)
    mixtures = [[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]]
    for p in mixtures:
        strategy.p = np.array(p)
        take(rows, 4)
    strategy.p = np.array([0.0, 0.0, 1.0])  # today's p is nobody's
    assert [sampler.pop_trained().tolist() for _ in mixtures] == mixtures


def test_the_loader_reads_ahead_so_a_steps_p_is_one_step_old():
    run = Run().train(epochs=1)
    assert run.steps[0][1] == run.steps[1][1] == pytest.approx([1 / 3] * 3)  # both were drawn before anything was seen
    assert run.steps[2][1] != run.steps[1][1]
    state = json.loads(run.saved[0])["sampler"]
    assert len(state["ahead"]) == 1 and state["ahead"][0]["indices"] == run.steps[1][0]


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_draws_do_not_depend_on_how_a_step_is_cut(micro_batch, accumulation):
    whole = Run(micro_batch=8, accumulation=1).train(epochs=3)
    cut = Run(micro_batch=micro_batch, accumulation=accumulation).train(epochs=3)
    assert cut.steps == whole.steps
    assert [len(rows) for rows, _ in whole.steps] == [8, 8, 8, 6] * 3
    # The mixture moved all the time; only an epoch's first two blocks share a p, because of the reading ahead
    assert len({tuple(p) for _, p in whole.steps}) == 9


@pytest.mark.parametrize("name", ["ama_s", "ama_r", "uniform"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (8, 1), (7, 1), (3, 4), (5, 2)])
def test_a_run_resumed_after_any_step_continues_exactly(name, drop_last, micro_batch, accumulation):
    settings = {"name": name, "micro_batch": micro_batch, "accumulation": accumulation, "drop_last": drop_last}
    undisturbed = Run(**settings).train(epochs=3)
    for step, saved in enumerate(undisturbed.saved, start=1):
        resumed = Run(**settings).load(saved).train(epochs=3, start=step)
        assert resumed.steps == undisturbed.steps[step:], f"resumed after step {step}"
        assert resumed.saved == undisturbed.saved[step:]


def test_a_run_resumed_twice_continues_exactly():
    undisturbed = Run().train(epochs=3)
    once = Run().load(undisturbed.saved[1]).train(epochs=3, start=2)
    twice = Run().load(once.saved[0]).train(epochs=3, start=3)  # within the epoch that the first resume cut
    assert twice.steps == undisturbed.steps[3:]


def test_a_resumed_sampler_yields_stand_ins_then_the_pending_then_new_rows():
    strategy = Fixed([0.5, 0.2, 0.3])
    sampler = make_sampler(strategy, block_size=4)
    stream = iter(sampler)
    drawn = take(stream, 12)  # three blocks
    sampler.pop_trained()  # one of them trained
    state = json.loads(json.dumps(sampler.state_dict()))
    strategy.p = np.array([0.0, 1.0, 0.0])  # whatever the strategy says now, what was drawn stays drawn
    resumed = make_sampler(strategy, block_size=4)
    resumed.load_state_dict(state)
    rows = list(resumed)
    assert len(rows) == 30
    assert rows[4:12] == drawn[4:]
    assert (TASK_IDS[rows[12:]] == 1).all()
    assert rows[12:] == list(stream)
    for _ in range(2):
        np.testing.assert_allclose(resumed.pop_trained(), [0.5, 0.2, 0.3])
    np.testing.assert_allclose(resumed.pop_trained(), [0.0, 1.0, 0.0])


def test_a_state_of_an_epochs_end_begins_a_new_epoch():
    undisturbed = Run().train(epochs=2)
    resumed = Run().load(undisturbed.saved[3])  # after 4 steps of 8, 8, 8 and 6
    assert take(iter(resumed.sampler), 8) == undisturbed.steps[4][0]


def test_leftovers_of_a_dropped_batch_are_not_trained_on():
    # 30 rows in batches of 8: the loader draws the block of 6 and drops it, so its p is nobody's
    run = Run(micro_batch=8, accumulation=1, drop_last=True).train(epochs=2)
    assert [len(rows) for rows, _ in run.steps] == [8] * 6
    state = json.loads(run.saved[2])["sampler"]
    assert [len(block["indices"]) for block in state["ahead"]] == [6] and state["trained_draws"] == 24
    assert (
        len(json.loads(run.saved[3])["sampler"]["ahead"]) == 1
    )  # gone with the next epoch: the block read ahead only


def test_without_skipping_the_data_the_pending_blocks_come_first():
    undisturbed = Run().train(epochs=1)
    resumed = Run().load(undisturbed.saved[0], skips_data=False)
    rows = take(iter(resumed.sampler), 30)
    assert len(rows) == 30
    assert rows[:8] == undisturbed.steps[1][0]
    assert rows[:8] != [0] * 8  # no stand-ins
    resumed = Run().load(undisturbed.saved[0], skips_data=False).train(epochs=1)
    assert resumed.steps[:3] == undisturbed.steps[1:3] + resumed.steps[2:3]
    assert [len(rows) for rows, _ in resumed.steps] == [8, 8, 8, 6]  # an epoch of its own


def test_without_skipping_the_data_an_epochs_count_begins_anew():
    """Else a second checkpoint within that epoch is taken for one at its end, and what was read ahead is lost."""
    undisturbed = Run().train(epochs=1)
    once = Run().load(undisturbed.saved[1], skips_data=False).train(epochs=1)
    assert json.loads(once.saved[1])["sampler"]["trained_draws"] == 16
    twice = Run().load(once.saved[1], skips_data=False).train(epochs=1)
    assert twice.steps[0] == once.steps[2]


# ---- Errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed 1, this run has 2"),
        ({"block_size": 8}, "pairs per optimizer step 4, this run has 8"),
        ({"task_ids": TASK_IDS[:-1]}, "number of training pairs 30, this run has 29"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(change, message):
    state = make_sampler().state_dict()
    arguments = {"task_ids": TASK_IDS, "strategy": Fixed([0.5, 0.2, 0.3]), "block_size": 4, "seed": 1, **change}
    with pytest.raises(AMAError, match=message):
        TaskMixtureSampler(**arguments).load_state_dict(state)


@pytest.mark.parametrize("block_size", [0, -4])
def test_a_block_needs_a_pair(block_size):
    with pytest.raises(AMAError, match="block_size"):
        make_sampler(block_size=block_size)
