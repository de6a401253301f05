"""Counts the calls of a function, in the place of its seconds."""

import sys
from types import SimpleNamespace

import numpy as np

from trl_ama.mixing import build_strategy
from trl_ama.sampling.sampler import TaskMixtureSampler, count_tasks


PROCESS = SimpleNamespace(num_processes=1, device="cpu")


def calls_of(function, *arguments) -> int:
    """How many functions Python calls for `function(*arguments)`, its own and those in C."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return count


def sampler_of(task_ids: np.ndarray, num_tasks: int, name: str = "ama_s") -> TaskMixtureSampler:
    strategy = build_strategy(name, count_tasks(task_ids, num_tasks), mixing_lr=0.1)
    return TaskMixtureSampler(task_ids, strategy, block_size=32, seed=0)
