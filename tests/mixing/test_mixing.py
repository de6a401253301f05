"""Mixing strategies: hand-worked numbers, unbiasedness by simulation, and what must never happen."""

import itertools
import json
import math

import numpy as np
import pytest

from trl_ama.common.errors import AMAError
from trl_ama.dpo.losses import excess_losses
from trl_ama.mixing import STRATEGIES, StepStatistics, build_strategy
from trl_ama.mixing.monitor import MixtureMonitor
from trl_ama.sampling.sampler import TaskMixtureSampler


THIRDS = [1 / 3, 1 / 3, 1 / 3]


def seen(counts, excess_sums, probabilities, loss_sums=None) -> StepStatistics:
    """A step's statistics; loss sums default to zero, because no strategy here reads them."""
    counts = np.asarray(counts, dtype=float)
    losses = np.zeros(len(counts)) if loss_sums is None else np.asarray(loss_sums, dtype=float)
    return StepStatistics(counts, losses, np.asarray(excess_sums, dtype=float), np.asarray(probabilities, dtype=float))


# ---- Fixed mixtures ----


def test_proportional_hand_worked():
    strategy = build_strategy("proportional", [10, 30, 60])
    np.testing.assert_allclose(strategy.probabilities(), [0.1, 0.3, 0.6])
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1, 1])
    np.testing.assert_allclose(strategy.mixture_weights(), [0.1, 0.3, 0.6])
    assert not strategy.uses_own_sampler and strategy.objective == "loss"


def test_uniform_hand_worked():
    strategy = build_strategy("uniform", [10, 30, 60, 100])
    np.testing.assert_allclose(strategy.probabilities(), [0.25, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1, 1, 1])
    assert strategy.uses_own_sampler and strategy.objective == "loss"


def test_task_normalized_hand_worked():
    # N = 100, k = 3: weights 100/(3·10) = 10/3, 100/(3·30) = 10/9, 100/(3·60) = 5/9
    strategy = build_strategy("task_normalized", [10, 30, 60])
    np.testing.assert_allclose(strategy.probabilities(), [0.1, 0.3, 0.6])
    np.testing.assert_allclose(strategy.loss_weights(), [10 / 3, 10 / 9, 5 / 9])
    np.testing.assert_allclose(strategy.mixture_weights(), THIRDS)  # every task counts the same
    assert not strategy.uses_own_sampler and strategy.objective == "loss"


@pytest.mark.parametrize("name", ["proportional", "uniform", "task_normalized"])
def test_fixed_mixtures_learn_nothing(name):
    strategy = build_strategy(name, [10, 30])
    before = strategy.probabilities(), strategy.loss_weights()
    strategy.observe(seen([1, 7], [5.0, 0.1], [0.5, 0.5]))
    np.testing.assert_array_equal(strategy.probabilities(), before[0])
    np.testing.assert_array_equal(strategy.loss_weights(), before[1])


# ---- AMA-R ----


def test_ama_r_one_and_two_steps():
    # k = 2, η = 1. Step 1: task 0 has 2 pairs of total excess 2 ln 2 (mean ln 2), task 1 has 6 of total 0.
    #   α ∝ (½·2, ½·1) → (2/3, 1/3)
    # Step 2: means ln 3 for task 1, 0 for task 0: α ∝ (2/3, 1/3·3) = (2/3, 1) → (0.4, 0.6)
    strategy = build_strategy("ama_r", [5, 50], mixing_lr=1.0)
    np.testing.assert_allclose(strategy.mixture_weights(), [0.5, 0.5])
    np.testing.assert_allclose(strategy.loss_weights(), [1.0, 1.0])
    strategy.observe(seen([2, 6], [2 * math.log(2), 0.0], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.mixture_weights(), [2 / 3, 1 / 3])
    np.testing.assert_allclose(strategy.loss_weights(), [4 / 3, 2 / 3])  # α / ½
    strategy.observe(seen([1, 7], [0.0, 7 * math.log(3)], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.4, 0.6])
    np.testing.assert_allclose(strategy.loss_weights(), [0.8, 1.2])
    np.testing.assert_array_equal(strategy.probabilities(), [0.5, 0.5])  # its draws are fixed


def test_ama_r_takes_the_mean_and_not_the_importance_weighted_sum():
    # A mean of ln 2 is a factor of 2 whatever p and the counts were: the same result as above with another p
    strategy = build_strategy("ama_r", [5, 50], mixing_lr=1.0)
    strategy.observe(seen([1, 19], [math.log(2), 0.0], [0.05, 0.95]))
    np.testing.assert_allclose(strategy.mixture_weights(), [2 / 3, 1 / 3])


def test_ama_r_absent_task_keeps_its_weight_up_to_renormalisation():
    # Task 2 is not drawn: α ∝ (2, 4, 1)/3 → (2/7, 4/7, 1/7). Its factor is exp(0), as if its excess had been 0.
    strategy = build_strategy("ama_r", [9, 9, 9], mixing_lr=1.0)
    strategy.observe(seen([1, 1, 0], [math.log(2), math.log(4), 0.0], THIRDS))
    np.testing.assert_allclose(strategy.mixture_weights(), [2 / 7, 4 / 7, 1 / 7])
    # Before the renormalisation only task 0 changes in the next step: the ratio of the absent two stays 4
    strategy.observe(seen([3, 0, 0], [3 * math.log(3.5), 0.0, 0.0], THIRDS))
    np.testing.assert_allclose(strategy.mixture_weights(), [7 / 12, 4 / 12, 1 / 12])


def test_ama_r_proportional_draws_hand_worked():
    # p = (0.2, 0.8); first α = (½, ½): weights α/p = (2.5, 0.625)
    strategy = build_strategy("ama_r", [10, 40], mixing_lr=2.0, sampling="proportional")
    np.testing.assert_allclose(strategy.probabilities(), [0.2, 0.8])
    np.testing.assert_allclose(strategy.loss_weights(), [2.5, 0.625])
    # η = 2, mean ½·ln 3 → factor 3: α = (¾, ¼), weights (3.75, 0.3125)
    strategy.observe(seen([2, 8], [math.log(3), 0.0], [0.2, 0.8]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.75, 0.25])
    np.testing.assert_allclose(strategy.loss_weights(), [3.75, 0.3125])


# ---- AMA-S ----


def test_ama_s_one_and_two_steps():
    # k = 2, c = 0.2, η = 1. Step 1, drawn with (½, ½), |B| = 4: excess sums (2 ln 3, 0) → r̂ = (2 ln 3 / (4·½), 0)
    #   = (ln 3, 0): q = (¾, ¼), p = 0.8·(¾, ¼) + 0.1 = (0.7, 0.3)
    # Step 2, drawn with (0.7, 0.3), |B| = 10: sums (0, 3 ln 9) → r̂ = (0, 3 ln 9 / (10·0.3)) = (0, ln 9):
    #   q ∝ (¾, ¼·9) = (3, 9)/4 → (¼, ¾), p = (0.3, 0.7)
    strategy = build_strategy("ama_s", [5, 50], mixing_lr=1.0, smoothing=0.2)
    np.testing.assert_allclose(strategy.probabilities(), [0.5, 0.5])
    strategy.observe(seen([2, 2], [2 * math.log(3), 0.0], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.75, 0.25])
    np.testing.assert_allclose(strategy.probabilities(), [0.7, 0.3])
    strategy.observe(seen([7, 3], [0.0, 3 * math.log(9)], [0.7, 0.3]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.25, 0.75])
    np.testing.assert_allclose(strategy.probabilities(), [0.3, 0.7])
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1])  # the θ-step is the plain mean


def test_ama_s_uses_the_p_that_the_pairs_were_drawn_with():
    # After step 1 today's p is (0.7, 0.3), but the loader had drawn step 2 ahead with (½, ½): r̂ = (0, ln 3 · 2/(4·½))
    # = (0, ln 3), so q returns to (½, ½). With today's p it would be (0, ln 3 · 2/(4·0.3)).
    strategy = build_strategy("ama_s", [5, 50], mixing_lr=1.0, smoothing=0.2)
    strategy.observe(seen([2, 2], [2 * math.log(3), 0.0], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.probabilities(), [0.7, 0.3])
    strategy.observe(seen([2, 2], [0.0, 2 * math.log(3)], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.5, 0.5])


def test_ama_s_extremes_of_smoothing():
    # c = 1 draws uniformly for ever; c = 0 draws with q itself
    step = seen([1, 1], [math.log(3), 0.0], [0.5, 0.5])  # r̂ = (ln 3, 0)
    for smoothing, expected in ((1.0, [0.5, 0.5]), (0.0, [0.75, 0.25])):
        strategy = build_strategy("ama_s", [5, 50], mixing_lr=1.0, smoothing=smoothing)
        strategy.observe(step)
        np.testing.assert_allclose(strategy.probabilities(), expected)


def test_ama_s_ignores_a_step_without_pairs_and_a_task_with_vanished_probability():
    strategy = build_strategy("ama_s", [5, 50], mixing_lr=1.0, smoothing=0.0)
    strategy.observe(seen([0, 0], [0.0, 0.0], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.mixture_weights(), [0.5, 0.5])
    strategy.observe(seen([4, 0], [4 * math.log(3), 0.0], [1.0, 0.0]))  # 0/0 for task 1
    np.testing.assert_allclose(strategy.mixture_weights(), [0.75, 0.25])


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
def test_ama_s_probabilities_never_fall_below_the_floor(smoothing):
    rng = np.random.default_rng(3)
    strategy = build_strategy("ama_s", [5, 50, 500, 5000], mixing_lr=5.0, smoothing=smoothing)
    lowest = 1.0
    for _ in range(300):
        p = strategy.probabilities()
        assert abs(p.sum() - 1) < 1e-12
        lowest = min(lowest, p.min())
        counts = rng.multinomial(16, p)
        strategy.observe(seen(counts, counts * np.array([0.9, 0.1, 0.1, 0.1]), p))
    floor = smoothing / 4
    assert floor * (1 - 1e-12) <= lowest < floor * 1.01  # held, and reached


def test_r_hat_is_unbiased_under_the_samplers_systematic_draws(monkeypatch):
    """E[r̂_i] = E_i, and AMA-R's weighted batch mean is unbiased for Σ α_i E_i, with the real sampler's blocks."""
    rng = np.random.default_rng(11)
    sizes = [40, 150, 10]
    task_ids = np.repeat([0, 1, 2], sizes)
    excess = rng.exponential([0.2, 1.0, 3.0], size=(200, 3))[np.arange(200), task_ids]
    expected = np.array([excess[task_ids == task].mean() for task in range(3)])
    strategy = build_strategy("ama_s", sizes, mixing_lr=1.0, smoothing=0.3)
    strategy.observe(seen([3, 3, 1], [0.0, 2.0, 1.0], THIRDS))  # away from the uniform start
    p = strategy.probabilities()
    assert p.max() > 0.4 and p.min() < 0.3  # else the division by p would not be tested
    # |B| = 7: 7·p_i is no whole number, so the counts are random
    estimates, weighted = [], []
    monkeypatch.setattr(strategy, "_ascend", estimates.append)  # r̂ as it is; and p stays as it is
    alpha = np.array([0.5, 0.2, 0.3])
    for seed in range(4000):
        rows = list(itertools.islice(TaskMixtureSampler(task_ids, strategy, block_size=7, seed=seed), 7))
        counts = np.bincount(task_ids[rows], minlength=3)
        sums = np.bincount(task_ids[rows], weights=excess[rows], minlength=3)
        strategy.observe(seen(counts, sums, p))
        weighted.append(((alpha / p)[task_ids[rows]] * excess[rows]).mean())
    estimates = np.array(estimates)
    error = estimates.std(axis=0) / math.sqrt(len(estimates))
    assert (np.abs(estimates.mean(axis=0) - expected) < 3.5 * error).all()
    assert (error < 0.05 * expected).all()  # sharp enough to see an error
    naive = np.array([np.mean(estimates[:, task] * p[task] * 3) for task in range(3)])  # as if p were uniform
    assert (np.abs(naive - expected) > 3.5 * error).any()
    weighted = np.array(weighted)
    assert abs(weighted.mean() - alpha @ expected) < 3.5 * weighted.std() / math.sqrt(len(weighted))


# ---- Clipping ----


def test_excess_clip_decides_which_excess_a_pair_has():
    import torch

    losses, references = torch.tensor([0.5, 1.0, 0.2]), torch.tensor([0.7, 0.4, 0.2])
    for clip, expected in (("pair", [0.0, 0.6, 0.0]), ("task", [-0.2, 0.6, 0.0]), ("none", [-0.2, 0.6, 0.0])):
        torch.testing.assert_close(excess_losses(losses, references, clip), torch.tensor(expected))


# Means (−ln 2, ln 3): without clipping α ∝ (½, 3) → (1/7, 6/7); clipped by task ∝ (1, 3) → (¼, ¾)
@pytest.mark.parametrize(("clip", "expected"), [("none", [1 / 7, 6 / 7]), ("task", [1 / 4, 3 / 4])])
@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_negative_means_lower_a_weight_only_without_clipping(name, clip, expected):
    strategy = build_strategy(name, [8, 8], mixing_lr=1.0, excess_clip=clip)
    strategy.observe(seen([4, 4], [-4 * math.log(2), 4 * math.log(3)], [0.5, 0.5]))  # for ama_s r̂ is the same
    np.testing.assert_allclose(strategy.mixture_weights(), expected)


def test_task_clip_closes_and_reopens_a_tasks_gradient():
    strategy = build_strategy("ama_s", [8, 8], mixing_lr=1e-9, excess_clip="task")
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1])  # nothing seen yet: open
    strategy.observe(seen([2, 2], [-0.2, 0.4], [0.5, 0.5]))  # followed means (−0.1, 0.2)
    np.testing.assert_array_equal(strategy.loss_weights(), [0, 1])
    strategy.observe(seen([0, 4], [0.0, 0.4], [0.5, 0.5]))  # not drawn: nothing new about task 0
    np.testing.assert_array_equal(strategy.loss_weights(), [0, 1])
    # The mean is followed over about ten steps: −0.1 + (0.8 + 0.1)/10 = −0.01, then −0.01 + 0.81/10 = 0.071
    strategy.observe(seen([2, 2], [1.6, 0.4], [0.5, 0.5]))
    np.testing.assert_array_equal(strategy.loss_weights(), [0, 1])
    strategy.observe(seen([2, 2], [1.6, 0.4], [0.5, 0.5]))
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1])


def test_task_clip_gates_ama_r_on_top_of_its_weights():
    strategy = build_strategy("ama_r", [8, 8], mixing_lr=1.0, excess_clip="task")
    strategy.observe(seen([2, 2], [-0.2, 2 * math.log(3)], [0.5, 0.5]))
    np.testing.assert_allclose(strategy.loss_weights(), [0.0, 1.5])  # α = (¼, ¾), p = ½
    np.testing.assert_allclose(strategy.mixture_weights(), [0.25, 0.75])  # α itself is not gated


@pytest.mark.parametrize("clip", ["pair", "none"])
def test_other_clips_never_close_a_task(clip):
    strategy = build_strategy("ama_s", [8, 8], mixing_lr=1.0, excess_clip=clip)
    strategy.observe(seen([2, 2], [-1.0, -1.0], [0.5, 0.5]))
    np.testing.assert_array_equal(strategy.loss_weights(), [1, 1])


# ---- Step size ----


# k = 4, T = 200, range ln 2: √(2·1.386294/(200·4)) = 0.0588705, √(2·1.386294/200) = 0.1177410; both / 0.693147
@pytest.mark.parametrize(("name", "expected"), [("ama_s", 0.0849322), ("ama_r", 0.1698644)])
def test_auto_lr_hand_worked(name, expected):
    strategy = build_strategy(name, [1, 2, 3, 4])
    strategy.set_horizon(200, math.log(2))
    assert strategy.mixing_lr == pytest.approx(expected, rel=1e-5)
    strategy.set_horizon(800, math.log(2))  # four times as long: half of it
    assert strategy.mixing_lr == pytest.approx(expected / 2, rel=1e-5)
    strategy.set_horizon(200, 2 * math.log(2))  # twice the range: half of it
    assert strategy.mixing_lr == pytest.approx(expected / 2, rel=1e-5)


def test_a_given_lr_stays():
    strategy = build_strategy("ama_s", [1, 2], mixing_lr=0.3)
    strategy.set_horizon(200, 0.7)
    assert strategy.mixing_lr == 0.3


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_auto_lr_needs_a_horizon_first(name):
    with pytest.raises(AMAError, match="set_horizon"):
        build_strategy(name, [1, 2]).observe(seen([1, 1], [0.1, 0.2], [0.5, 0.5]))


# ---- State ----


@pytest.mark.parametrize("clip", ["pair", "task"])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_state_survives_json_and_continues_exactly(name, clip):
    rng = np.random.default_rng(5)
    ours = build_strategy(name, [10, 20, 30], excess_clip=clip)
    ours.set_horizon(50, 0.7)
    steps = [seen([2, 3, 0], rng.normal(size=3) * [1, 1, 0], THIRDS) for _ in range(6)]
    for step in steps[:3]:
        ours.observe(step)
    resumed = build_strategy(name, [10, 20, 30], excess_clip=clip)
    resumed.load_state_dict(json.loads(json.dumps(ours.state_dict(), allow_nan=False)))
    for step in steps[3:]:
        ours.observe(step)
        resumed.observe(step)
        np.testing.assert_array_equal(resumed.probabilities(), ours.probabilities())
        np.testing.assert_array_equal(resumed.loss_weights(), ours.loss_weights())
        np.testing.assert_array_equal(resumed.mixture_weights(), ours.mixture_weights())
    if name.startswith("ama"):
        assert ours.mixture_weights().std() > 1e-3  # there was something to remember


def test_resumed_run_keeps_the_users_new_step_size():
    state = build_strategy("ama_r", [1, 1], mixing_lr=0.5).state_dict()
    resumed = build_strategy("ama_r", [1, 1], mixing_lr=0.25)
    resumed.load_state_dict(state)
    assert resumed.mixing_lr == 0.25


def test_state_of_another_run_is_refused_by_name():
    state = build_strategy("ama_s", [1, 2, 3], mixing_lr=1.0).state_dict()
    with pytest.raises(AMAError, match="name='ama_s'.*name='ama_r'"):
        build_strategy("ama_r", [1, 2, 3], mixing_lr=1.0).load_state_dict(state)
    with pytest.raises(AMAError, match="num_tasks=3.*num_tasks=2"):
        build_strategy("ama_s", [1, 2], mixing_lr=1.0).load_state_dict(state)
    with pytest.raises(AMAError, match="num_tasks=3.*num_tasks=2"):
        build_strategy("uniform", [1, 2]).load_state_dict(build_strategy("uniform", [1, 2, 3]).state_dict())


# ---- Errors ----


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_a_single_task_is_refused(name):
    with pytest.raises(AMAError, match="a single one.*mixing='proportional'"):
        build_strategy(name, [7])


@pytest.mark.parametrize("smoothing", [-0.01, 1.01, math.nan])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(AMAError, match=r"smoothing .* \[0, 1\]"):
        build_strategy("ama_s", [1, 2], smoothing=smoothing)


@pytest.mark.parametrize("mixing_lr", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_a_step_size_that_is_not_positive_is_refused(name, mixing_lr):
    with pytest.raises(AMAError, match="mixing_lr must be 'auto' or a positive number"):
        build_strategy(name, [1, 2], mixing_lr=mixing_lr)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AMAError, match="Unknown mixing 'proportionel'.*Did you mean 'proportional'"):
        build_strategy("proportionel", [1, 2])
    with pytest.raises(AMAError, match="known are .*'uniform'") as raised:
        build_strategy("xyzzy", [1, 2])
    assert "Did you mean" not in str(raised.value)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(AMAError, match="sampling must be 'uniform' or 'proportional', got 'random'"):
        build_strategy("ama_r", [1, 2], sampling="random")


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize("sizes", [[3, 0, 2], []])
def test_an_empty_task_is_refused(name, sizes):
    with pytest.raises(AMAError, match="at least one training pair"):
        build_strategy(name, sizes)


@pytest.mark.parametrize("excess", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_excess_that_is_not_finite_is_refused(name, excess):
    strategy = build_strategy(name, [1, 2], mixing_lr=1.0)
    before = strategy.probabilities()
    with pytest.raises(AMAError, match="not finite"):
        strategy.observe(seen([1, 1], [excess, 0.1], [0.5, 0.5]))
    np.testing.assert_array_equal(strategy.probabilities(), before)


# ---- Numbers ----


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_huge_excess_neither_overflows_nor_poisons(name):
    strategy = build_strategy(name, [1, 2], mixing_lr=10.0)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        strategy.observe(seen([1, 1], [1e6, 0.0], [0.5, 0.5]))
        np.testing.assert_allclose(strategy.mixture_weights(), [1.0, 0.0], atol=1e-300)
        strategy.observe(seen([1, 1], [0.0, 2e6], [0.5, 0.5]))  # and it finds its way back
    np.testing.assert_allclose(strategy.mixture_weights(), [0.0, 1.0], atol=1e-300)
    assert strategy.probabilities().sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_ten_thousand_steps_do_not_drift(name):
    """After T steps log(α_i/α_j) = η Σ (estimate_i − estimate_j): held against sums in exact arithmetic."""
    rng = np.random.default_rng(1)
    strategy = build_strategy(name, [1, 2, 3], mixing_lr=0.01)
    means = rng.exponential(size=(10_000, 3))
    for mean in means:
        strategy.observe(seen([2, 2, 2], 2 * mean, THIRDS))  # with p = 1/3, r̂_i = 2 m_i / (6/3) = m_i
    totals = np.array([math.fsum(column) for column in means.T])
    expected = np.exp(0.01 * (totals - totals.max()))
    expected /= expected.sum()
    np.testing.assert_allclose(strategy.mixture_weights(), expected, rtol=1e-9)
    assert abs(strategy.probabilities().sum() - 1) < 1e-14


def test_metrics_are_probabilities_and_weights():
    strategy = build_strategy("ama_s", [5, 50], mixing_lr=1.0, smoothing=0.2)
    strategy.observe(seen([2, 2], [2 * math.log(3), 0.0], [0.5, 0.5]))
    metrics = strategy.metrics()
    np.testing.assert_allclose(metrics["probability"], [0.7, 0.3])
    np.testing.assert_allclose(metrics["weight"], [0.75, 0.25])


# ---- The monitor ----


def watch(weights, excess, num_steps) -> list[tuple[int, str]]:
    """(step, warning) over a run; `weights` and `excess` map a step to what the monitor is shown."""
    monitor = MixtureMonitor(["code", "chat"])
    warned = []
    for step in range(1, num_steps + 1):
        warned += [
            (step, message)
            for message in monitor.update(np.array(weights(step)), np.array(excess(step), dtype=float), num_steps)
        ]
    return warned


def falling(step):
    return [2.0 / step, 2.0 / step]


def test_runaway_is_warned_about_once_and_after_patience():
    # 1,000 steps: patience is a tenth, 100 steps. Above 0.95 from step 21 on: step 120 is the 100th
    ((step, message),) = watch(lambda step: [0.04, 0.96] if step > 20 else [0.5, 0.5], falling, 1000)
    assert step == 120
    assert "Runaway" in message and "'chat'" in message and "95%" in message and "mixing_lr" in message


def test_runaway_patience_is_at_least_fifty_steps_and_interruptions_count():
    ((step, _),) = watch(lambda step: [0.99, 0.01], falling, 60)  # a tenth would be 6 steps
    assert step == 50
    assert watch(lambda step: [0.5, 0.5] if step % 50 == 0 else [0.99, 0.01], falling, 400) == []
    assert watch(lambda step: [0.95, 0.05], falling, 400) == []  # 0.95 is not above 0.95


def test_runaway_is_warned_about_for_each_task_once():
    warned = watch(lambda step: [0.99, 0.01] if step <= 200 else [0.01, 0.99], falling, 400)
    assert [step for step, _ in warned] == [50, 250]
    assert "'code'" in warned[0][1] and "'chat'" in warned[1][1]


def test_stagnation_is_warned_about_once_at_the_end():
    ((step, message),) = watch(lambda step: [0.5, 0.5], lambda step: [0.5, 0.3], 80)
    assert step == 80
    assert "Stagnation" in message and "0.400" in message and "learning_rate" in message


def test_stagnation_needs_an_excess_that_does_not_fall():
    assert watch(lambda step: [0.5, 0.5], falling, 80) == []
    # Quarters of 20 steps: 1.0 in the first, 0.97 in the last: below 98 %
    assert watch(lambda step: [0.5, 0.5], lambda step: [1.0 if step <= 40 else 0.97] * 2, 80) == []
    assert watch(lambda step: [0.5, 0.5], lambda step: [0.0, 0.0], 80) == []  # nothing left to fall
    assert watch(lambda step: [0.5, 0.5], lambda step: [0.5, 0.3], 49) == []  # too short to tell


def test_the_monitor_bears_tasks_that_a_step_did_not_draw():
    ((_, message),) = watch(lambda step: [0.5, 0.5], lambda step: [0.5, math.nan] if step % 2 else [0.5, 0.5], 80)
    assert "0.500" in message


def test_the_monitors_state_round_trip():
    """Stopped in the middle, it still knows the first quarter at the end, and does not warn twice."""
    weights, excess = np.array([0.97, 0.03]), np.array([0.5, 0.5])
    whole, parts = MixtureMonitor(["a", "b"]), MixtureMonitor(["a", "b"])
    expected = [whole.update(weights, excess, 100) for _ in range(100)]
    seen = []
    for step in range(100):
        if step in (20, 60, 99):
            state = json.loads(json.dumps(parts.state_dict()))
            parts = MixtureMonitor(["a", "b"])
            parts.load_state_dict(state)
        seen.append(parts.update(weights, excess, 100))
    assert seen == expected
    texts = [text for texts in seen for text in texts]
    assert len(texts) == 2 and "Runaway" in texts[0] and "Stagnation" in texts[1]
