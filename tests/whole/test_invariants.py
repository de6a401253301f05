"""What must stay true of the trainer, whatever else changes: equality with DPOTrainer, with itself split otherwise,
and with itself stopped and resumed."""

import numpy as np
import pytest
import torch
from tiny_models import lora
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import logged, losses_of, weights_of
from trl import DPOConfig, DPOTrainer

from trl_ama import AMATrainer


SIZES = {"list": 40, "sort": 12, "brief": 28}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("peft", [True, False])
def test_one_task_proportional_equals_dpo_trainer(model_dir, quick_args, peft, precompute):
    dataset = make_dataset({"list": 48})
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": precompute}
    plain = DPOTrainer(
        model_dir,
        args=quick_args(DPOConfig, **settings),
        train_dataset=dataset.remove_columns("task"),
        peft_config=lora() if peft else None,
    )
    plain.train()
    ours = AMATrainer(
        model_dir,
        # The same path on both sides, so the same bits; tests/fast_path/test_packing.py compares the two paths
        args=quick_args(mixing="proportional", prefix_sharing=False, **settings),
        train_dataset=dataset,
        peft_config=lora() if peft else None,
    )
    ours.train()
    assert losses_of(ours) == losses_of(plain)
    assert losses_of(plain)[0] != losses_of(plain)[-1]
    for key in ("rewards/margins", "logps/chosen", "grad_norm"):
        assert logged(ours, key) == logged(plain, key)
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(ours)[name]), name


@pytest.mark.parametrize("mixing", ["uniform", "task_normalized", "ama_r", "ama_s"])
def test_a_step_does_not_depend_on_how_it_is_split(model_dir, quick_args, mixing):
    dataset = with_reference_columns(make_dataset(SIZES))
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(
                mixing=mixing,
                mixing_lr="auto",
                max_steps=12,  # more than an epoch of 80 pairs
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=dataset,
            peft_config=lora(),
        )
        trainer.train()
        runs.append(trainer)
    whole, split = runs
    # TRL's logged loss is a mean of means, equal here because micro-batches are equally large
    assert losses_of(whole) == pytest.approx(losses_of(split), abs=1e-5)
    for task in SIZES:
        for figure in ("probability", "weight"):
            key = f"ama/{figure}/{task}"
            assert logged(whole, key) == pytest.approx(logged(split, key), abs=1e-6)
    for name, value in weights_of(whole).items():
        assert torch.allclose(value, weights_of(split)[name], atol=2e-5), name
    if mixing != "task_normalized":
        assert whole.mixture.sampler.state_dict() == {
            **split.mixture.sampler.state_dict(),
            "ahead": whole.mixture.sampler.state_dict()["ahead"],
        }


def test_the_last_smaller_batch_of_an_epoch_counts_each_pair_once(model_dir, quick_args):
    """Batches of 3 + 3 + 3 + 1 pairs in one optimizer step weigh each pair 1/10, not each batch 1/4."""
    dataset = with_reference_columns(make_dataset({"list": 6, "sort": 4}))
    grads = []
    for batch, accumulation in ((10, 1), (3, 4)):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(
                mixing="ama_r",
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
                optim="sgd",
            ),
            train_dataset=dataset,
            peft_config=lora(),
        )
        # block sizes differ (10 and 12), the epoch's 10 draws do not
        trainer.train()
        grads.append(weights_of(trainer))
    for name, value in grads[0].items():
        assert torch.allclose(value, grads[1][name], atol=1e-6), name


@pytest.mark.parametrize("mixing", ["proportional", "uniform", "ama_r", "ama_s"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_undisturbed_one(model_dir, quick_args, tmp_path, mixing, workers):
    if workers and mixing != "ama_s":
        pytest.skip("read-ahead by workers matters to the adaptive sampler")
    dataset = with_reference_columns(make_dataset(SIZES))

    def run(folder, **overrides):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(
                output_dir=str(tmp_path / folder),
                mixing=mixing,
                mixing_lr=0.5,
                max_steps=14,  # across an epoch of 10 steps
                save_strategy="steps",
                save_steps=1,
                dataloader_num_workers=workers,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                **overrides,
            ),
            train_dataset=dataset,
            peft_config=lora(),
        )
        return trainer

    undisturbed = run("whole")
    undisturbed.train()
    for stop in (3, 10, 12) if workers == 0 else (6,):
        resumed = run("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert losses_of(resumed) == losses_of(undisturbed)
        for task in SIZES:
            for figure in ("probability", "weight", "excess"):
                key = f"ama/{figure}/{task}"
                assert logged(resumed, key) == logged(undisturbed, key)
        for name, value in weights_of(undisturbed).items():
            assert torch.equal(value, weights_of(resumed)[name]), (stop, name)


def test_training_twice_starts_the_mixture_anew(model_dir, quick_args):
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="ama_s", mixing_lr=1.0),
        train_dataset=with_reference_columns(make_dataset(SIZES)),
        peft_config=lora(),
    )
    trainer.train()
    assert not np.allclose(trainer.strategy.probabilities(), 1 / 3)
    trainer.train()
    assert logged(trainer, "ama/probability/list")[0] == pytest.approx(1 / 3)


def test_resuming_a_dpo_checkpoint_is_refused(model_dir, quick_args, tmp_path):
    from trl_ama import AMAError

    dataset = make_dataset(SIZES)
    args = {"output_dir": str(tmp_path / "dpo"), "save_strategy": "steps", "save_steps": 2}
    DPOTrainer(
        model_dir,
        args=quick_args(DPOConfig, **args),
        train_dataset=dataset.remove_columns("task"),
        peft_config=lora(),
    ).train()
    trainer = AMATrainer(model_dir, args=quick_args(**args), train_dataset=dataset, peft_config=lora())
    with pytest.raises(AMAError, match="no mixing state: it was not written by AMATrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "dpo" / "checkpoint-2"))
