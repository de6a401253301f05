"""Adapters switched on one base: each is itself, and leaves no trace."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
)
from policy_worlds import change_weights, nothing_checked_fixture, trainers_fixture  # noqa: F401 - fixtures
from saved_adapters import KINDS, LINEAR, WHO, logits, save_adapter
from tiny_models import lora, make_model, save
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM

from trl_ama import AMAConfig, AMAError
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.policies.adapter_keys import saved_shapes
from trl_ama.policies.checks import check_policy_source
from trl_ama.policies.switching import trained_policy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_itself_and_leaves_no_trace(trainers, model_dir, tmp_path, kind, peft):
    """The same logits as PEFT alone gives; afterwards the base model is, bit by bit, what it was."""
    folder = save_adapter(tmp_path / kind, model_dir, KINDS[kind])
    assert check_policy_source(model_dir, WHO, folder)
    trainer = trainers[peft]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainable = {name: value.requires_grad for name, value in trainer.model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
    plain = logits(trainer.model)
    ids = torch.arange(4, 20)[None]
    with trained_policy(trainer, WHO, folder) as model:
        ours = logits(model)
        with torch.no_grad():  # what scores
            scored = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder)
    torch.testing.assert_close(ours, logits(alone), rtol=1e-4, atol=1e-5)
    expected = logits(alone).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)
    after = trainer.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.requires_grad for name, value in trainer.model.named_parameters()} == trainable
    assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks
    if peft:
        assert list(trainer.model.peft_config) == ["default"]
    assert torch.equal(logits(trainer.model), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
        LoraConfig(r=4, trainable_token_indices=[5, 6], **LINEAR),  # of embeddings that the head is tied to
        TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
    ],
)
def test_adapters_of_the_head_are_refused(trainers, model_dir, tmp_path, config):
    """TRL's fused head multiplies by the head's base weight: the scores would be those of another policy."""
    folder = save_adapter(tmp_path / "head", model_dir, config)
    trainer = trainers[True]
    before = logits(trainer.model)
    with (
        pytest.raises(AMAError, match="adapts the LM head itself.*Merge it into a model"),
        trained_policy(trainer, WHO, folder),
    ):
        pass
    assert torch.equal(logits(trainer.model), before)


def test_the_trainer_saves_only_its_own_adapter_afterwards(trainers, model_dir, tmp_path):
    with trained_policy(trainers[True], WHO, save_adapter(tmp_path / "a", model_dir, KINDS["modules_to_save"])):
        pass
    trainers[True].model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()) == []
    keys = saved_shapes(str(tmp_path / "saved" / "adapter_model.safetensors"))
    assert keys and all("lora_" in key for key in keys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peft", [True, False])
def test_base_weights_that_an_adapter_brings_along_are_put_back(tmp_path, tokenizer, peft):
    """Biases and embeddings are saved, and loaded, in the base model's own place."""
    base = str(tmp_path / "base")
    save(make_model(len(tokenizer), attention_bias=True, tie_word_embeddings=False), tokenizer, base)
    config = LoraConfig(r=4, bias="all", target_modules=["embed_tokens", "q_proj"])
    folder = save_adapter(tmp_path / "a", base, config)

    def move_embeddings(weights):
        name = next(name for name in weights if name.endswith("embed_tokens.base_layer.weight"))
        return {**weights, name: weights[name] + 1}

    change_weights(folder, move_embeddings)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    trainer = ScoringTrainer(
        base,
        args=AMAConfig(str(tmp_path / "out"), **QUICK),
        train_dataset=make_dataset({"list": 4}),
        peft_config=lora() if peft else None,
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert check_policy_source(base, WHO, folder)
    with trained_policy(trainer, WHO, folder) as model:
        torch.testing.assert_close(logits(model), logits(alone), rtol=1e-4, atol=1e-5)
    after = trainer.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
