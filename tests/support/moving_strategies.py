"""Strategies that a test moves, and one that moves by what it has seen."""

import numpy as np

from trl_ama.mixing import MixingStrategy


class Fixed(MixingStrategy):
    """Any p, and a new one whenever a test says so."""

    name = "fixed"

    def __init__(self, p):
        super().__init__(np.ones(len(p)))
        self.p = np.asarray(p, dtype=float)

    def probabilities(self):
        return self.p

    def loss_weights(self):
        return np.ones(self.num_tasks)


class Moving(MixingStrategy):
    """Another p for every block: each task in turn is drawn most often."""

    name = "moving"

    def __init__(self, num_tasks):
        super().__init__(np.ones(num_tasks))
        self.blocks = 0

    def probabilities(self):
        self.blocks += 1
        raw = 1.0 + (np.arange(self.num_tasks) + self.blocks) % self.num_tasks
        return raw / raw.sum()

    def loss_weights(self):
        return np.ones(self.num_tasks)
