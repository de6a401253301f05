"""In the convex case the duality gap falls as T^(−1/2) under AMA-R and AMA-S, and stays where it is without them."""

import math

import numpy as np
import pytest
import torch
from convex_case import (
    BETA,
    DIMENSIONS,
    PAIRS,
    RADIUS,
    gaps,
    make_game,
    minimize_in_ball,
    play,
    slope,
)

from trl_ama.dpo.losses import PairLogProbs, PreferenceLossConfig, excess_losses, pair_losses


HORIZONS, SEEDS = [200, 800, 3200, 12_800], [0, 1, 2, 3]


@pytest.fixture(scope="module")
def game():
    return make_game(0)


# ---- The case is what it says ----


@pytest.mark.parametrize("clip", ["pair", "none"])
def test_losses_are_the_packages(clip):
    """A pair's log-ratio difference is θ·x; split over the two answers it is the package's own DPO loss and excess."""
    game = make_game(1, clip=clip == "pair")
    theta = np.array([0.4, -1.1, 0.3])
    logratio = torch.tensor(game.pairs @ theta).flatten()
    zero, one = torch.zeros_like(logratio), torch.ones_like(logratio)
    pair = PairLogProbs(0.3 * logratio - 5, -0.7 * logratio - 9, zero - 5, zero - 9, one, one)
    losses = pair_losses(pair, PreferenceLossConfig(["sigmoid"], beta=BETA))
    expected = excess_losses(losses, torch.tensor(game.references).flatten(), clip).reshape(3, PAIRS).mean(dim=1)
    np.testing.assert_allclose(game.excess(theta)[0], expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_gradients_agree_with_differences(clip):
    game = make_game(1, clip)
    theta = np.array([0.4, -1.1, 0.3])
    gradient = game.excess(theta)[1]
    for axis in range(DIMENSIONS):
        step = 1e-6 * np.eye(DIMENSIONS)[axis]
        difference = (game.excess(theta + step)[0] - game.excess(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, axis], difference, atol=1e-6)


def test_specialists_have_no_excess_on_average_and_the_base_has():
    plain = make_game(0, clip=False)
    reference = plain.references.mean(axis=1)
    assert (reference < math.log(2) - 0.05).all()
    for direction in np.random.default_rng(0).normal(size=(200, DIMENSIONS)):
        theta = RADIUS * direction / np.linalg.norm(direction)
        for point in (theta, 0.6 * theta):
            assert (plain.excess(point)[0] > -1e-6).all()  # nobody in the ball is better than the specialists


@pytest.mark.parametrize("seed", SEEDS)
def test_the_minimax_solution_is_interior(seed):
    game = make_game(seed)
    value, theta = game.saddle()
    assert np.linalg.norm(theta) < 0.9 * RADIUS
    # All tasks are equally bad there, so each has a share in the mixture
    np.testing.assert_allclose(game.excess(theta)[0], value, atol=1e-4)
    # and the uniform mixture is not the worst: its best response does better than the value of the game
    assert game.best_response(np.full(3, 1 / 3))[1] < value - 0.01


def test_the_ellipsoid_method_finds_known_minima():
    # |x₀ − 0.5| + 2·|x₁ + 0.25| + (x₂ − 1)²: not smooth, minimum 0 inside
    def kinked(x):
        value = abs(x[0] - 0.5) + 2 * abs(x[1] + 0.25) + (x[2] - 1) ** 2
        return value, np.array([np.sign(x[0] - 0.5), 2 * np.sign(x[1] + 0.25), 2 * (x[2] - 1)])

    lower, upper, best = minimize_in_ball(kinked, 3)
    assert lower <= 0 <= upper <= 1e-6
    np.testing.assert_allclose(best, [0.5, -0.25, 1.0], atol=2e-3)
    # Linear: −‖g‖·R on the sphere, for the constraint binds
    lower, upper, _ = minimize_in_ball(lambda x: (x @ [3.0, 0.0, 4.0], np.array([3.0, 0.0, 4.0])), 3)
    assert lower <= -5 * RADIUS <= upper <= lower + 1e-6


def test_the_gap_is_never_negative_and_vanishes_at_the_saddle(game):
    rng = np.random.default_rng(2)
    for _ in range(20):
        theta = rng.normal(size=3)
        assert game.duality_gap(theta / max(1, np.linalg.norm(theta) / RADIUS), rng.dirichlet(np.ones(3))) > 0
    # At the minimax θ the α that balances the tasks' gradients is the maximin one
    _, theta = game.saddle()
    gradients = game.excess(theta)[1]
    system = np.vstack([gradients.T, np.ones(3)])
    alpha = np.linalg.lstsq(system, np.array([0, 0, 0, 1.0]), rcond=None)[0]
    assert (alpha > 0.1).all()
    assert game.duality_gap(theta, alpha / alpha.sum()) < 1e-3


# ---- The rate ----


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_the_gap_falls_as_one_over_root_t(name):
    gap = gaps(name, HORIZONS, SEEDS)
    fitted, error = slope(HORIZONS, gap)
    means = np.exp(np.log(gap).mean(axis=0))
    assert (np.diff(means) < 0).all(), means
    assert means[-1] < 0.25 * means[0]  # (200/12800)^½ = 0.125
    assert -0.75 < fitted < -0.35, f"slope {fitted:.3f} ± {error:.3f}"
    assert error < 0.1


def test_without_an_adversary_the_gap_stays_open(game):
    """The uniform mixture's gap cannot fall below what the minimax mixture is worse than uniform."""
    value, _ = game.saddle()
    floor = value - game.best_response(np.full(3, 1 / 3))[1]
    outcome = play(game, "uniform", 3200, 0)
    np.testing.assert_allclose(outcome.alpha, [1 / 3] * 3)
    uniform = game.duality_gap(outcome.theta, outcome.alpha)
    assert uniform >= floor > 0.01
    adversary = play(game, "ama_s", 3200, 0)
    assert game.duality_gap(adversary.theta, adversary.alpha) < 0.5 * uniform
