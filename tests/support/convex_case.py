"""The convex case: DPO with a linear log-ratio on synthetic tasks in conflict, where theory promises O(1/√T).

A policy whose log-ratio to the reference is linear in its parameters θ has the DPO loss −log σ(β θ·x) of a pair with
feature difference x (chosen minus rejected). It is convex in θ, and so is the excess over a fixed reference loss, clipped
or not. The game min_θ max_α Σ_i α_i E_i(θ) then has a value, and averaged iterates of stochastic θ-descent against the
strategies' α-ascent should close the duality gap

    gap(θ̄, ᾱ) = max_i E_i(θ̄) − min_θ Σ_i ᾱ_i E_i(θ)

at a rate of T^(−1/2). Here θ is descended by projected SGD, α is the business of the package's own strategies, and the
gap is computed by the ellipsoid method, which bounds its own error.

    python tests/support/convex_case.py            # prints a table of gaps and fitted slopes
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trl_ama.mixing import StepStatistics, build_strategy


BETA = 1.0
RADIUS = 2.0  # θ lives in this ball
PAIRS, DIMENSIONS, BATCH = 200, 3, 32
# Where each task's feature differences point, how far, and how much they scatter. They pull in three directions, and task
# 0 with the shortest step is the hardest to please, so that the minimax mixture is neither a corner nor uniform.
DIRECTIONS = np.array([[1.0, 0.0, 0.15], [-1.0, 0.6, 0.15], [-0.2, -1.2, 0.15]])
LENGTHS = np.array([0.5, 2.0, 1.2])
SCATTER = 0.8


def log1p_exp(values: np.ndarray) -> np.ndarray:
    """log(1 + exp(v)) without overflow."""
    return np.logaddexp(0.0, values)


@dataclass
class Game:
    """Tasks of pairs, and the reference losses that excess is counted from.

    Args:
        pairs (`np.ndarray`): Feature differences of each task's pairs. # (k, n, d)
        references (`np.ndarray`): Reference loss ℓ* of each pair. # (k, n)
        clip (`bool`): Whether excess is clipped at zero per pair.
    """

    pairs: np.ndarray
    references: np.ndarray
    clip: bool

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """DPO loss of every pair. # (k, n)"""
        return log1p_exp(-BETA * (self.pairs @ theta))

    def excess(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean excess of each task and its (sub)gradient. # (k,), (k, d)"""
        margins = BETA * (self.pairs @ theta)  # (k, n)
        excess = log1p_exp(-margins) - self.references
        slopes = -BETA / (1.0 + np.exp(margins))
        if self.clip:
            slopes = np.where(excess > 0, slopes, 0.0)
            excess = np.maximum(excess, 0.0)
        return excess.mean(axis=1), np.einsum("kn,knd->kd", slopes, self.pairs) / self.pairs.shape[1]

    def best_response(self, alpha: np.ndarray) -> tuple[float, float]:
        """min_θ Σ α_i E_i(θ) as (lower bound, upper bound)."""

        def weighted(theta):
            values, gradients = self.excess(theta)
            return alpha @ values, alpha @ gradients

        lower, upper, _ = minimize_in_ball(weighted, self.pairs.shape[2])
        return lower, upper

    def saddle(self) -> tuple[float, np.ndarray]:
        """The value of the game and a minimax θ, from min_θ max_i E_i(θ)."""

        def worst(theta):
            values, gradients = self.excess(theta)
            return values.max(), gradients[values.argmax()]

        _, upper, theta = minimize_in_ball(worst, self.pairs.shape[2])
        return upper, theta

    def duality_gap(self, theta: np.ndarray, alpha: np.ndarray) -> float:
        """max_i E_i(θ) − min_θ' Σ α_i E_i(θ'), from above by at most the tolerance of the minimisation."""
        return float(self.excess(theta)[0].max() - self.best_response(alpha)[0])


def minimize_in_ball(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]], dimensions: int, tolerance: float = 1e-6
) -> tuple[float, float, np.ndarray]:
    """Minimise a convex function over the ball of `RADIUS` by the ellipsoid method, smooth or not.

    Args:
        function: θ → value and subgradient.
        dimensions (`int`): d; a handful, for the method takes of the order of d² steps per digit.
        tolerance (`float`): Stop once lower and upper bound are this close.

    Returns:
        A lower bound of the minimum, an upper bound that a θ of the ball attains, and that θ.
    """
    d = dimensions
    # The ellipsoid {x: (x − c)ᵀ P⁻¹ (x − c) ≤ 1} that holds the minimum: first the ball and a little more, so that rounding
    # never leaves out a minimum on the sphere
    center, shape = np.zeros(d), (1.01 * RADIUS) ** 2 * np.eye(d)
    lower, upper, best = -math.inf, math.inf, center
    for _ in range(100_000):
        if center @ center > RADIUS**2:  # outside: cut away the half-space beyond
            gradient = center / np.linalg.norm(center)
        else:
            value, gradient = function(center)
            if value < upper:
                upper, best = value, center
            # Convexity: nowhere in the ellipsoid, which holds the minimum, is it lower than this
            lower = max(lower, value - math.sqrt(max(gradient @ shape @ gradient, 0.0)))
            if upper - lower <= tolerance:
                return lower, upper, best
        step = shape @ gradient / math.sqrt(gradient @ shape @ gradient)
        center = center - step / (d + 1)
        shape = d**2 / (d**2 - 1.0) * (shape - 2.0 / (d + 1) * np.outer(step, step))
    raise RuntimeError("The ellipsoid method did not converge.")


def make_game(seed: int, clip: bool = True) -> Game:
    """Draw the tasks' pairs; each task's reference losses are those of its own optimum in the ball, its specialist."""
    rng = np.random.default_rng(seed)
    noise = SCATTER * rng.standard_normal((len(DIRECTIONS), PAIRS, DIMENSIONS))
    pairs = LENGTHS[:, None, None] * DIRECTIONS[:, None, :] + noise
    plain = Game(pairs, np.zeros(pairs.shape[:2]), clip=False)
    references = []
    for task in range(len(pairs)):

        def own(theta, task=task):
            values, gradients = plain.excess(theta)
            return values[task], gradients[task]

        _, _, specialist = minimize_in_ball(own, DIMENSIONS)
        references.append(plain.losses(specialist)[task])
    return Game(pairs, np.array(references), clip)


@dataclass
class Outcome:
    """Averages over a run: of θ, and of the mixture that θ descended. # (d,), (k,)"""

    theta: np.ndarray
    alpha: np.ndarray


def play(game: Game, name: str, num_steps: int, seed: int) -> Outcome:
    """Projected SGD on θ against the strategy `name`, with the step sizes that the theory gives for T steps.

    The mixture that θ descends is α for `ama_r` and the smoothed p for `ama_s`.
    """
    rng = np.random.default_rng([seed, num_steps])
    k, n, d = game.pairs.shape
    strategy = build_strategy(name, np.full(k, n), excess_clip="pair" if game.clip else "none")
    strategy.set_horizon(num_steps, math.log(2))
    # D / (G √T) with the ball's radius and a bound on the gradient; the same for both strategies
    theta_lr = RADIUS / (BETA * np.linalg.norm(game.pairs, axis=2).mean() * math.sqrt(num_steps))
    flat, references = game.pairs.reshape(k * n, d), game.references.reshape(k * n)
    theta, theta_sum, alpha_sum = np.zeros(d), np.zeros(d), np.zeros(k)
    # All randomness at once: which of its task's pairs each draw is, and a uniform number that decides the task
    draws, which = rng.random((num_steps, BATCH)), rng.integers(n, size=(num_steps, BATCH))
    for step in range(num_steps):
        p, weights = strategy.probabilities(), strategy.loss_weights()
        theta_sum += theta
        alpha_sum += p if name == "ama_s" else strategy.mixture_weights()
        tasks = np.minimum(np.searchsorted(np.cumsum(p), draws[step], side="right"), k - 1)  # (B,)
        rows = tasks * n + which[step]
        x = flat[rows]  # (B, d)
        margins = BETA * (x @ theta)
        excess = log1p_exp(-margins) - references[rows]
        slopes = -BETA * weights[tasks] / (1.0 + np.exp(margins))
        if game.clip:
            slopes = slopes * (excess > 0)
            excess = np.maximum(excess, 0.0)
        theta = theta - theta_lr * (slopes @ x) / BATCH
        norm = math.sqrt(theta @ theta)
        if norm > RADIUS:
            theta *= RADIUS / norm
        counts = np.bincount(tasks, minlength=k).astype(float)
        sums = np.bincount(tasks, weights=excess, minlength=k)
        strategy.observe(StepStatistics(counts, sums, sums, p))
    return Outcome(theta_sum / num_steps, alpha_sum / num_steps)


def gaps(name: str, horizons: list[int], seeds: list[int], clip: bool = True) -> np.ndarray:
    """Duality gaps of runs of each length; each seed has its own game. # (seeds, horizons)"""
    result = np.empty((len(seeds), len(horizons)))
    for row, seed in enumerate(seeds):
        game = make_game(seed, clip)
        for column, num_steps in enumerate(horizons):
            outcome = play(game, name, num_steps, seed)
            result[row, column] = game.duality_gap(outcome.theta, outcome.alpha)
    return result


def slope(horizons: list[int], gap: np.ndarray) -> tuple[float, float]:
    """Slope of log gap over log T and its standard error, by least squares with an intercept of each seed's own."""
    x = np.log(horizons) - np.mean(np.log(horizons))  # (horizons,)
    y = np.log(gap) - np.log(gap).mean(axis=1, keepdims=True)  # (seeds, horizons)
    fitted = (y @ x).sum() / (len(y) * (x @ x))
    residuals = y - fitted * x
    freedom = y.size - len(y) - 1
    return float(fitted), float(math.sqrt((residuals**2).sum() / freedom / (len(y) * (x @ x))))


def table(horizons: list[int], results: dict[str, np.ndarray]) -> str:
    """Markdown: geometric mean of the gaps by T, and the fitted slopes."""
    lines = ["| strategy | " + " | ".join(f"T = {t:,}" for t in horizons) + " | slope |"]
    lines.append("|---" + "|---:" * (len(horizons) + 1) + "|")
    for name, gap in results.items():
        fitted, error = slope(horizons, gap)
        means = " | ".join(f"{value:.4f}" for value in np.exp(np.log(gap).mean(axis=0)))
        lines.append(f"| {name} | {means} | {fitted:.3f} ± {error:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Duality gap over the number of steps in the convex case.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--horizons", type=int, nargs="+", default=[200, 400, 800, 1600, 3200, 6400, 12800], help="numbers of steps T"
    )
    parser.add_argument("--no_clip", action="store_true", help="count the excess unclipped")
    arguments = parser.parse_args()
    runs = {
        name: gaps(name, arguments.horizons, list(range(arguments.seeds)), clip=not arguments.no_clip)
        for name in ("ama_r", "ama_s")
    }
    print(table(arguments.horizons, runs))
