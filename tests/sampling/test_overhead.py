"""The price of adaptivity, without a clock: calls and allocations, by number of rows and of tasks.

Figures in seconds come from `tests/benchmarks/overhead.py`.
"""

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from counted_calls import PROCESS, calls_of, sampler_of
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from trl_ama.common.arrays import encoded_column, list_lengths, numpy_column
from trl_ama.common.errors import AMAError
from trl_ama.dpo.checks import check_no_task_lost, check_token_counts
from trl_ama.mixing import STRATEGIES, build_strategy
from trl_ama.reference_losses.columns import LOGP_COLUMNS, has_columns
from trl_ama.sampling.mixture import Mixture, strategy_for
from trl_ama.sampling.step_recorder import StepRecorder
from trl_ama.tasks.pairs import concatenate_tasks, task_names_of, with_task_labels


def peak_of(function, *arguments) -> tuple[int, object]:
    """Bytes allocated at most by `function(*arguments)`, and its result."""
    tracemalloc.start()
    try:
        result = function(*arguments)
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def tasks_of(rows: int, num_tasks: int, is_scattered: bool = False) -> np.ndarray:
    task_ids = np.arange(rows) * num_tasks // rows
    return np.random.default_rng(0).permutation(task_ids) if is_scattered else task_ids


def draw(rows, blocks: int) -> list[int]:
    return [next(rows) for _ in range(32 * blocks)]


# ---- The sampler ----


@pytest.mark.parametrize(("is_scattered", "bytes_a_row"), [(False, 6), (True, 13)])
def test_sampler_takes_a_few_bytes_a_row(is_scattered, bytes_a_row):
    """An `argsort` alone takes 16, and a list of rows 36."""
    task_ids = tasks_of(10**6, 64, is_scattered)
    task_ids.flags.writeable = False  # as Arrow's memory is

    def use():
        sampler = sampler_of(task_ids, 64)
        drawn = draw(iter(sampler), 20)
        assert len({task_ids[row] for row in drawn}) == 64  # all tasks' passes are there
        return sampler

    peak, _ = peak_of(use)
    assert peak < bytes_a_row * 10**6


def test_only_the_tasks_that_are_drawn_are_shuffled():
    task_ids = tasks_of(10**6, 64)

    def use():
        sampler = sampler_of(task_ids, 64)
        sampler._strategy.probabilities = lambda: np.eye(64)[3]
        assert {task_ids[row] for row in draw(iter(sampler), 20)} == {3}
        return tracemalloc.get_traced_memory()[0]

    peak, kept = peak_of(use)
    assert kept < 0.2e6  # 4 bytes for each of the task's 15,625 rows
    assert peak < 1.5e6


@pytest.mark.parametrize("is_scattered", [False, True])
def test_calls_of_a_draw_do_not_grow_with_rows(is_scattered):
    calls = {}
    for rows in (10**4, 10**6):
        stream = iter(sampler_of(tasks_of(rows, 4, is_scattered), 4))
        draw(stream, 2)
        calls[rows] = calls_of(draw, stream, 50)
    assert calls[10**6] <= calls[10**4]
    assert calls[10**6] < 50 * 32 * 6


def test_calls_of_a_draw_hardly_grow_with_tasks():
    calls = {}
    for num_tasks in (2, 64):
        stream = iter(sampler_of(tasks_of(10**5, num_tasks), num_tasks))
        draw(stream, 10)
        calls[num_tasks] = calls_of(draw, stream, 20)
    assert calls[64] < 1.1 * calls[2]


def test_state_does_not_grow_with_rows():
    sizes = []
    for rows in (10**4, 10**6):
        sampler = sampler_of(tasks_of(rows, 64), 64)
        draw(iter(sampler), 10)
        for _ in range(9):
            sampler.pop_trained()
        sizes.append(len(json.dumps(sampler.state_dict())))
    assert sizes[1] <= sizes[0] + 64 * 2 + 8  # two digits more of each row number read ahead, and of the counts


# ---- The steps ----


@pytest.mark.parametrize("name", STRATEGIES)
def test_calls_of_a_steps_end_hardly_grow_with_tasks(name):
    calls = {}
    for num_tasks in (4, 64):
        mixture = Mixture(build_strategy(name, np.full(num_tasks, 100)), [f"t{i}" for i in range(num_tasks)], 0.69)
        mixture.begin(100)

        def step(mixture=mixture, num_tasks=num_tasks):
            losses = torch.linspace(0.1, 0.9, 128)
            mixture.recorder.add(torch.arange(128) % num_tasks, losses, losses / 2, losses - 0.5)
            return mixture.finish_step(PROCESS)

        figures, _ = step()
        assert len(figures) == 5 * num_tasks
        assert all(type(value) is float for value in figures.values())
        calls[num_tasks] = calls_of(step)
    assert calls[64] < 1.1 * calls[4]


def test_a_micro_batch_is_one_copy_from_the_device_and_the_end_of_a_step_none(monkeypatch):
    """DPOTrainer has waited for the device when a micro-batch is added; after the backward pass there would be much to wait for."""
    copies, plain = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or plain(tensor))
    recorder = StepRecorder(3)
    values = torch.ones(4, requires_grad=True)
    for _ in range(2):
        recorder.add(torch.arange(4) % 3, values, values, values)
    assert copies == [(4, 4)] * 2
    # Tensors without data: to look at a value fails
    nothing = torch.zeros(4, device="meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        recorder.add(torch.zeros(4, dtype=torch.long, device="meta"), nothing, nothing, nothing)
    del copies[:]
    assert recorder.finish(np.full(3, 1 / 3), PROCESS).counts.tolist() == [4, 2, 2] and not copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_step_are_those_of_its_micro_batches(dtype):
    recorder = StepRecorder(300)
    tasks = torch.tensor([0, 299, 299, 7, 257])
    losses = torch.tensor([0.5, 1.0, 2.0, 0.25, 4.0], dtype=dtype, requires_grad=True)
    raw = torch.tensor([-0.5, 0.0, 1.0, 0.25, 2.0], dtype=dtype)
    for rows in (slice(0, 2), slice(2, 5)):
        recorder.add(tasks[rows], losses[rows], raw[rows].clamp(min=0), raw[rows])
    step = recorder.finish(np.full(300, 1 / 300), PROCESS)
    seen = {0: (1, 0.5, 0.0, 1), 299: (2, 3.0, 1.0, 1), 7: (1, 0.25, 0.25, 0), 257: (1, 4.0, 2.0, 0)}
    for task, sums in seen.items():
        assert (
            step.counts[task],
            step.loss_sums[task],
            step.excess_sums[task],
            step.clipped_counts[task],
        ) == sums
    assert step.counts.sum() == 5 and step.counts.dtype == np.float64
    assert recorder.finish(np.full(300, 1 / 300), PROCESS).counts.sum() == 0


# ---- The columns ----


def prepared(rows: int) -> Dataset:
    """Pairs as `DPOTrainer` leaves them, with reference losses and names of tasks."""
    tokens = pa.ListArray.from_arrays(np.arange(0, 2 * rows + 1, 2, dtype=np.int32), pa.array(np.zeros(2 * rows, int)))
    columns = {"task": pa.array(np.array(["b", "a", "c"])[np.arange(rows) % 3])}
    columns |= dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), tokens)
    columns |= {name: np.full(rows, -5.0, dtype=np.float32) for name in LOGP_COLUMNS}
    columns |= {name: np.full(rows, 2) for name in ("chosen_tokens", "rejected_tokens")}
    return Dataset(pa.table(columns))


def look_through(dataset: Dataset) -> None:
    """What `AMATrainer` reads of its training pairs before and after `DPOTrainer` prepares them."""
    names = task_names_of(dataset)
    labelled = with_task_labels(dataset, names)
    assert has_columns(labelled, LOGP_COLUMNS, "train_dataset")
    strategy = strategy_for(labelled, names, "ama_s", smoothing=0.1, excess_clip="pair", sampling="uniform")
    check_no_task_lost(labelled, labelled, names, 64)
    check_token_counts(labelled, "train_dataset", 64, "keep_start")
    mixture = Mixture(strategy, names, 0.69)
    settings = SimpleNamespace(world_size=1, gradient_accumulation_steps=2, dataloader_drop_last=False)
    sampler = mixture.make_sampler(labelled, SimpleNamespace(**vars(settings), data_seed=None, seed=1), 4)
    assert sorted(strategy.task_sizes) == sorted(np.bincount(np.arange(len(dataset)) % 3))
    assert len(sampler) == len(dataset)


@pytest.mark.parametrize("is_selected", [False, True])
def test_calls_before_training_do_not_grow_with_rows(is_selected):
    calls = {}
    for rows in (300, 300, 60_000):  # the first time fills caches
        dataset = prepared(rows)
        if is_selected:
            dataset = dataset.shuffle(seed=0)
        calls[rows] = calls_of(look_through, dataset)
    assert calls[60_000] < 1.1 * calls[300]


def test_reading_the_tasks_allocates_no_objects():
    dataset = prepared(10**5)
    labelled = with_task_labels(dataset, ["a", "b", "c"])
    peak, codes = peak_of(numpy_column, labelled, "task")
    assert peak < 10**4  # Arrow's own memory
    assert np.bincount(codes).tolist() == [33_333, 33_334, 33_333]


def test_labelling_leaves_the_other_columns_and_the_selection_alone():
    dataset = prepared(1000)
    shuffled = dataset.shuffle(seed=1).select(range(0, 900, 3)).with_format("torch")
    labelled = with_task_labels(shuffled, ["c", "b", "a"])
    assert labelled.column_names == shuffled.column_names and labelled.format == shuffled.format
    assert labelled._fingerprint not in (shuffled._fingerprint, dataset._fingerprint)
    theirs, ours = (part.data.column("prompt_ids").chunk(0).buffers()[1] for part in (shuffled, labelled))
    assert theirs.address == ours.address
    names = labelled.features["task"].int2str(labelled.with_format(None)["task"][:])
    assert names == shuffled.with_format(None)["task"][:]


def shapes(dataset: Dataset) -> list[Dataset]:
    twice = concatenate_datasets([dataset, dataset.select([2, 0])])
    return [dataset, dataset.select([1, 2]), dataset.select([3, 1]), dataset.select([]), twice, twice.shuffle(seed=2)]


def test_columns_follow_selections_chunks_and_gaps():
    table = {
        "name": ["b", "a", None, "b"],
        "x": [1.0, None, 3.0, 4.0],
        "n": [1, 2, 3, 4],
        "ids": [[1], [], [1, 2], [3]],
    }
    for dataset in shapes(Dataset.from_dict(table)):
        rows = dataset[:]
        np.testing.assert_array_equal(numpy_column(dataset, "x"), np.array(rows["x"], dtype=float))
        np.testing.assert_array_equal(numpy_column(dataset, "n"), rows["n"])
        np.testing.assert_array_equal(list_lengths(dataset, "ids"), [len(ids) for ids in rows["ids"]])
        codes, names = encoded_column(dataset, "name")
        assert [None if code < 0 else names[code] for code in codes] == rows["name"]


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_without_a_task_are_refused(missing):
    label = ClassLabel(names=["a", "b"])
    dataset = Dataset(
        pa.table({"task": pa.array([0, 1, missing], pa.int64())}, Features({"task": label}).arrow_schema)
    )
    with pytest.raises(AMAError, match="'task' is empty"):
        task_names_of(dataset)


def test_numbers_as_tasks_keep_their_names():
    dataset = Dataset.from_dict({"task": [2, 11, 10, 1, 2]}, features=Features({"task": Value("int64")}))
    names = task_names_of(dataset)
    assert names == ["1", "10", "11", "2"]
    assert with_task_labels(dataset, names)["task"][:] == [3, 2, 1, 0, 3]


def test_concatenated_tasks_can_be_numbered_as_others_are():
    parts = {"b": Dataset.from_dict({"prompt": ["x", "y"]}), "a": Dataset.from_dict({"prompt": ["z"]})}
    data = concatenate_tasks(parts, names=["a", "c", "b"])
    assert data["task"][:] == [2, 2, 0] and data.features["task"].names == ["a", "c", "b"]
