"""The first batch of a training and of a sweep is run both ways: what no rule names and no trial shows takes the plain path, with
DPOTrainer's numbers from the first step on."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from prefix_cases import padded, random_pairs, sharing
from tiny_models import make_model
from tiny_pairs import make_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

import trl_ama.fast_path.choice
import trl_ama.fast_path.proof
from trl_ama import AMAConfig, AMATrainer
from trl_ama.common.errors import AMAError
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.dpo.scoring import score_policies
from trl_ama.fast_path.packing import CannotShare, pack_pairs
from trl_ama.fast_path.proof import NoVerdict, RandomState, prove
from trl_ama.fast_path.rules import hook_kind


def longer_is_smaller(module, args, output):
    """As NEFTune's noise is scaled, without the noise: by the length of the row that the model is given."""
    return output * (1 + 3 / output.shape[1]) if module.training else output


def noise(module, args, output):
    return output + 0.1 * torch.randn_like(output) if module.training else output


def grey_noise(module, args, output):
    """Of a generator that no one knows."""
    return (
        output + 0.1 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        if module.training
        else output
    )


class SetHook(TrainerCallback):
    """Sets a hook before a step; `None` for when training begins."""

    def __init__(self, hook, step=None):
        self.hook, self.step = hook, step

    def _set(self, model):
        model.get_input_embeddings().register_forward_hook(self.hook)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.step is None:
            self._set(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self._set(model)


def run(trainer_class, model_dir, quick_args, callbacks=(), peft_config=None, **settings):
    config = AMAConfig if trainer_class is AMATrainer else DPOConfig
    if trainer_class is AMATrainer:
        settings = {"mixing": "proportional", **settings}
    dataset = make_dataset({"list": 16})
    torch.manual_seed(0)
    trainer = trainer_class(
        model_dir,
        args=quick_args(config, **{"max_steps": 3, "learning_rate": 1e-2, **settings}),
        train_dataset=dataset if trainer_class is AMATrainer else dataset.remove_columns("task"),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    torch.manual_seed(1)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("hook", [longer_is_smaller, noise, grey_noise])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_hook_that_no_rule_knows_takes_the_plain_path(model_dir, quick_args, caplog, hook, precompute):
    """With precomputed reference log-probs the model was tried, and found fit, before the hook was set."""
    settings = {"precompute_ref_log_probs": precompute, "callbacks": [SetHook(hook)]}
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    theirs = run(DPOTrainer, model_dir, quick_args, **settings, **lora)
    ours = run(AMATrainer, model_dir, quick_args, **settings, **lora)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    for left, right in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    taken = ours.prefix_sharing.taken
    assert taken["fast"] == (2 if precompute else 0)  # of 16 pairs, before
    said = [record.message for record in caplog.records if "Prefix sharing is off" in record.message]
    assert len(said) == 1
    assert ("draws random numbers" in said[0]) == (hook is noise)


def test_it_is_an_error_if_the_fast_path_was_asked_for_and_no_weight_has_moved(model_dir, quick_args):
    start = {name: value.clone() for name, value in make_saved(model_dir).items()}
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="proportional", prefix_sharing=True, precompute_ref_log_probs=True),
        train_dataset=make_dataset({"list": 16}),
        callbacks=[SetHook(longer_is_smaller)],
    )
    with pytest.raises(AMAError, match="on the first batch its log-probs differed by up to"):
        trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())


def make_saved(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir).state_dict()


def test_a_hook_that_is_set_later_is_found_as_well(model_dir, quick_args):
    settings = {"callbacks": [SetHook(longer_is_smaller, step=2)], "max_steps": 4}
    theirs = run(DPOTrainer, model_dir, quick_args, **settings)
    ours = run(AMATrainer, model_dir, quick_args, **settings)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert ours.prefix_sharing.taken["plain"] == 2


def test_each_training_is_proved_once(model_dir, quick_args, monkeypatch):
    proved = []

    def counted(model, *args, **kwargs):
        proved.append(model)
        return prove(model, *args, **kwargs)

    monkeypatch.setattr(trl_ama.fast_path.choice, "prove", counted)
    trainer = run(AMATrainer, model_dir, quick_args, max_steps=4)
    assert len(proved) == 2 and trainer.prefix_sharing.taken["plain"] == 0  # policy and reference
    trainer.train()
    assert len(proved) == 4


# ---- The proof by itself ----


def adapted(config=None):
    """A model in training with an adapter that does nothing yet, and a call of it."""
    model = make_model(97)
    add_fused_lm_head(model)
    torch.manual_seed(0)
    return get_peft_model(model, config or LoraConfig(r=4, target_modules="all-linear")).train()


def call_and_pairs(count=3):
    call = padded(random_pairs(count, seed=0, prompts=(4, 10)))
    return call, pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


def test_weights_and_random_numbers_are_left_as_they_were():
    model, (call, pairs) = adapted(), call_and_pairs()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = RandomState(torch.device("cpu"))
    prove(model, call, pairs, exact=True)
    assert RandomState(torch.device("cpu")) == drawn
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
        assert RandomState(torch.device("cpu")) != drawn
        drawn.restore()


@pytest.mark.parametrize("kind", ["LORA", "LILY"])
def test_an_adapter_that_does_nothing_yet_is_moved(monkeypatch, kind):
    """What it will do on a packed row is seen before it does it; without the rules, which name these two."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    call, pairs = call_and_pairs()
    if kind == "LORA":
        config.alora_invocation_tokens = call["input_ids"][0, 2:3].tolist()
    model = adapted(config)
    with pytest.raises(CannotShare, match="its adapter acts otherwise on a packed row"):
        prove(model, call, pairs, exact=True)
    with pytest.raises(AMAError, match="invocation tokens" if kind == "LORA" else "averages over all tokens"):
        sharing(True).pack(model, call)
    prove(model.eval(), call, pairs, exact=True)  # as it is, it does nothing


def out_of_memory(limit: int):
    def hook(module, args, kwargs):
        if len(kwargs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return hook


def test_no_memory_is_no_verdict():
    model, (call, pairs) = adapted(), call_and_pairs(4)
    inner = model.get_base_model()
    handle = inner.register_forward_pre_hook(out_of_memory(2), with_kwargs=True)
    prove(model, call, pairs, exact=True)  # pair by pair
    handle.remove()
    inner.register_forward_pre_hook(out_of_memory(0), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        prove(model, call, pairs, exact=True)


def test_a_trial_is_as_long_as_there_is_memory_for():
    model, (call, _) = adapted(), call_and_pairs()
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: out_of_memory(100)(module, args, {"input_ids": kwargs["input_ids"][0]}),
        with_kwargs=True,
    )
    chooser = sharing(max_length=400)
    assert chooser.pack(model, call) is not None
    (tried,) = chooser._trials.values()
    assert 24 < tried.length <= 50 and tried.beyond is None
    handle.remove()


def test_a_batch_of_broken_numbers_says_nothing():
    model, (call, pairs) = adapted(), call_and_pairs()
    with torch.no_grad():
        model.get_input_embeddings().weight[call["input_ids"][0, 0]] = torch.nan
    with pytest.raises(NoVerdict):
        prove(model, call, pairs, exact=True)


def test_all_processes_are_of_one_opinion(monkeypatch):
    """What another one found counts here as well; one whose batch cannot be packed makes all wait for the next."""
    model, (call, _) = adapted(), call_and_pairs()
    for others, is_fast, is_for_good in (
        ([[None], [None]], True, True),
        ([[None], ["another reason"]], False, True),
        ([["its rows are not padded on the right"]], False, False),
    ):
        chooser, answers = sharing(), iter(others)
        monkeypatch.setattr(trl_ama.fast_path.choice, "of_all", lambda own: [own, *next(answers)])  # noqa: B023
        monkeypatch.setattr(trl_ama.fast_path.choice, "_several_processes", lambda: True)
        assert (chooser.pack(model, call, "policy") is not None) == is_fast
        assert bool(chooser._proofs[model]) == is_for_good
        if is_for_good:
            assert (chooser.pack(model, call, "policy") is not None) == is_fast  # nobody is asked again


def test_the_same_hook_again_needs_no_other_proof(model_dir, quick_args, monkeypatch):
    """After each pass of the reference, gradient checkpointing sets the hook anew that makes embeddings require gradients."""
    proven = []
    monkeypatch.setattr(
        trl_ama.fast_path.choice, "prove", lambda *args: (proven.append(args[0].training), prove(*args))
    )
    trainer = run(
        AMATrainer, model_dir, quick_args, peft_config=LoraConfig(r=4), gradient_checkpointing=True,
        callbacks=[SetHook(longer_is_smaller, 2)],
    )  # fmt: skip
    assert len(trainer.model.get_input_embeddings()._forward_hooks) > 3 and trainer.prefix_sharing.taken["fast"] == 4
    assert len(proven) == 4  # policy and reference, and both again once there is another hook


def test_hooks_that_differ_in_what_they_hold_are_different():
    def made(factor):
        return lambda module, args, output: output * factor

    def plain():
        return lambda module, args, output: output

    assert hook_kind(plain()) == hook_kind(plain()) != hook_kind(made(1))
    assert hook_kind(made(1)) != hook_kind(made(2)) and hook_kind(SetHook(None)._set) != hook_kind(plain())


def test_every_policy_of_a_sweep_is_proved(model_dir, quick_args):
    """One of three policies reads what stands before in the row; the others stay on the fast path."""

    def policy(model, hook=None):
        @contextmanager
        def opened():
            handle = hook and model.get_input_embeddings().register_forward_hook(hook)
            yield model
            if handle:
                handle.remove()

        return opened

    def mean_so_far(module, args, output):
        return output.cumsum(dim=1) / torch.arange(1, output.shape[1] + 1)[:, None]

    scores = {}
    for mode in ("auto", False):
        args = quick_args(prefix_sharing=mode, per_device_eval_batch_size=3, precompute_ref_log_probs=True)
        trainer = ScoringTrainer(model_dir, args=args, train_dataset=make_dataset({"list": 20, "brief": 5}))
        policies = {"a_": policy(trainer.model), "b_": policy(trainer.model, mean_so_far), "c_": policy(trainer.model)}
        scores[mode] = score_policies(trainer, policies, trainer.train_dataset, "")
        if mode == "auto":
            assert trainer.prefix_sharing.taken["fast"] > 0
    for name, values in scores[False].items():
        assert scores["auto"][name] == pytest.approx(values, rel=1e-5), name
    assert np.abs(scores["auto"]["a_chosen_logps"] - scores["auto"]["b_chosen_logps"]).max() > 0.01
    with pytest.raises(AMAError, match="on the first batch"):
        args = quick_args(prefix_sharing=True, precompute_ref_log_probs=True)
        trainer = ScoringTrainer(model_dir, args=args, train_dataset=make_dataset({"list": 4}))
        policies = {"a_": policy(trainer.model), "b_": policy(trainer.model, mean_so_far)}
        score_policies(trainer, policies, trainer.train_dataset, "")
