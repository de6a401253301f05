"""Scoring makes the next batch ready while this one runs; on a device only, which the tests say a CPU is."""

import contextlib
import functools
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import LlamaModel

from trl_ama import AMAConfig
from trl_ama.common import interruption
from trl_ama.dpo import sweep
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.dpo.prefetch import one_ahead, works_ahead
from trl_ama.dpo.scoring import score_pairs, score_policies
from trl_ama.reference_losses.shards import LossShards


PAIRS, WAIT = 8, 30.0  # seconds, of which only a failure takes any


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("next-batch")]


@pytest.fixture
def trainer(model_dir, tmp_path):
    args = AMAConfig(str(tmp_path), **{**QUICK, "per_device_eval_batch_size": 1, "precompute_ref_log_probs": True})
    return ScoringTrainer(model_dir, args=args, train_dataset=make_dataset({"list": PAIRS}))


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(sweep, "works_ahead", lambda device: True)


def score(trainer, shards=None):
    return score_policies(
        trainer, {"": functools.partial(contextlib.nullcontext, trainer.model)}, trainer.train_dataset, "", shards
    )


@pytest.fixture
def calls(trainer, monkeypatch):
    """Batches that were begun to be collated, and forward passes; the first pass waits for what runs beside it."""
    found = SimpleNamespace(collated=[], passes=[], second=threading.Event(), waits=False)
    collator, forward = trainer.data_collator, LlamaModel.forward

    def collate(rows):
        found.collated.append(threading.current_thread().name)
        if len(found.collated) == 3:  # after the proof's and the first batch
            found.second.set()
        return collator(rows)

    def run(self, *args, **kwargs):
        if found.waits and len(found.collated) > 1:
            assert found.second.wait(WAIT), "the next batch was not begun"
            found.passes.append(len(found.collated))
        return forward(self, *args, **kwargs)

    trainer.data_collator = collate
    monkeypatch.setattr(LlamaModel, "forward", run)
    return found


def test_on_a_cpu_nothing_runs_beside_the_model(trainer, calls):
    assert not works_ahead(torch.device("cpu")) and works_ahead(torch.device("cuda", 0))
    score(trainer)
    assert set(calls.collated) == {"MainThread"}


def test_one_batch_ahead_and_the_same_numbers(trainer, calls, monkeypatch):
    expected = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
    calls.collated.clear()
    calls.second.clear()
    monkeypatch.setattr(sweep, "works_ahead", lambda device: True)
    calls.waits = True
    scores = score(trainer)
    for name, values in expected.items():
        np.testing.assert_array_equal(scores[name], values)
    assert calls.collated[0] == "MainThread" and set(calls.collated[1:]) == {"next-batch_0"}
    # While the n-th batch runs, no more than the one after it was made: memory for two
    assert all(made <= 1 + number + 2 for number, made in enumerate(calls.passes)) and len(calls.passes) > 3
    assert not threads()


def test_an_error_comes_after_the_batches_before_it_are_saved(trainer, ahead, calls, tmp_path):
    collator, ids = trainer.data_collator, [str(number) for number in range(PAIRS)]

    def broken(rows):
        if len(calls.collated) == 4:
            raise ValueError("a row that is none")
        return collator(rows)

    trainer.data_collator = broken
    with pytest.raises(ValueError, match="a row that is none"):
        score(trainer, LossShards(tmp_path / "shards", {"seed": 1}, ids))
    assert not threads()
    trainer.data_collator, calls.collated[:] = collator, []
    saved = LossShards(tmp_path / "shards", {"seed": 1}, ids)
    scores = score(trainer, saved)
    assert 0 < len(calls.collated) - 1 < PAIRS  # and the first of the rest once more, to be run both ways
    for name, values in score_pairs(trainer, trainer.model, trainer.train_dataset, "").items():
        np.testing.assert_array_equal(scores[name], values)


def test_a_signal_leaves_after_the_batch_with_what_was_scored(trainer, ahead, calls, tmp_path, monkeypatch):
    asked = []

    def ask(*args):
        asked.append(True)
        return len(asked) == 2

    monkeypatch.setattr(interruption, "asked", ask)
    monkeypatch.setattr(interruption._state, "asked", signal.SIGTERM)
    shards = LossShards(tmp_path / "shards", {"seed": 1}, [str(number) for number in range(PAIRS)])
    with pytest.raises(interruption.Interrupted, match=r"saved \d of 8 scored pairs"):
        score(trainer, shards)
    assert not threads()
    again = {"chosen_logps": np.zeros(PAIRS, dtype=np.float32)}
    monkeypatch.setattr(interruption._state, "asked", None)
    assert (
        1
        < LossShards(tmp_path / "shards", {"seed": 1}, [str(number) for number in range(PAIRS)]).load(again).sum()
        < 8
    )


def test_ctrl_c_in_the_middle_ends_the_thread():
    made = []
    items = one_ahead(range(5), made.append)
    with pytest.raises(KeyboardInterrupt), contextlib.closing(items):
        item, result = next(items)
        result()
        raise KeyboardInterrupt
    assert item == 0 and set(made) <= {0, 1} and not threads()
    assert list(one_ahead([], made.append)) == []
