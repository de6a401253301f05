"""Streamed tasks: draws and passes, shuffling by windows, what is held, resuming anywhere, and shares of processes."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from moving_strategies import Fixed, Moving
from torch.utils.data import BatchSampler, DataLoader

from trl_ama.common.errors import AMAError
from trl_ama.mixing import StepStatistics, build_strategy
from trl_ama.sampling.sampler import TaskMixtureSampler
from trl_ama.sampling.streams import StreamSampler, TaskStreams


SIZES = {"list": 20, "sort": 7, "brief": 3}
FIRSTS = dict(zip(SIZES, (0, 20, 27), strict=True))  # a pair's number tells its task
TASK_IDS = np.repeat([0, 1, 2], list(SIZES.values()))
P = [0.5, 0.2, 0.3]


def pairs(first, count):
    for number in range(first, first + count):
        yield {"chosen_ids": [number, 1], "number": number}


def stream_of(task, first=None) -> IterableDataset:
    first = FIRSTS[task] if first is None else first
    return IterableDataset.from_generator(pairs, gen_kwargs={"first": first, "count": SIZES[task]})


def keep(task, row):
    return {**row, "chosen_ids": np.array(row["chosen_ids"], dtype=np.int32)}


def make_streams(buffer=4, seed=1, length=120, streams=None) -> TaskStreams:
    streams = streams or {task: stream_of(task) for task in SIZES}
    return TaskStreams(streams, buffer, seed, length, keep)


def drawn(streams: TaskStreams, indices) -> list[int]:
    return [streams[index]["number"] for index in indices]


def of_task(streams: TaskStreams, task: int, count: int) -> np.ndarray:
    return np.array(drawn(streams, [streams.index(task, draw) for draw in range(count)]))


# ---- Passes and windows ----


@pytest.mark.parametrize("buffer", [1, 3, 4, 7, 20, 1000])
def test_each_pass_has_each_row_once_in_windows_of_the_buffer(buffer):
    streams = make_streams(buffer)
    for task, (name, size) in enumerate(SIZES.items()):
        rows = of_task(streams, task, 5 * size).reshape(5, size) - FIRSTS[name]
        for one_pass in rows:
            np.testing.assert_array_equal(np.sort(one_pass), np.arange(size))
            np.testing.assert_array_equal(one_pass // buffer, np.arange(size) // buffer)
        if min(buffer, size) >= 4:
            assert len({tuple(one_pass) for one_pass in rows}) == 5  # shuffled anew, every time


def test_windows_are_shuffled_and_the_seed_decides_how():
    ours, twin, other = (of_task(make_streams(10, seed), 0, 40) for seed in (1, 1, 2))
    assert (ours == twin).all() and (ours != other).any()
    for window in ours.reshape(4, 10):
        assert (window != np.sort(window)).any()
    assert (ours[:10] + 10 != ours[10:20]).any()  # the windows of a pass are not shuffled alike


def test_a_row_may_be_asked_for_at_any_time():
    """Also backwards, as a second `train()` does."""
    streams = make_streams(4)
    rows = of_task(streams, 0, 70)
    for draw in (69, 3, 41, 40, 0, 55):
        assert streams[streams.index(0, draw)]["number"] == rows[draw]


def test_rows_carry_their_task_and_plain_values():
    row = make_streams()[7]  # draw 2 of task 1
    assert row["task"] == 1 and type(row["chosen_ids"]) is list and row["chosen_ids"] == [row["number"], 1]


# ---- Draws ----


@pytest.mark.parametrize("buffer", [20, 1000])
def test_tasks_that_fit_a_window_are_drawn_as_in_memory(buffer):
    """Row for row, with a p that moves and over several passes."""
    in_memory = TaskMixtureSampler(TASK_IDS, Moving(3), block_size=6, seed=1)
    expected = [row for _ in range(4) for row in in_memory]
    streams = make_streams(buffer)
    assert drawn(streams, StreamSampler(streams, Moving(3), 6, num_steps=20)) == expected


@pytest.mark.parametrize("buffer", [1, 4])
def test_smaller_windows_change_rows_but_not_tasks(buffer):
    in_memory = TaskMixtureSampler(TASK_IDS, Moving(3), block_size=6, seed=1)
    expected = TASK_IDS[[row for _ in range(4) for row in in_memory]]
    streams = make_streams(buffer)
    rows = drawn(streams, StreamSampler(streams, Moving(3), 6, num_steps=20))
    np.testing.assert_array_equal(TASK_IDS[rows], expected)


def test_counts_at_a_fixed_p_are_within_one_of_their_expectation():
    streams = make_streams()
    rows = np.array(drawn(streams, StreamSampler(streams, Fixed(P), 7, num_steps=17)))
    counts = np.array([np.bincount(TASK_IDS[block], minlength=3) for block in rows.reshape(17, 7)])
    assert (np.abs(counts - 7 * np.array(P)) < 1).all()


# ---- What is read and held ----


def test_a_stream_of_a_million_rows_is_never_held():
    read = []

    def endless(size):
        for number in range(size):
            if number % 100 == 0:
                read.append(number)
            yield {"chosen_ids": [number] * 200, "number": number}

    def streams():
        sources = {task: IterableDataset.from_generator(endless, gen_kwargs={"size": 10**6}) for task in ("a", "b")}
        return TaskStreams(sources, 100, 1, 10**6, keep)

    peaks = []
    for steps in (40, 400):
        source = streams()
        sampler = StreamSampler(source, Fixed([0.5, 0.5]), 10, num_steps=10**5)
        rows = iter(sampler)
        read.clear()
        tracemalloc.start()
        for _ in range(steps):
            for index in itertools.islice(rows, 10):
                source[index]
            sampler.pop_trained()
            state = sampler.state_dict()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert max(read) < 5 * steps + 2 * 100  # what was drawn, and a window
        assert len(json.dumps(state)) < 2000
    assert peaks[1] < 1.3 * peaks[0] < 2e6, peaks  # two windows of 100 rows hold 160,000 bytes of tokens


# ---- Resuming ----


def sources(kind, folder):
    """The tasks' streams of one kind, made anew as another process would."""
    if kind == "generator":
        return {task: stream_of(task) for task in SIZES}
    if kind == "sharded":
        data = {task: Dataset.from_list(list(pairs(FIRSTS[task], size))) for task, size in SIZES.items()}
        return {task: part.to_iterable_dataset(num_shards=min(3, len(part))) for task, part in data.items()}
    if kind == "views of one":
        from trl_ama.dpo.streams import _own_copy

        whole = IterableDataset.from_generator(pairs, gen_kwargs={"first": 0, "count": 30})
        views = {
            task: whole.filter(lambda row, task: FIRSTS[task] <= row["number"] < FIRSTS[task] + SIZES[task], fn_kwargs={"task": task})
            for task in SIZES
        }  # fmt: skip
        return {task: _own_copy(view, task) for task, view in views.items()}
    if kind == "parquet":
        files = {}
        for task, size in SIZES.items():
            for half, part in enumerate(np.array_split(np.arange(FIRSTS[task], FIRSTS[task] + size), 2)):
                path = folder / f"{task}-{half}.parquet"
                if not path.exists():
                    Dataset.from_list(list(pairs(int(part[0]), len(part)))).to_parquet(path)
                files.setdefault(task, []).append(str(path))
        return {
            task: load_dataset("parquet", data_files=own, split="train", streaming=True).map(lambda row: row).filter(bool)
            for task, own in files.items()
        }  # fmt: skip
    assert kind == "joined"
    halves = {task: (stream_of(task), stream_of(task, first=FIRSTS[task] + 100)) for task in SIZES}
    return {
        "list": concatenate_datasets(list(halves["list"])),
        "sort": interleave_datasets(list(halves["sort"]), probabilities=[0.7, 0.3], seed=5),
        "brief": interleave_datasets(list(halves["brief"])),
    }


KINDS = ["generator", "sharded", "views of one", "parquet", "joined"]


class Run:
    """The Trainer's order of things around a sampler of streams; `saved` is what a checkpoint after each step holds."""

    num_steps = 12
    excess = np.random.default_rng(9).exponential(size=200)

    def __init__(self, tmp_path, kind="generator", buffer=4, seed=1):
        self.strategy = build_strategy("ama_s", [1, 1, 1], mixing_lr=0.3)
        self.streams = make_streams(buffer, seed, streams=sources(kind, tmp_path))
        self.sampler = StreamSampler(self.streams, self.strategy, 8, self.num_steps)
        self.steps: list[tuple[list[int], list[float]]] = []
        self.saved: list[str] = []

    def load(self, saved: str):
        state = json.loads(saved)
        self.strategy.load_state_dict(state["strategy"])
        self.sampler.load_state_dict(state["sampler"])
        return self

    def train(self, start=0):
        loader = DataLoader(self.streams, 4, sampler=self.sampler, collate_fn=list)
        loader = Accelerator(cpu=True).prepare(loader)
        batches = iter(skip_first_batches(loader, start * 2) if start else loader)
        for _ in range(start, self.num_steps):
            rows = [row for batch in itertools.islice(batches, 2) for row in batch]
            tasks = [row["task"] for row in rows]
            excess = np.bincount(tasks, weights=[self.excess[row["number"]] for row in rows], minlength=3)
            counts = np.bincount(tasks, minlength=3)
            p = self.sampler.pop_trained()
            self.strategy.observe(StepStatistics(counts, excess, excess, p))
            self.steps.append(([row["number"] for row in rows], p.tolist()))
            state = {"strategy": self.strategy.state_dict(), "sampler": self.sampler.state_dict()}
            self.saved.append(json.dumps(state, allow_nan=False))
        assert next(batches, None) is None
        return self


def without_positions(saved: str) -> dict:
    """`datasets` has more than one name for a place."""
    state = json.loads(saved)
    for window in state["sampler"]["streams"]:
        window["position"] = window["position"] is None
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_after_any_step_continues_exactly(kind, tmp_path):
    whole = Run(tmp_path, kind).train()
    assert whole.steps[0][1] != whole.steps[-1][1]  # p moves
    for start in range(1, whole.num_steps):
        resumed = Run(tmp_path, kind).load(whole.saved[start - 1]).train(start)
        assert resumed.steps == whole.steps[start:], start
        assert list(map(without_positions, resumed.saved)) == list(map(without_positions, whole.saved[start:])), start


def test_a_resumed_run_reads_on_from_the_window_it_stopped_in(tmp_path):
    """Not from the beginning: the rows of windows that were trained on are not asked for again."""
    whole = Run(tmp_path).train()
    state = json.loads(whole.saved[-3])["sampler"]
    assert state["streams"][0]["number"] > 0 and state["streams"][0]["position"] is not None
    assert all(isinstance(index, int) for block in state["ahead"] for index in block["indices"])  # and no texts
    resumed = Run(tmp_path).load(whole.saved[-3])
    read = []
    resumed.streams._streams[0]._keep = lambda row: read.append(row["number"]) or keep("list", row)
    resumed.train(whole.num_steps - 2)
    first = state["streams"][0]["number"] * 4
    assert read and read[0] == first > 0


def test_a_run_can_be_given_more_steps(tmp_path, monkeypatch):
    """Passes go on where they were. (Not so the p of the next step, which the shorter run did not draw ahead.)"""
    short = Run(tmp_path).train()
    monkeypatch.setattr(Run, "num_steps", 20)
    longer = Run(tmp_path).load(short.saved[-1]).train(12)
    rows = np.array([row for step in short.steps + longer.steps for row in step[0]])
    assert len(rows) == 160
    for task in range(len(SIZES)):
        mine = rows[TASK_IDS[rows] == task]
        np.testing.assert_array_equal(mine, of_task(make_streams(), task, len(mine)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buffer": 5}, "streaming_buffer 4, this run has 5"),
        ({"seed": 2}, "seed 1, this run has 2"),
        ({"kind": "joined"}, r"The stream of task '\w+' gives other pairs at pass"),
    ],
)
def test_another_stream_is_refused(tmp_path, changes, said):
    whole = Run(tmp_path).train()
    with pytest.raises(AMAError, match=said):
        Run(tmp_path, **changes).load(whole.saved[6]).train(7)


def test_a_state_in_memory_does_not_fit_streams_and_the_other_way_round(tmp_path):
    in_memory = TaskMixtureSampler(TASK_IDS, Fixed(P), 8, seed=1)
    list(itertools.islice(in_memory, 8))
    streamed = Run(tmp_path).train()
    with pytest.raises(AMAError, match="streaming_buffer None, this run has 4"):
        streamed.sampler.load_state_dict(in_memory.state_dict())
    state = {**streamed.sampler.state_dict(), "length": 30}
    with pytest.raises(AMAError, match="streaming_buffer 4, this run has None"):
        in_memory.load_state_dict(state)


def test_a_failed_read_is_named_and_can_be_tried_again():
    fails = [True]

    def shaky(count):
        for row in pairs(0, count):
            if row["number"] == 9 and fails:
                fails.clear()
                raise ConnectionError("gone")
            yield row

    streams = make_streams(4, streams={"a": IterableDataset.from_generator(shaky, gen_kwargs={"count": 20})})
    expected = of_task(make_streams(4), 0, 40)
    with pytest.raises(ConnectionError) as raised:
        of_task(streams, 0, 20)
    assert raised.value.__notes__ == ["While reading the stream of task 'a', pass 0, window 2."]
    np.testing.assert_array_equal(of_task(streams, 0, 40), expected)


def test_a_row_that_cannot_be_read_is_one_sentence():
    def broken(count):
        yield from pairs(0, 9)
        raise ValueError("this turn has no role\nmore")

    streams = make_streams(4, streams={"a": IterableDataset.from_generator(broken, gen_kwargs={"count": 20})})
    said = "The stream of task 'a' cannot be read on after 1 pairs of pass 0, window 2 .ValueError: this turn has no role.. Mend"
    with pytest.raises(AMAError, match=said):
        of_task(streams, 0, 20)


def test_a_stream_that_gives_nothing_is_an_error():
    empty = IterableDataset.from_generator(pairs, gen_kwargs={"first": 0, "count": 0})
    with pytest.raises(AMAError, match="The stream of task 'a' gives no pairs at pass 0, window 0"):
        of_task(make_streams(streams={"a": empty}), 0, 1)


# ---- Several processes ----


def test_ranks_share_each_block_as_those_of_one_process():
    """Micro-batch m of rank r holds the positions [(m W + r) B, …) of the block; every rank reads its own streams."""
    streams = make_streams()
    expected = np.array(drawn(streams, StreamSampler(streams, Moving(3), 16, 10))).reshape(10, 2, 2, 4)
    for rank in range(2):
        own = make_streams()
        sampler = StreamSampler(own, Moving(3), 16, 10)
        shard = BatchSamplerShard(BatchSampler(sampler, 4, False), num_processes=2, process_index=rank)
        batches = [drawn(own, batch) for batch in shard]
        np.testing.assert_array_equal(np.array(batches).reshape(10, 2, 4), expected[:, :, rank])


def test_the_first_ranks_state_continues_every_rank():
    """Only the first process writes it, and it may have read other windows than the others."""
    expected = [drawn(make_streams(2), block) for block in np.reshape(list(StreamSampler(make_streams(2), Fixed(P), 8, 12)), (12, 8)).tolist()]  # fmt: skip
    first = make_streams(2)
    sampler = StreamSampler(first, Fixed(P), 8, 12)
    shard = iter(BatchSamplerShard(BatchSampler(sampler, 4, False), num_processes=2, process_index=0))
    for step in range(7):
        assert drawn(first, next(shard)) == expected[step][:4]
        sampler.pop_trained()
    state = json.loads(json.dumps(sampler.state_dict()))
    for rank in range(2):
        own = make_streams(2)
        sampler = StreamSampler(own, Fixed(P), 8, 12)
        sampler.load_state_dict(state)
        batches = itertools.islice(BatchSamplerShard(BatchSampler(sampler, 4, False), 2, rank), 7, None)
        assert [drawn(own, batch) for batch in batches] == [block[4 * rank :][:4] for block in expected[7:]]
