"""A hundred thousand optimizer steps, and a thousand tasks."""

import json
import math

import numpy as np
import pytest
import torch
from counted_calls import PROCESS, calls_of, sampler_of
from datasets import Dataset
from tiny_models import lora
from tiny_pairs import make_rows, with_reference_columns
from tiny_runs import losses_of

from trl_ama import AMATrainer
from trl_ama.mixing import STRATEGIES, StepStatistics, build_strategy
from trl_ama.sampling.mixture import Mixture


pytestmark = pytest.mark.slow


STEPS = 100_000


def step_of(means, p):
    counts = np.full(len(means), 4.0)
    # AMA-S divides by p · |B|: with these sums its estimate is the mean, whatever p is
    sums = means * p * counts.sum()
    return StepStatistics(counts, sums, sums, p)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_hundred_thousand_steps(name):
    """Σ p stays 1 to the last bits; log(α_i/α_j) is η Σ (e_i − e_j) as exact sums have it; a state of any moment goes on."""
    rng = np.random.default_rng(0)
    strategy = build_strategy(name, [10, 20, 70], mixing_lr=0.01)
    means = rng.exponential(size=(STEPS, 3))
    stop, resumed = int(rng.integers(STEPS * 9 // 10, STEPS)), None
    worst = 0.0
    for number, mean in enumerate(means):
        if number == stop:
            resumed = build_strategy(name, [10, 20, 70], mixing_lr=0.01)
            resumed.load_state_dict(json.loads(json.dumps(strategy.state_dict(), allow_nan=False)))
        p = strategy.probabilities()
        worst = max(worst, abs(p.sum() - 1))
        # AMA-R takes the mean of the pairs
        step = step_of(mean, p) if name == "ama_s" else StepStatistics(np.full(3, 4.0), 4 * mean, 4 * mean, p)
        strategy.observe(step)
        if resumed is not None:
            resumed.observe(step)
    assert worst <= 4 * np.finfo(float).eps
    np.testing.assert_array_equal(resumed.mixture_weights(), strategy.mixture_weights())
    np.testing.assert_array_equal(resumed.probabilities(), strategy.probabilities())
    if name.startswith("ama"):
        totals = np.array([math.fsum(column) for column in means.T])
        expected = np.exp(0.01 * (totals - totals.max()))
        np.testing.assert_allclose(strategy.mixture_weights(), expected / expected.sum(), rtol=1e-8)


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_a_task_that_was_ignored_for_long_comes_back(name):
    """After 5,000 steps its α is below what a float can hold, and its logarithm is not: no task is lost for ever."""
    strategy = build_strategy(name, [1, 1], mixing_lr=0.5)
    for excess, steps in (((0.5, 0.0), 5000), ((0.0, 5.0), 510)):
        for _ in range(steps):
            p = strategy.probabilities()
            sums = np.array(excess) * (p * 8.0 if name == "ama_s" else 4.0)
            strategy.observe(StepStatistics(np.full(2, 4.0), sums, sums, p))
        if excess[0]:
            assert strategy.mixture_weights()[1] == 0.0  # exp(−1250)
            assert strategy.state_dict()["log_weights"][1] == pytest.approx(-0.5 * 0.5 * 5000, rel=1e-9)
            if name == "ama_s":
                assert strategy.probabilities()[1] == pytest.approx(0.05)  # c / k: it is still drawn
    assert strategy.mixture_weights()[1] > 0.99


# ---- A thousand tasks ----


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_step_costs_with_a_thousand_tasks(name):
    """Drawing, recording, observing, watching and naming the figures: hardly more calls than with ten."""
    calls = {}
    for num_tasks in (10, 1000):
        sampler = sampler_of(np.repeat(np.arange(num_tasks), 100), num_tasks, name)
        mixture = Mixture(sampler._strategy, [f"task{number}" for number in range(num_tasks)], 0.7)
        mixture.begin(1000)
        mixture.sampler, rows = sampler, iter(sampler)

        def step(mixture=mixture, rows=rows):
            tasks = torch.tensor([next(rows) // 100 for _ in range(32)])
            losses = torch.full((32,), 0.5)
            mixture.recorder.add(tasks, losses, losses, losses)
            mixture.finish_step(PROCESS)

        step()
        calls[num_tasks] = calls_of(step)
        p = mixture.strategy.probabilities()
        assert abs(p.sum() - 1) < 1e-12 and p.min() > 0
    assert calls[1000] < calls[10] + 32 * 20  # each of the 32 pairs begins the pass over another task


def test_a_trainer_with_a_thousand_tasks(model_dir, quick_args):
    rows = [{**row, "task": f"task{number % 1000:03d}"} for number, row in enumerate(make_rows("list", 2000, seed=0))]
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="ama_s", max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=with_reference_columns(Dataset.from_list(rows)),
        peft_config=lora(),
    )
    trainer.train()
    assert len(losses_of(trainer)) == 2 and len(trainer.task_names) == 1000
    p = trainer.strategy.probabilities()
    assert abs(p.sum() - 1) < 1e-12 and len(np.unique(p)) > 2  # those of two steps have moved
    entry = trainer.state.log_history[0]
    assert sum(key.startswith("ama/weight/") for key in entry) == 1000
    assert sum(key.startswith("ama/excess/") for key in entry) == 8  # the tasks of the step's pairs
