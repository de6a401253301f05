"""Trainings on a card learn, in every precision and on a quantised base, and go on from their checkpoints."""

import pytest
import torch
from on_card import CARD, needs_card, only_on_a_card
from peft import LoraConfig
from tiny_models import make_model, save
from tiny_pairs import make_dataset
from tiny_runs import QUICK, losses_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_ama import AMAConfig, AMATrainer


pytestmark = needs_card
ON_CARD = {**QUICK, "use_cpu": CARD == "cpu", "learning_rate": 5e-3, "logging_steps": 1, "seed": 7}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # which bitsandbytes can quantise


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save(make_model(len(tokenizer), **SIZES), tokenizer, tmp_path_factory.mktemp("base"))


def trainer(model, folder, adapter=True, **settings) -> AMATrainer:
    return AMATrainer(
        model,
        args=AMAConfig(str(folder), mixing="uniform", **{**ON_CARD, "max_steps": 6, **settings}),
        train_dataset=make_dataset({"list": 4, "brief": 4}),  # a step is the whole of them
        peft_config=LoraConfig(**LORA) if adapter else None,
    )


def learns(run: AMATrainer) -> None:
    run.train()
    losses = losses_of(run)
    assert losses[-1] < 0.9 * losses[0], losses  # of the very pairs that it is trained on
    assert run.prefix_sharing.taken["plain"] == 0 < run.prefix_sharing.taken["fast"]
    assert {weight.device.type for weight in run.model.parameters()} == {CARD}


@pytest.mark.parametrize("precision", ["float32", "bf16", pytest.param("fp16", marks=only_on_a_card)])
@pytest.mark.parametrize("adapter", [True, False])
def test_learns(base, tmp_path, adapter, precision):
    half = {} if precision == "float32" else {precision: True}
    learns(trainer(base, tmp_path, adapter, gradient_checkpointing=adapter, **half))


def quantised(base: str) -> AutoModelForCausalLM:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0 if CARD == "cuda" else "cpu"}
    )


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_on_a_card)])
def test_learns_on_four_bits(base, tmp_path, precision):
    learns(trainer(quantised(base), tmp_path, optim="paged_adamw_8bit", **{precision: True}))


def test_goes_on_from_a_checkpoint_with_paged_states(base, tmp_path):
    settings = {"optim": "paged_adamw_8bit", "bf16": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(quantised(base), tmp_path, **settings).train()
    again = trainer(quantised(base), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4 and len(losses_of(again)) == 4


def test_a_full_specialist_is_scored_on_the_card(base, tmp_path):
    """It is a second whole model, which is to be where the first one is."""
    tuned = trainer(base, tmp_path / "tuned", adapter=False, max_steps=1)
    tuned.train()
    tuned.save_model(str(tmp_path / "specialist"))
    specialists = {task: str(tmp_path / "specialist") for task in ("list", "brief")}
    run = AMATrainer(
        base,
        args=AMAConfig(str(tmp_path / "run"), mixing="ama_s", specialists=specialists, **{**ON_CARD, "max_steps": 1}),
        train_dataset=make_dataset({"list": 16, "brief": 16}),
    )
    run.train()
    assert all(loss == loss for loss in losses_of(run)) and run.state.global_step == 1
