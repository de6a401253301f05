"""Scoring: one sweep gives the numbers of two, no forward pass is larger than the budget, and a model can train afterwards."""

import contextlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from saved_adapters import KINDS, LINEAR, WHO, logits, save_adapter
from tiny_models import lora, make_model, save
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trl_ama import AMAConfig
from trl_ama.dpo.pair_trainer import ScoringTrainer, SpecialistTrainer
from trl_ama.dpo.scoring import score_pairs, score_policies
from trl_ama.policies.switching import reference_policy, trained_policy, trained_policy_and_reference


ALL_KINDS = {
    **KINDS,
    "loha": LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj"]),
    "biases": LoraConfig(r=4, bias="all", **LINEAR),
}
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# They write to weights of the base itself, so what is left when they are disabled is not the base
WRITE_TO_THE_BASE = {"pissa", "olora", "biases"}


def of_all_lengths(count: int, seed: int = 0) -> Dataset:
    """Pairs of 3 to about 60 tokens, few of which are long."""
    rng = np.random.default_rng(seed)
    words = ["apple", "bread", "cloud", "dance", "earth", "flame"]

    def text(role: str) -> list[dict]:
        return [{"role": role, "content": " ".join(rng.choice(words, size=1 + int(rng.exponential(8))))}]

    return Dataset.from_list(
        [{"prompt": text("user"), "chosen": text("assistant"), "rejected": text("assistant")} for _ in range(count)]
    )


@pytest.fixture
def build(tmp_path):
    """Builds a trainer that scores, two pairs of the longest at a time."""

    def build(model, dataset=None, peft_config=None, trainer_class=ScoringTrainer, **changes):
        args = {**QUICK, "per_device_eval_batch_size": 2, "precompute_ref_log_probs": True, **changes}
        return trainer_class(
            model,
            args=AMAConfig(str(tmp_path / "out"), **args),
            train_dataset=make_dataset({"list": 9}) if dataset is None else dataset,
            peft_config=peft_config,
        )

    return build


@pytest.fixture
def sizes(monkeypatch):
    """Tokens of every forward pass, padding included."""
    seen = []
    forward = LlamaModel.forward

    def counted(self, *args, **kwargs):
        seen.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return seen


def own(model):
    return lambda: contextlib.nullcontext(model)


# ---- One sweep ----


@pytest.fixture(scope="module")
def biased_dir(tokenizer, tmp_path_factory):
    """The tiny model with biases in its attention, which an adapter can train."""
    path = tmp_path_factory.mktemp("biased")
    return save(make_model(len(tokenizer), attention_bias=True), tokenizer, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_sweep_gives_the_numbers_of_two(build, model_dir, biased_dir, tmp_path, kind):
    base = biased_dir if kind == "biases" else model_dir
    folder = save_adapter(tmp_path / kind, base, ALL_KINDS[kind])
    trainer = build(base, peft_config=lora())
    with reference_policy(trainer) as model:
        expected = score_pairs(trainer, model, trainer.train_dataset, "")
        bare = logits(model)
    with trained_policy(trainer, WHO, folder) as model:
        alone = score_pairs(trainer, model, trainer.train_dataset, "")
    with trained_policy_and_reference(trainer, WHO, folder) as (specialist, reference):
        assert (reference is None) == (kind in WRITE_TO_THE_BASE)
        if reference is None:
            with specialist.disable_adapter():
                assert not torch.equal(logits(specialist), bare)
            return
        with reference() as model:
            assert torch.equal(logits(model), bare)
        policies = {"ref_": reference, "specialist_": own(specialist)}
        scores = score_policies(trainer, policies, trainer.train_dataset, "")
    for side in ("chosen", "rejected"):
        np.testing.assert_array_equal(scores[f"ref_{side}_logps"], expected[f"{side}_logps"])
        np.testing.assert_array_equal(scores[f"specialist_{side}_logps"], alone[f"{side}_logps"])
        np.testing.assert_array_equal(scores[f"{side}_tokens"], expected[f"{side}_tokens"])
        assert np.abs(scores[f"ref_{side}_logps"] - scores[f"specialist_{side}_logps"]).max() > 1e-3


def test_a_full_specialist_beside_the_base(build, model_dir, tokenizer, tmp_path):
    make_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "full")
    trainer = build(model_dir)
    with trained_policy_and_reference(trainer, WHO, str(tmp_path / "full")) as (specialist, reference):
        policies = {"ref_": reference, "specialist_": own(specialist)}
        scores = score_policies(trainer, policies, trainer.train_dataset, "")
    base = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
    with trained_policy(trainer, WHO, str(tmp_path / "full")) as model:
        full = score_pairs(trainer, model, trainer.train_dataset, "")
    np.testing.assert_array_equal(scores["ref_chosen_logps"], base["chosen_logps"])
    np.testing.assert_array_equal(scores["specialist_rejected_logps"], full["rejected_logps"])
    assert np.abs(scores["ref_chosen_logps"] - scores["specialist_chosen_logps"]).max() > 1e-3


def test_where_an_adapter_is_the_reference_it_is_not_reached_from_a_specialist(build, model_dir, tmp_path):
    start = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), save_adapter(tmp_path / "start", model_dir), is_trainable=True
    )
    trainer = build(start)
    assert "ref" in trainer.model.peft_config
    folder = save_adapter(tmp_path / "specialist", model_dir, seed=1)
    with trained_policy_and_reference(trainer, WHO, folder) as (_, reference):
        assert reference is None


def test_a_batch_is_collated_and_packed_once_for_both(build, model_dir, tmp_path, monkeypatch):
    folder = save_adapter(tmp_path / "a", model_dir)
    trainer = build(model_dir, of_all_lengths(20), lora())
    calls = {"collated": 0, "packed": 0}
    collator, pack = trainer.data_collator, trainer.prefix_sharing.pack

    def collate(rows):
        calls["collated"] += 1
        return collator(rows)

    def counted_pack(*args, **kwargs):
        calls["packed"] += 1
        return pack(*args, **kwargs)

    trainer.data_collator = collate
    monkeypatch.setattr(trainer.prefix_sharing, "pack", counted_pack)
    with trained_policy_and_reference(trainer, WHO, folder) as (specialist, reference):
        score_policies(trainer, {"a_": reference, "b_": own(specialist)}, trainer.train_dataset, "")
    assert 1 < calls["packed"] == calls["collated"] - 1 < 10  # and the first batch once more, to be run both ways


# ---- Batches ----


@pytest.mark.parametrize(
    ("sharing", "attention"), [("auto", "sdpa"), (False, "sdpa"), ("auto", "eager")], ids=["fast", "off", "refused"]
)
def test_no_forward_pass_is_larger_than_the_budget(build, model_dir, sizes, sharing, attention):
    trainer = build(
        model_dir,
        of_all_lengths(60),
        prefix_sharing=sharing,
        model_init_kwargs={"attn_implementation": attention, "dtype": "float32"},
    )
    rows = trainer.train_dataset
    longest = [len(p) + max(len(c), len(r)) for p, c, r in zip(*(rows[name] for name in COLUMNS), strict=True)]
    budget = 2 * 2 * max(longest)
    scores = score_pairs(trainer, trainer.model, rows, "")
    assert (trainer.prefix_sharing.taken["fast"] > 0) == ((sharing, attention) == ("auto", "sdpa"))
    assert max(sizes) <= budget
    assert len(sizes) < 60 / 2  # short pairs come more than two at a time, padded or not
    assert sum(sizes) >= sum(longest)  # and all of them came
    assert (scores["chosen_logps"] < 0).all() and (scores["rejected_tokens"] > 0).all()
    plain = build(model_dir, of_all_lengths(60), prefix_sharing=False, per_device_eval_batch_size=1)
    expected = score_pairs(plain, plain.model, plain.train_dataset, "")
    for name in expected:
        np.testing.assert_allclose(scores[name], expected[name], rtol=1e-4)


# ---- The bar ----


@pytest.mark.parametrize("disabled", [True, False])
def test_the_bar_shows_pairs_and_rates_or_nothing(build, model_dir, capsys, disabled):
    trainer = build(model_dir, of_all_lengths(12), disable_tqdm=disabled)
    capsys.readouterr()
    score_pairs(trainer, trainer.model, trainer.train_dataset, "Scoring these")
    printed = capsys.readouterr().err
    if disabled:
        assert "Scoring" not in printed and "tok" not in printed
    else:
        last = printed.split("\r")[-1]
        assert (
            last.startswith("Scoring these: 100%") and "tok/s" in last and "12/12 pairs" in last and "pairs/s" in last
        )


# ---- Afterwards ----


def test_a_model_trains_after_it_scored(build, model_dir, monkeypatch):
    """Also one that keeps tables of its first call, as many models with code of their own do."""
    original = LlamaRotaryEmbedding.forward

    def remembering(self, x, position_ids):
        kept = getattr(self, "kept", None)
        if kept is None:
            kept = self.kept = [table[0] for table in original(self, x, torch.arange(512)[None])]
        return tuple(table[position_ids] for table in kept)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", remembering)
    changes = {"trainer_class": SpecialistTrainer, "precompute_ref_log_probs": False, "max_steps": 2}
    trainer = build(model_dir, peft_config=lora(), **changes)
    first = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
    assert not trainer.model.base_model.model.model.rotary_emb.kept[0].is_inference()
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    again = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
    assert np.abs(first["chosen_logps"] - again["chosen_logps"]).max() > 0
