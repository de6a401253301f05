"""Adapters on parameters of mixtures of experts, where PEFT wraps one module several times: put on, switched and taken off."""

import pytest
import torch
from adapter_kinds import EXPERTS, EXPERTS_KINDS, LORA, make_adapter, make_moe
from peft import LoraConfig, PeftModel
from tiny_models import save
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM

from trl_ama import AMAConfig, AMATrainer
from trl_ama.policies.switching import reference_policy, trained_policy


pytestmark = pytest.mark.filterwarnings("ignore")
WHO = "the specialist of task 'list'"
SPECIALISTS = ["experts, two at once", "experts, one parameter", "experts and layers", "lora"]


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return save(make_moe(len(tokenizer)), tokenizer, folder)


@pytest.fixture(scope="module")
def specialists(base, tmp_path_factory):
    folders = {}
    for kind in SPECIALISTS:
        folders[kind] = str(tmp_path_factory.mktemp("specialist") / "adapter")
        model = AutoModelForCausalLM.from_pretrained(base)
        make_adapter(model, {**EXPERTS_KINDS, **LORA}[kind]).save_pretrained(folders[kind])
    return folders


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


@pytest.fixture(scope="module", params=["experts, two at once", "q_proj"])
def trainer(request, base, tokenizer, tmp_path_factory):
    """A policy whose own adapter wraps the experts twice, or not at all."""
    config = EXPERTS_KINDS.get(request.param, lambda: LoraConfig(r=4, target_modules=["q_proj"]))()
    args = AMAConfig(output_dir=str(tmp_path_factory.mktemp("run")), mixing="proportional", max_steps=2, **QUICK)
    return AMATrainer(base, args=args, train_dataset=make_dataset({"list": 8, "sort": 8}), peft_config=config)


@pytest.mark.parametrize("kind", SPECIALISTS)
def test_a_specialist_is_itself_and_leaves_no_trace(trainer, base, specialists, kind):
    """The logits of PEFT alone; the policy and its reference are afterwards, bit by bit, what they were."""
    before, modules = logits(trainer.model), dict(trainer.model.named_modules())
    order = [name for name, _ in trainer.model.named_parameters()]
    alone = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), specialists[kind]))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (alone - plain).abs().max() > 0.05
    for _ in range(2):  # what was taken off once is put on again
        with trained_policy(trainer, WHO, specialists[kind]) as model:
            torch.testing.assert_close(logits(model), alone, rtol=0, atol=1e-5)
    assert dict(trainer.model.named_modules()) == modules
    assert [name for name, _ in trainer.model.named_parameters()] == order
    assert torch.equal(logits(trainer.model), before)
    with reference_policy(trainer) as reference:
        torch.testing.assert_close(logits(reference), plain, rtol=0, atol=1e-6)


def test_a_run_with_specialists_scores_them_on_the_experts(base, specialists, tmp_path):
    """Both parameters in policy and specialists: log-probs of the data are theirs, and the policy learns."""
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    args = AMAConfig(output_dir=str(tmp_path), mixing="ama_s", max_steps=2, learning_rate=1e-2, **QUICK)
    chosen = {"list": specialists["experts, two at once"], "sort": specialists["lora"]}
    trainer = AMATrainer(
        base, args=args, train_dataset=make_dataset({"list": 8, "sort": 8}), peft_config=config, specialists=chosen
    )
    data = trainer.train_dataset
    names = data.features["task"].names
    models = {
        task: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        for task, folder in chosen.items()
    }
    for row in data.select(range(0, 16, 3)):
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            scores = models[names[row["task"]]](input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum().item()
        assert row["specialist_chosen_logps"] == pytest.approx(expected, abs=1e-3)
    weight = next(value for name, value in trainer.model.named_parameters() if "experts" in name and "lora_B" in name)
    assert not weight.any()
    trainer.train()
    assert weight.abs().max() > 1e-3
