"""What a resumed run must not get wrong: the best checkpoint, draws of loaders that read ahead, files that cannot be read now."""

import errno
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_world import parse
from resumed_runs import At, assert_same, copy_fixture, finished_fixture, recipe_fixture, training_fixture  # noqa: F401 - fixtures
from tiny_runs import losses_of

from trl_ama import AMAError, run_pipeline
from trl_ama.common import files as safe_files
from trl_ama.common.files import first_damage
from trl_ama.common.interruption import Interrupted
from trl_ama.common.processes import sum_of_all
from trl_ama.reference_losses import shards as loss_shards
from trl_ama.reference_losses.shards import LossShards
from trl_ama.training import stage as training_stage
from trl_ama.training.checkpoints import newest_good_checkpoint


# The loss on held-out pairs falls, so that by this the first evaluation stays the best one
FIRST_IS_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


# ---- The best checkpoint ----


def test_a_best_step_that_was_never_saved_spoils_no_checkpoint(training, tmp_path):
    """`save_steps` may be a multiple of `eval_steps`: then the state names a best step that has no folder."""
    whole = training("whole", **FIRST_IS_BEST)
    whole.train()
    assert whole.state.best_global_step == 2 and whole.state.best_model_checkpoint is None
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    found = newest_good_checkpoint(tmp_path / "run", best=True)
    assert found.step == 4 and not found.bad
    resumed = training("run", **FIRST_IS_BEST)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_checkpoint_that_a_signal_asked_for_is_not_the_best_one(training, tmp_path):
    whole = training("whole", **FIRST_IS_BEST)
    whole.train()
    stopped = training("run", **FIRST_IS_BEST)
    stopped.add_callback(At(1, signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved at step 2"):
        stopped.train()
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and stopped.state.best_global_step == 2
    for _ in range(2):  # and it is not forgotten by the next checkpoint
        resumed = training("run", **FIRST_IS_BEST)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.best_model_checkpoint is None and resumed.state.best_global_step == 2
        assert_same(resumed, whole)
        shutil.rmtree(tmp_path / "run" / "checkpoint-7")


def test_a_best_checkpoint_is_found_where_the_folder_has_moved(training, tmp_path):
    settings = {**FIRST_IS_BEST, "save_steps": 2}
    whole = training("whole", **settings)
    whole.train()
    assert whole.state.best_model_checkpoint.endswith("checkpoint-2")
    (tmp_path / "whole").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoint-7")
    resumed = training("moved", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert_same(resumed, whole)


# ---- Draws ----


def test_another_read_ahead_is_refused_where_it_decides_the_draws(training, tmp_path):
    training("whole", max_steps=2, dataloader_num_workers=1).train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for changes, ours in (
        ({"dataloader_num_workers": 0}, "None"),
        ({"dataloader_num_workers": 2}, r"\[4, 2\]"),
        (
            {"dataloader_num_workers": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            r"\[2, 4\]",
        ),
    ):
        with pytest.raises(AMAError, match=rf"read ahead, and micro-batches of a step, \[2, 2\], this run has {ours}"):
            training("other", **{"max_steps": 4, **changes}).train(checkpoint)


def test_a_fixed_mixture_may_have_other_loaders(training, tmp_path):
    training("whole", mixing="uniform", max_steps=2, dataloader_num_workers=1).train()
    resumed = training("other", mixing="uniform", max_steps=4)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    whole = training("undisturbed", mixing="uniform", max_steps=4)
    whole.train()
    assert losses_of(resumed) == losses_of(whole)


def test_sums_are_reduced_once_in_an_optimizer_step(training, monkeypatch):
    calls = []

    def counted(accelerator, values):
        calls.append(values.shape)
        return sum_of_all(accelerator, values)

    monkeypatch.setattr("trl_ama.sampling.step_recorder.sum_of_all", counted)
    training("run", save_strategy="no", gradient_accumulation_steps=4, per_device_train_batch_size=2).train()
    assert calls == [(5, 3)] * 7


# ---- Files that cannot be read or written now ----


def test_what_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """As on a network filesystem that is gone for a while: what is damaged is removed, and this is not."""

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(safe_files, "file_digest", fail)
    (tmp_path / "weights.bin").write_bytes(b"1234")
    with pytest.raises(AMAError, match=r"weights.bin' cannot be read \(Input/output error\). Mend that, and run"):
        first_damage(tmp_path, {"weights.bin": {"size": 4, "sha256": "0"}})


def test_a_shard_that_cannot_be_read_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_shards, "SHARD_SECONDS", 0.0)
    shards = LossShards(tmp_path, {"run": 1}, ["a", "b"])
    with shards:
        shards.add(np.array([0, 1]), {"logps": np.ones(2, dtype=np.float32)})
    (path,) = tmp_path.glob("*.parquet")
    before = type(path).read_bytes

    def fail(self):
        if self.suffix == ".parquet":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return before(self)

    monkeypatch.setattr(type(path), "read_bytes", fail)
    with pytest.raises(AMAError, match="cannot be read .Stale file handle"):
        LossShards(tmp_path, {"run": 1}, ["a", "b"]).load({"logps": np.zeros(2, dtype=np.float32)})
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (
            errno.ENOSPC,
            r"The disk of '.*stage.json' is full \(.*No space left.*What was finished is intact: make room",
        ),
        (
            errno.EACCES,
            r"stage.json' can be neither read nor written as a run needs it \(Permission denied\). What was",
        ),
    ],
)
def test_a_note_that_cannot_be_written_ends_in_one_sentence(recipe, tmp_path, monkeypatch, number, expected):
    write = training_stage.write_json

    def full(path, content):
        if path.name == "stage.json" and content["result"] is not None:
            raise OSError(number, os.strerror(number), str(path))
        write(path, content)

    monkeypatch.setattr(training_stage, "write_json", full)
    with pytest.raises(AMAError, match=expected):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "run"), stages=("specialists",))
    monkeypatch.undo()
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "run"), stages=("specialists",))
    assert (tmp_path / "run" / "specialists" / "list" / "adapter_model.safetensors").is_file()


def test_a_model_that_cannot_be_saved_at_the_end_names_the_folder(copy, recipe, finished, monkeypatch):
    """Its last checkpoint is there, and the next run only saves."""
    from transformers import Trainer

    folder = copy / "generalists" / "ama_s"
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    save = Trainer.save_model

    def full(self, output_dir=None, _internal_call=False):
        if output_dir == str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, output_dir, _internal_call)

    monkeypatch.setattr(Trainer, "save_model", full)
    with pytest.raises(
        AMAError, match="'ama_s' is trained, but could not be saved in '.*ama_s' .*Make room on the disk"
    ):
        run_pipeline(*parse(recipe, "--output_dir", copy))
    monkeypatch.undo()
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert (folder / "adapter_model.safetensors").read_bytes() == before


# ---- Engines ----


def test_a_left_out_step_needs_no_zero_grad_of_the_engine(training):
    """DeepSpeed's takes no argument, so gradients are dropped one by one."""
    trainer = training("run")
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), float("nan"))
    engine = SimpleNamespace(parameters=lambda: [weight], get_global_grad_norm=lambda: None)
    trainer.broken_pairs = None
    trainer._get_grad_norm(engine, grad_norm=torch.tensor(float("nan")))
    assert weight.grad is None
