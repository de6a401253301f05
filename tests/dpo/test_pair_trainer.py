"""Runs of AMATrainer and of the specialists' trainer on the fast path equal those of TRL's DPOTrainer: losses, metrics, gradients'
norms, evaluation, with every way to train and every kind of reference."""

import pytest
import torch
import transformers
from peft import LoraConfig
from tiny_pairs import make_dataset
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMATrainer
from trl_ama.dpo.pair_trainer import ScoringTrainer, SpecialistTrainer
from trl_ama.dpo.scoring import score_pairs


def peft_of(kind: str):
    if kind == "full":
        return None
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=kind == "dora")


def history(trainer) -> dict[str, list[float]]:
    """Everything that the trainer logged and that is not a time or a mixing figure."""
    keys = {key for entry in trainer.state.log_history for key in entry}
    ours = {key for key in keys if "ama/" in key or key.endswith(("runtime", "_per_second")) or "excess" in key}
    ours |= {"eval_worst_accuracy", "eval_mean_accuracy", "total_flos"}
    return {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in sorted(keys - ours)}


TRL_KEYS = {
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    *(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    "rewards/margins",
    "rewards/accuracies",
}


_TRL_RUNS = {}  # of DPOTrainer, which several tests compare with


def trl_run(model_dir, quick_args, kind="lora", dataset=None, evaluate=None, **settings):
    """The run of `DPOTrainer` with these settings; made once."""
    key = (model_dir, kind, evaluate is not None, repr(sorted(settings.items())))
    if key not in _TRL_RUNS:
        _TRL_RUNS[key] = run(DPOTrainer, model_dir, quick_args, kind, dataset, evaluate, **settings)
    return _TRL_RUNS[key]


def run(trainer_class, model_dir, quick_args, kind="lora", dataset=None, evaluate=None, **settings):
    """A run on the fast path, or of `DPOTrainer`, from the same seed."""
    config = AMAConfig if trainer_class is AMATrainer else DPOConfig
    if trainer_class is AMATrainer:
        settings |= {"mixing": "proportional", "prefix_sharing": True}
    given = {"train_dataset": dataset or make_dataset({"list": 48}), "eval_dataset": evaluate}
    if trainer_class is not AMATrainer:
        given = {name: part and part.remove_columns("task") for name, part in given.items()}
    torch.manual_seed(0)
    trainer = trainer_class(model_dir, args=quick_args(config, **settings), peft_config=peft_of(kind), **given)
    trainer.train()
    if trainer_class is not DPOTrainer:
        assert trainer.prefix_sharing.taken["plain"] == 0
        assert trainer.prefix_sharing.taken["fast"] >= trainer.state.global_step
    return trainer


def assert_same_run(ours, theirs, rel=1e-3, abs=1e-4) -> dict[str, list[float]]:
    ours, theirs = history(ours), history(theirs)
    assert TRL_KEYS <= set(theirs)
    for key, values in theirs.items():
        if key == "rewards/accuracies":  # before the first step, policy and reference are equal, and rounding decides
            values, ours[key] = values[1:], ours[key][1:]
        assert ours[key] == pytest.approx(values, rel=rel, abs=abs), key
    return theirs


@pytest.mark.parametrize("trainer_class", [AMATrainer, SpecialistTrainer])
@pytest.mark.parametrize(("kind", "rate"), [("lora", 1e-2), ("full", 1e-3)])
def test_fifty_steps_of_training_are_the_same(model_dir, quick_args, trainer_class, kind, rate):
    settings = {"max_steps": 50, "learning_rate": rate, "per_device_train_batch_size": 4}
    theirs = trl_run(model_dir, quick_args, kind, **settings)
    losses = assert_same_run(run(trainer_class, model_dir, quick_args, kind, **settings), theirs)["loss"]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])  # it learns, so there is something to be the same


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_every_kind_of_training_and_of_gradient_checkpointing(model_dir, quick_args, kind, checkpointing):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    theirs = trl_run(model_dir, quick_args, kind, **settings)
    if checkpointing is not None:
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    assert_same_run(run(AMATrainer, model_dir, quick_args, kind, **settings), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"], "label_smoothing": 0.0},
        {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"ld_alpha": 0.4},
        {"max_length": 10},  # cuts most answers
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"truncation_mode": "keep_start", "pad_to_multiple_of": 8},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values()),
)
def test_settings_of_the_loss(model_dir, quick_args, settings):
    settings = {"max_steps": 2, "learning_rate": 1e-2, **settings}
    theirs = run(DPOTrainer, model_dir, quick_args, "full", **settings)
    for trainer_class in (AMATrainer, SpecialistTrainer):
        assert_same_run(run(trainer_class, model_dir, quick_args, "full", **settings), theirs)


def test_a_loss_over_the_whole_batch(model_dir, quick_args):
    """`sft` reads more of the model's output than log-probs of pairs; AMATrainer has no use for it."""
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3], "max_steps": 2, "learning_rate": 1e-2}
    runs = [run(one, model_dir, quick_args, "full", **settings) for one in (SpecialistTrainer, DPOTrainer)]
    assert_same_run(*runs)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_precomputed_and_live_reference_log_probs_are_the_same(model_dir, quick_args, kind):
    runs = [
        run(SpecialistTrainer, model_dir, quick_args, kind, precompute_ref_log_probs=precomputed, max_steps=4)
        for precomputed in (True, False)
    ]
    assert_same_run(*runs, rel=1e-4)
    taken = [trainer.prefix_sharing.taken["fast"] for trainer in runs]
    assert taken == [6 + 4, 2 * 4]  # 48 pairs, 8 at a time; the reference of each step


def test_a_reference_model_that_follows_the_policy(model_dir, quick_args):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, "max_steps": 6}
    runs = [run(one, model_dir, quick_args, "full", **settings) for one in (AMATrainer, DPOTrainer)]
    assert_same_run(*runs)
    for (name, ours), theirs in zip(runs[0].ref_model.named_parameters(), runs[1].ref_model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name
    start = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.equal(runs[0].ref_model.lm_head.weight, start.lm_head.weight)


def test_evaluation_is_the_same(model_dir, quick_args):
    """During training and alone."""
    evaluate = make_dataset({"list": 20}, seed=5)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 8}
    theirs, *others = (
        run(one, model_dir, quick_args, evaluate=evaluate, **settings)
        for one in (DPOTrainer, AMATrainer, SpecialistTrainer)
    )
    for ours in others:
        logged = assert_same_run(ours, theirs)
        assert len(logged["eval_loss"]) == 2
        assert {f"eval_{key}" for key in TRL_KEYS - {"grad_norm"}} <= set(logged)
    expected = theirs.evaluate()
    for ours in others:
        found = ours.evaluate()
        for key, value in expected.items():
            if not key.endswith(("runtime", "_per_second")):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        assert ours.prefix_sharing.taken["plain"] == 0


def test_a_trained_head_and_embeddings(model_dir, quick_args, monkeypatch):
    """`modules_to_save`: copies of them are trained beside the adapter."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"])
    monkeypatch.setitem(run.__globals__, "peft_of", lambda kind: config)
    runs = [run(one, model_dir, quick_args, max_steps=4) for one in (AMATrainer, DPOTrainer)]
    assert_same_run(*runs)
    theirs = dict(runs[1].model.named_parameters())
    moved = 0
    for name, ours in runs[0].model.named_parameters():
        if ours.requires_grad:
            assert torch.allclose(ours, theirs[name], atol=2e-4), name
            moved += "modules_to_save" in name
    assert moved >= 1


def test_a_saved_model_names_no_implementation_of_ours(model_dir, quick_args, tmp_path):
    trainer = AMATrainer(
        model_dir, args=quick_args(mixing="proportional", max_steps=1), train_dataset=make_dataset({"list": 8})
    )
    trainer.train()
    assert trainer.prefix_sharing.taken["fast"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation == trainer.model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7, 8]])
    trained = trainer.model.eval()
    assert torch.allclose(trained(ids).logits, loaded.eval()(ids).logits, atol=1e-5)
    assert trained.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_scoring_packs_and_gives_the_numbers_of_the_plain_path(model_dir, quick_args):
    dataset = make_dataset({"list": 20, "brief": 21, "sort": 9})
    scores = {}
    for mode in ("auto", False):
        trainer = ScoringTrainer(
            model_dir,
            args=quick_args(prefix_sharing=mode, per_device_eval_batch_size=3, precompute_ref_log_probs=True),
            train_dataset=dataset,
        )
        scores[mode] = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
        if mode == "auto":
            assert trainer.prefix_sharing.taken["plain"] == 0
            assert 1 < trainer.prefix_sharing.taken["fast"] < 17  # fewer calls than batches of 3 pairs
    for name, values in scores[False].items():
        assert scores["auto"][name] == pytest.approx(values, rel=1e-5), name
