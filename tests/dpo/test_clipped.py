"""Pairs that send no gradient are left out of the backward pass, and no number changes but by rounding."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_models import lora
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import logged, losses_of, weights_of
from transformers.models.llama.modeling_llama import LlamaMLP

from trl_ama import AMAConfig, AMAError, AMATrainer
from trl_ama.dpo import clipped


SIZES = {"list": 24, "sort": 12, "brief": 18}
ALIKE = ("loss", "grad_norm", "entropy", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected")


def pairs():
    """About half of which are clipped."""
    return with_reference_columns(make_dataset(SIZES))


def with_specialists(share: float):
    """Pairs of which so many have specialists that anyone beats, one by one."""
    dataset = pairs()
    beaten = np.random.default_rng(1).permutation(len(dataset)) < share * len(dataset)
    for column, (bad, good) in {
        "specialist_chosen_logps": (-60, -1),
        "specialist_rejected_logps": (-1, -60),
    }.items():
        values = np.where(beaten, bad, good).astype(np.float32)
        dataset = dataset.remove_columns(column).add_column(column, values)
    return dataset


def run(model_dir, quick_args, dataset=None, peft=True, **settings):
    trainer = AMATrainer(
        model_dir,
        args=quick_args(**{"mixing": "ama_s", "mixing_lr": 0.5, "weight_decay": 0.1, "logging_steps": 1, **settings}),
        train_dataset=pairs() if dataset is None else dataset,
        peft_config=lora() if peft else None,
    )
    trainer.train()
    return trainer


def assert_same(ours, theirs, atol=2e-6):
    tasks = [key for key in theirs.state.log_history[0] if key.startswith("ama/")]
    for key in (*ALIKE, *tasks):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4, abs=1e-5), key
    for name, value in weights_of(theirs).items():
        assert torch.allclose(weights_of(ours)[name], value, atol=atol), name


def made(model_dir, quick_args, dataset=None, peft=True, **settings):
    trainer = AMATrainer(
        model_dir,
        args=quick_args(**{"mixing": "ama_r", **settings}),
        train_dataset=pairs() if dataset is None else dataset,
        peft_config=lora() if peft is True else peft or None,
    )
    if trainer.args.gradient_checkpointing:  # else done by `train()`
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def backward(trainer, batch, skip):
    """Loss and gradients of a batch, what TRL notes of it, and how many of its pairs were skipped."""
    trainer.args.skip_clipped = skip
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = trainer.clipped_pairs.skipped = 0
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    return loss.item(), gradients, dict(trainer._metrics["train"]), trainer.clipped_pairs.skipped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_sharing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3], "ld_alpha": 0.5},
        {"loss_type": ["robust"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"peft": False},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_loss_gradients_and_figures_are_those_of_all_pairs(model_dir, quick_args, settings):
    trainer = made(model_dir, quick_args, **settings)
    loader = trainer.get_train_dataloader()
    for batch in [batch for _, batch in zip(range(2), loader, strict=False)]:
        ours, theirs = (backward(trainer, batch, skip) for skip in (True, False))
        assert 1 <= ours[3] <= 7 and theirs[3] == 0
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[0] > 0
        assert ours[2].keys() == theirs[2].keys()
        for key, value in theirs[2].items():
            assert ours[2][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        assert ours[1].keys() == theirs[1].keys()
        size = max(value.abs().max() for value in theirs[1].values())
        for name, value in theirs[1].items():
            assert torch.allclose(ours[1][name], value, rtol=1e-4, atol=1e-6 * float(size)), name
        # The second half of what the strategy will see is the first half again
        first, second = (rows[:, -8:] for rows in trainer.mixture.recorder._micro_batches[-2:])
        assert torch.allclose(first, second, rtol=1e-5)


def with_tokens_of_layers(monkeypatch, function):
    """How many tokens each layer had each time that it was run, and what the function returned."""
    tokens, plain = [], LlamaMLP.forward

    def counting(self, hidden):
        tokens.append(hidden.shape[:2].numel())
        return plain(self, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", counting)
        return tokens, function()


@pytest.mark.parametrize(("peft", "path"), [(True, "auto"), (False, False)])
def test_with_gradient_checkpointing_no_layer_is_computed_more_often_than_without_skipping(
    model_dir, quick_args, monkeypatch, peft, path
):
    trainer = made(model_dir, quick_args, gradient_checkpointing=True, peft=peft, prefix_sharing=path)
    batch = next(iter(trainer.get_train_dataloader()))
    for layer_inputs_have_gradients in (True, False):
        if not layer_inputs_have_gradients:
            trainer.model.disable_input_require_grads()
        backward(trainer, batch, False)  # the proof
        whole, theirs = with_tokens_of_layers(monkeypatch, lambda: backward(trainer, batch, False))
        tokens, ours = with_tokens_of_layers(monkeypatch, lambda: backward(trainer, batch, True))
        layers = trainer.model.config.num_hidden_layers
        # Once forward, once again in the backward pass, there without the pairs that were skipped
        assert len(whole) == len(tokens) == 2 * layers
        assert tokens[:layers] == whole[:layers] and max(tokens[layers:]) < min(whole)
        assert ours[3] > 0 and ours[1].keys() == theirs[1].keys()
        for name, value in theirs[1].items():
            assert torch.allclose(ours[1][name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max())), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_16_bits_as_well(model_dir, quick_args, checkpointing):
    trainer = made(model_dir, quick_args, bf16=True, peft=False, gradient_checkpointing=checkpointing)
    batch = next(iter(trainer.get_train_dataloader()))
    ours, theirs = (backward(trainer, batch, skip) for skip in (True, False))
    assert ours[3] > 0 and ours[0] == pytest.approx(theirs[0], rel=0.05)
    for name, value in theirs[1].items():
        assert (ours[1][name] - value).norm() < 0.05 * value.norm(), name


def test_a_run_of_several_steps(model_dir, quick_args):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours, theirs = (run(model_dir, quick_args, skip_clipped=skip, **settings) for skip in (True, False))
    assert_same(ours, theirs)
    assert 6 < ours.clipped_pairs.skipped < 26 and theirs.clipped_pairs.skipped == 0  # of 4 steps of 8 pairs
    assert len({*losses_of(ours)}) == 4


def test_steps_without_any_gradient_move_the_policy_as_ever(model_dir, quick_args):
    """Momentum and weight decay go on after a gradient of zeros, and would stop without one."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6}
    runs = []
    for skip in (True, False):
        dataset = with_specialists(0.8)
        runs.append(run(model_dir, quick_args, dataset, skip_clipped=skip, learning_rate=5e-3, **settings))
    assert_same(*runs)
    norms = logged(runs[0], "grad_norm")
    assert 0 in norms and max(norms) > 0
    assert norms.count(0) <= 24 - runs[0].clipped_pairs.skipped < 12  # of such a step's pairs, one runs for its zeros


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"excess_clip": "none"}, "no single pair"),
        ({"excess_clip": "task"}, "no single pair"),
        ({"mixing": "uniform"}, "descends the losses themselves"),
    ],
    ids=["none", "task", "uniform"],
)
def test_where_a_clipped_pair_has_a_gradient_all_pairs_run(model_dir, quick_args, settings, why):
    trainer = made(model_dir, quick_args, **settings)
    trainer.model.train()
    assert why in trainer.clipped_pairs.hindrance(trainer.model)
    trainer.args.skip_clipped = True
    assert not trainer.clipped_pairs.pay(trainer.model)


def test_dropout_is_found_by_what_it_draws_and_draws_what_it_would_have_drawn(model_dir, quick_args):
    adapter = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    results = []
    for skip in (True, False):
        torch.manual_seed(2)
        trainer = made(model_dir, quick_args, peft=adapter, disable_dropout=False)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(5)
        results += [backward(trainer, batch, skip) for _ in range(2)]
        if skip:
            assert "random numbers" in trainer.clipped_pairs.hindrance(trainer.model)
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert ours[0] == theirs[0] and ours[3] == 0
        assert all(torch.equal(ours[1][name], value) for name, value in theirs[1].items())
    assert results[0][0] != results[1][0]


def test_auto_skips_while_many_were_clipped_lately_and_a_resumed_run_goes_on_so(
    model_dir, quick_args, tmp_path, monkeypatch
):
    dataset = with_specialists(0.5)
    monkeypatch.setattr(clipped, "PAYS_ABOVE", {(False, False): 0.5})
    decisions = {}

    class Noting(AMATrainer):
        def compute_loss(self, *args, **kwargs):
            before = self.clipped_pairs.skipped
            loss = super().compute_loss(*args, **kwargs)
            decisions.setdefault(self.args.run_name, []).append(self.clipped_pairs.skipped > before)
            return loss

    def resume(name, checkpoint):
        settings = {"max_steps": 12, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = Noting(
            model_dir,
            args=quick_args(
                mixing="ama_s", logging_steps=1, output_dir=str(tmp_path / name), run_name=name, **settings
            ),
            train_dataset=dataset,
            peft_config=lora(),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = resume("whole", None)
    assert not decisions["whole"][0] and {True, False} <= {*decisions["whole"][1:]}
    stop = decisions["whole"].index(True, 1)  # the first step after it skips, as the steps before it say
    resumed = resume("resumed", str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert decisions["resumed"] == decisions["whole"][stop:]
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.mixture.clipped_lately == whole.mixture.clipped_lately
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_what_is_no_switch_is_refused():
    taken = [AMAConfig(use_cpu=True, bf16=False, skip_clipped=value) for value in ("auto", "True", False)]
    assert [config.skip_clipped for config in taken] == ["auto", True, False]
    with pytest.raises(AMAError, match="skip_clipped must be 'auto', True or False, got 'often'"):
        AMAConfig(use_cpu=True, skip_clipped="often")
