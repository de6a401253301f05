"""Whatever the tasks, the steps and the moment: probabilities are some, names do not matter, and a state goes on exactly."""

import itertools
import json
import math
from collections import deque

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_ama.mixing import STRATEGIES, StepStatistics, build_strategy
from trl_ama.sampling.mixture import Mixture
from trl_ama.sampling.sampler import TaskMixtureSampler


ADAPTIVE = ("ama_r", "ama_s")
EXCESS = st.one_of(st.just(0.0), st.floats(-5, 5), st.floats(-1e4, 1e4))


@st.composite
def runs(draw):
    """A strategy's arguments, and the counts and mean excess of each task in a few steps."""
    k = draw(st.integers(2, 5))
    arguments = {
        "name": draw(st.sampled_from(sorted(STRATEGIES))),
        "task_sizes": draw(st.lists(st.integers(1, 10**6), min_size=k, max_size=k)),
        "mixing_lr": draw(st.sampled_from([None, 1e-6, 0.05, 1.0, 30.0])),
        "smoothing": draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])),
        "excess_clip": draw(st.sampled_from(["pair", "task", "none"])),
        "sampling": draw(st.sampled_from(["uniform", "proportional"])),
    }
    step = st.tuples(st.lists(st.integers(0, 6), min_size=k, max_size=k), st.lists(EXCESS, min_size=k, max_size=k))
    return arguments, draw(st.lists(step, min_size=1, max_size=8))


def built(arguments, order=slice(None)):
    strategy = build_strategy(**{**arguments, "task_sizes": np.array(arguments["task_sizes"])[order]})
    strategy.set_horizon(100, math.log(2))
    return strategy


def observe(strategy, step, order=slice(None)):
    counts, means = (np.array(values, dtype=float)[order] for values in step)
    p = strategy.probabilities()
    counts[p < 1e-6] = 0  # what has hardly any probability is not drawn
    sums = counts * means
    if getattr(strategy, "excess_clip", "pair") == "pair":
        sums = np.maximum(sums, 0.0)
    strategy.observe(StepStatistics(counts, sums, sums, p))


def shares(strategy):
    return strategy.probabilities(), strategy.loss_weights(), strategy.mixture_weights()


@given(runs())
def test_probabilities_are_some_after_any_step(run):
    arguments, steps = run
    strategy = built(arguments)
    for step in steps:
        observe(strategy, step)
        p, weights, alpha = shares(strategy)
        assert abs(p.sum() - 1) < 1e-14 and (p >= 0).all()
        assert abs(alpha.sum() - 1) < 1e-14 and (alpha >= 0).all()
        assert np.isfinite(weights).all() and (weights >= 0).all()
        if arguments["name"] == "ama_s":
            assert p.min() >= arguments["smoothing"] / len(p) * (1 - 1e-12)
        json.dumps(strategy.state_dict(), allow_nan=False)


@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(run, random):
    arguments, steps = run
    order = np.array(random.sample(range(len(arguments["task_sizes"])), len(arguments["task_sizes"])))
    ours, theirs = built(arguments), built(arguments, order)
    for step in steps:
        observe(ours, step)
        observe(theirs, step, order)
        for mine, other in zip(shares(ours), shares(theirs), strict=True):
            np.testing.assert_allclose(other, mine[order], rtol=1e-8, atol=1e-300)


@given(runs(), st.data())
def test_a_strategys_state_goes_on_exactly(run, data):
    arguments, steps = run
    stop = data.draw(st.integers(0, len(steps)))
    ours, resumed = built(arguments), built(arguments)
    for step in steps[:stop]:
        observe(ours, step)
    resumed.load_state_dict(json.loads(json.dumps(ours.state_dict(), allow_nan=False)))
    for step in [*steps[stop:], steps[0]]:
        observe(ours, step)
        observe(resumed, step)
        for mine, other in zip(shares(ours), shares(resumed), strict=True):
            np.testing.assert_array_equal(other, mine)
    assert resumed.state_dict() == ours.state_dict()


# ---- The sampler ----


class Loader:
    """The order of things in a Trainer around a mixture: batches are read ahead, a step pops its block, a state is saved.

    Args:
        task_ids: Task of each row. # (N,)
        name, micro, accumulation, drop_last, ahead, seed: Strategy, batch size, batches of a step, whether an epoch's incomplete
            batch is dropped, batches read ahead, seed.
    """

    def __init__(self, task_ids, name, micro, accumulation, drop_last, ahead, seed):
        self.task_ids, self.num_tasks = np.array(task_ids), max(task_ids) + 1
        self.micro, self.accumulation, self.drop_last, self.ahead = micro, accumulation, drop_last, ahead
        strategy = build_strategy(name, np.bincount(task_ids), mixing_lr=0.3)
        self.mixture = Mixture(strategy, [str(task) for task in range(self.num_tasks)], 0.7)
        length = len(task_ids)
        self.mixture.sampler = TaskMixtureSampler(
            self.task_ids,
            strategy,
            micro * accumulation,
            seed,
            epoch_draws=length - length % micro if drop_last else length,
        )
        batches = length // micro + (length % micro > 0 and not drop_last)
        self.per_epoch = math.ceil(batches / accumulation)

    def train(self, epochs, state=None, done=0):
        """The rows of each step, the p that they were drawn with, and the state after it."""
        if state is None:
            self.mixture.begin(100)
        else:
            self.mixture.resume(100, json.loads(state), skips_data=True)
        first, skipped = divmod(done, self.per_epoch)
        steps = []
        for _ in range(first, epochs):
            batches, queue = self._batches(), deque()
            for _ in range(skipped * self.accumulation):
                next(batches)
            for _ in range(skipped, self.per_epoch):
                queue.extend(itertools.islice(batches, self.accumulation + self.ahead - len(queue)))
                rows = [row for _ in range(min(self.accumulation, len(queue))) for row in queue.popleft()]
                steps.append((rows, *self._finish(rows)))
            skipped = 0
        return steps

    def _batches(self):
        rows = iter(self.mixture.sampler)
        while batch := list(itertools.islice(rows, self.micro)):
            if len(batch) == self.micro or not self.drop_last:
                yield batch

    def _finish(self, rows):
        p = self.mixture.sampler.pop_trained()
        counts = np.bincount(self.task_ids[rows], minlength=self.num_tasks)
        sums = np.bincount(self.task_ids[rows], weights=np.array(rows) % 7 / 3.0, minlength=self.num_tasks)
        self.mixture.strategy.observe(StepStatistics(counts, sums, sums, p))
        return p.tolist(), json.dumps(self.mixture.state_dict(), allow_nan=False)


@st.composite
def loaders(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    task_ids = np.repeat(np.arange(len(sizes)), sizes)
    if draw(st.booleans()):
        task_ids = np.random.default_rng(draw(st.integers(0, 99))).permutation(task_ids)
    arguments = {
        "task_ids": task_ids.tolist(),
        "name": draw(st.sampled_from([*ADAPTIVE, "uniform"])),
        "micro": draw(st.integers(1, 6)),
        "accumulation": draw(st.integers(1, 3)),
        "drop_last": draw(st.booleans()),
        "ahead": draw(st.integers(0, 5)),
        "seed": draw(st.integers(0, 2**40)),
    }
    assume(len(task_ids) >= arguments["micro"])  # else an epoch has no batch
    return arguments


@given(loaders())
def test_a_pass_over_a_task_is_without_replacement(arguments):
    loader = Loader(**{**arguments, "drop_last": False})
    rows = np.array([row for drawn, *_ in loader.train(epochs=4) for row in drawn])
    assert len(rows) == 4 * len(loader.task_ids)  # an epoch is N draws, also where its last block is short
    for task in range(loader.num_tasks):
        mine, drawn = np.flatnonzero(loader.task_ids == task), rows[loader.task_ids[rows] == task]
        for start in range(0, len(drawn), len(mine)):
            one_pass = drawn[start : start + len(mine)]
            assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(mine)


@settings(max_examples=60)
@given(loaders(), st.data())
def test_resumed_anywhere_it_is_the_undisturbed_run(arguments, data):
    undisturbed = Loader(**arguments).train(epochs=3)
    stop = data.draw(st.integers(1, len(undisturbed)))
    resumed = Loader(**arguments).train(3, undisturbed[stop - 1][2], done=stop)
    assert resumed == undisturbed[stop:]
    if len(resumed) > 1:  # and once more, from a state of the resumed run
        again = data.draw(st.integers(1, len(resumed) - 1))
        assert Loader(**arguments).train(3, resumed[again - 1][2], done=stop + again) == undisturbed[stop + again :]


@given(loaders(), st.integers(1, 3))
def test_draws_do_not_depend_on_how_steps_are_cut(arguments, accumulation):
    """A step of a·m pairs is the same in batches of m or in one."""
    block = arguments["micro"] * accumulation
    ahead = {**arguments, "drop_last": False, "ahead": 0}
    cut = Loader(**{**ahead, "accumulation": accumulation})
    whole = Loader(**{**ahead, "micro": block, "accumulation": 1})
    assert [rows for rows, *_ in cut.train(2)] == [rows for rows, *_ in whole.train(2)]
