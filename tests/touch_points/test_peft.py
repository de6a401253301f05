"""Touch points in PEFT: adapters by name, their weights, and what they wrap."""

import inspect

import torch
from tiny_models import lora, make_model
from tiny_pairs import make_dataset
from touched import dpo_fixture  # noqa: F401 - fixtures
from trl import DPOConfig, DPOTrainer


def test_24_peft_says_what_did_not_fit(dpo, tmp_path):
    from peft import load_peft_weights
    from peft.utils import set_peft_model_state_dict

    dpo.model.save_pretrained(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    weights["base_model.model.nobody.lora_A.weight"] = weights.pop(next(iter(weights)))
    result = set_peft_model_state_dict(dpo.model, weights)
    assert [key for key in result.missing_keys if "lora_" in key] and result.unexpected_keys


def test_34_adapters_on_a_quantised_base_are_trained_in_bf16():
    source = inspect.getsource(DPOTrainer.__init__)
    assert "if _is_quantized_model:" in source and "param.data = param.data.to(torch.bfloat16)" in source


def test_80_peft_layers_know_what_they_wrap(dpo):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    layer = next(module for module in dpo.model.modules() if isinstance(module, BaseTunerLayer))
    assert type(layer.get_base_layer()) is torch.nn.Linear
    assert issubclass(TrainableTokensWrapper, AuxiliaryTrainingWrapper)
    assert "self.original_module" in inspect.getsource(AuxiliaryTrainingWrapper)
    assert "LORA" in PEFT_TYPE_TO_CONFIG_MAPPING and PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"


def test_93_adapters_are_made_by_names_that_can_be_watched(model_dir, monkeypatch, tmp_path):
    import trl.trainer.dpo_trainer
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    create = trl.trainer.dpo_trainer.get_peft_model
    monkeypatch.setattr(
        trl.trainer.dpo_trainer, "get_peft_model", lambda *args, **kwargs: made.append(args) or create(*args, **kwargs)
    )
    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    data = make_dataset({"list": 4})
    DPOTrainer(model_dir, args=args, train_dataset=data, peft_config=lora())
    assert len(made) == 1 and type(made[0][0]).__name__ == "LlamaForCausalLM"
    policy, added = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora()), []
    add = policy.add_adapter
    policy.add_adapter = lambda *args, **kwargs: added.append(args) or add(*args, **kwargs)
    DPOTrainer(policy, args=args, train_dataset=data)
    assert [name for name, _ in added] == ["ref"]


def test_100_trainable_tokens_of_a_tied_head():
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import TrainableTokensWrapper

    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    heads = [
        get_peft_model(make_model(26, tie_word_embeddings=tied), config).get_output_embeddings()
        for tied in (True, False)
    ]
    assert [isinstance(head, TrainableTokensWrapper) for head in heads] == [True, False]
