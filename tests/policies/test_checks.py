"""Policies in folders: weights that do not fit are refused, and no code is run."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PromptTuningConfig,
)
from policy_worlds import (  # noqa: F401 - fixtures
    adapter_fixture,
    change_weights,
    evil_fixture,
    nothing_checked_fixture,
    trainers_fixture,
    write,
)
from saved_adapters import KINDS, WHO, edit, logits, refused, save_adapter
from tiny_models import SIZES as TINY_SIZES
from tiny_models import make_model
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from trl_ama import AMAError
from trl_ama.policies import files as policy_files
from trl_ama.policies.adapter_keys import keys_problem, saved_shapes
from trl_ama.policies.checks import check_policy_source
from trl_ama.policies.switching import trained_policy


def test_prompts_are_no_adapters_to_score_with(model_dir, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    text = refused(model_dir, save_adapter(tmp_path / "prompts", model_dir, config))
    assert "kind PROMPT_TUNING" in text and "Use a LoRA adapter" in text


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts_and_of_a_quantised_base(tmp_path, tokenizer):
    config = MixtralConfig(vocab_size=len(tokenizer), num_local_experts=4, **TINY_SIZES)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    experts = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    folder = save_adapter(tmp_path / "a", tmp_path / "experts", experts)
    assert check_policy_source(str(tmp_path / "experts"), WHO, folder)
    change_weights(folder, lambda weights: {name: weights[name] for name in sorted(weights)[1:]})
    assert "1 are missing" in refused(str(tmp_path / "experts"), folder)

    pytest.importorskip("bitsandbytes")
    make_model(len(tokenizer), hidden_size=64).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    folder = save_adapter(tmp_path / "q", tmp_path / "base", quantization_config=quantised)
    assert check_policy_source(str(tmp_path / "base"), WHO, folder)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vera"}))
def test_names_and_shapes_are_checked_without_reading_weights(model_dir, tmp_path, kind):
    """Found from the file's header: a weight that is missing, one too many, one of another shape."""
    folder = save_adapter(tmp_path / kind, model_dir, KINDS[kind])
    place = policy_files.policy_source(WHO, folder)
    shapes = saved_shapes(str(Path(folder, "adapter_model.safetensors")))
    assert keys_problem(place.peft_config(), shapes, model_dir) is None
    first = next(key for key in shapes if "embed_tokens.weight" not in key and "base_layer" not in key)
    one_less = {key: shape for key, shape in shapes.items() if key != first}
    assert "missing" in keys_problem(place.peft_config(), one_less, model_dir)
    wrong = {**shapes, first: (*shapes[first][:-1], shapes[first][-1] + 1)}
    assert keys_problem(place.peft_config(), wrong, model_dir).startswith("1 have another shape")
    assert "1 are unexpected" in keys_problem(place.peft_config(), {**shapes, "base_model.model.x": (2,)}, model_dir)


def test_an_adapter_of_another_architecture(model_dir, adapter, tmp_path, tokenizer):
    other = tmp_path / "wide"
    make_model(len(tokenizer), hidden_size=64, num_hidden_layers=3).save_pretrained(other)
    edit(adapter, base_model_name_or_path=str(other))
    text = refused(str(other), adapter)
    assert f"does not fit the base model '{other}'" in text and "22 have another shape" in text
    assert "model.layers.0" in text and "[4, 32], and should be [4, 64]" in text and "another architecture" in text
    edit(adapter, target_modules=["c_attn"])
    assert "PEFT finds no place for it (Target modules" in refused(str(other), adapter)


@pytest.mark.parametrize("when", ["checked", "loaded"])
@pytest.mark.parametrize("peft", [True, False])
def test_weights_that_are_missing_or_too_many(trainers, model_dir, adapter, when, peft):
    def drop_two_add_one(weights):
        for name in sorted(weights)[:2]:
            del weights[name]
        return {**weights, "base_model.model.model.layers.7.q_proj.lora_A.weight": torch.ones(4, 32)}

    change_weights(adapter, drop_two_add_one)
    trainer = trainers[peft]
    before = logits(trainer.model)
    if when == "checked":
        text = refused(model_dir, adapter)
    else:
        with pytest.raises(AMAError) as caught, trained_policy(trainer, WHO, adapter):
            pass
        text = str(caught.value)
    assert "2 are missing (the first: 'model.layers.0.mlp.down_proj.lora_A.weight')" in text
    assert "1 are unexpected (the first: 'model.layers.7.q_proj.lora_A.weight')" in text
    assert torch.equal(logits(trainer.model), before)


def test_a_module_that_was_trained_but_not_saved(trainers, model_dir, tmp_path):
    folder = save_adapter(tmp_path / "a", model_dir, KINDS["modules_to_save"])
    change_weights(folder, lambda weights: {key: value for key, value in weights.items() if "lm_head" not in key})
    assert "lm_head" in refused(model_dir, folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -8])
def test_a_weights_file_that_was_cut_off(trainers, model_dir, adapter, keep):
    path = Path(adapter, "adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged adapter_model.safetensors" in refused(model_dir, adapter)
    with pytest.raises(AMAError, match="damaged"), trained_policy(trainers[True], WHO, adapter):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_a_damaged_configuration(model_dir, adapter, content):
    Path(adapter, "adapter_config.json").write_text(content)
    assert "damaged adapter_config.json" in refused(model_dir, adapter)


@pytest.mark.parametrize("changes", [{"peft_type": "NEWEST"}, {"peft_type": None}, {"task_type": "X"}])
def test_a_configuration_that_peft_does_not_know(model_dir, adapter, changes):
    edit(adapter, **changes)
    text = refused(model_dir, adapter)
    assert "cannot read" in text and "Update PEFT" in text


def test_settings_of_a_later_peft_are_no_obstacle(model_dir, adapter):
    edit(adapter, some_future_field=1)
    with pytest.warns(UserWarning, match="some_future_field"):
        assert check_policy_source(model_dir, WHO, adapter)


def test_replicated_layers(model_dir, adapter):
    edit(adapter, layer_replication=[[0, 2], [1, 2]])
    assert "layer_replication" in refused(model_dir, adapter)


def test_a_pickle_is_never_read(model_dir, trainers, adapter, evil):
    """Beside safetensors it is ignored; alone it is refused, and the sentence says why."""
    with trained_policy(trainers[True], WHO, adapter) as model:
        expected = logits(model)
    write(adapter, evil)
    assert check_policy_source(model_dir, WHO, adapter)
    for peft in (True, False):
        with trained_policy(trainers[peft], WHO, adapter) as model:
            torch.testing.assert_close(logits(model), expected)
    Path(adapter, "adapter_model.safetensors").unlink()
    text = refused(model_dir, adapter)
    assert "adapter_model.bin only, which is a pickle and can run any code" in text
    assert "safe_serialization=True" in text
    with pytest.raises(AMAError, match="pickle"), trained_policy(trainers[True], WHO, adapter):
        pass
    Path(adapter, "adapter_model.bin").unlink()
    assert "no safetensors weights" in refused(model_dir, adapter)


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_of_a_model_is_not_run(model_dir, trainers, tmp_path, tokenizer, evil, model_type):
    folder = tmp_path / "model"
    make_model(len(tokenizer), seed=3).save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), **json.loads(evil.pop("config.json"))}
    write(folder, evil)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    text = refused(model_dir, str(folder))
    assert "Python code of its own (`auto_map`" in text and "trust_remote_code: true" in text
    with pytest.raises(AMAError, match="auto_map"), trained_policy(trainers[True], WHO, str(folder)):
        pass
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert not check_policy_source(model_dir, WHO, str(folder))
    with trained_policy(trainers[True], WHO, str(folder)) as model:  # nor is what lies beside it
        assert type(model).__module__.startswith("transformers.models.llama")
    (folder / "model.safetensors").unlink()
    text = refused(model_dir, str(folder))
    assert "pytorch_model.bin only, which is a pickle" in text
    with pytest.raises(AMAError, match="pickle"), trained_policy(trainers[True], WHO, str(folder)):
        pass


def test_code_is_run_if_the_user_says_so(model_dir, trainers, tmp_path, tokenizer, monkeypatch):
    folder, sentinel = tmp_path / "own", tmp_path / "was_here"
    make_model(len(tokenizer), seed=3).save_pretrained(folder)
    code = (
        f"open({str(sentinel)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "modeling_own.py").write_text(code)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    refused(model_dir, str(folder))
    assert not sentinel.exists()
    assert not check_policy_source(model_dir, WHO, str(folder), trust_remote_code=True)
    monkeypatch.setattr(trainers[True].args, "trust_remote_code", True)
    with trained_policy(trainers[True], WHO, str(folder)) as model:
        assert type(model).__name__ == "OwnModel"
    assert sentinel.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "modeling_evil"},
        {"corda_config": {"cache_file": "adapter_model.bin"}},
        {"peft_type": "XLORA", "adapters": {"0": "adapter"}},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "adapter_model.bin"},
        {"peft_type": "SHADOW", "shadow_model": "org/other"},
    ],
)
def test_settings_that_read_more_than_the_adapter(model_dir, adapter, evil, changes):
    write(adapter, evil)
    edit(adapter, **changes)
    assert "only an adapter's own weights are read" in refused(model_dir, adapter)


def test_names_of_classes_in_an_adapter_are_not_imported(model_dir, trainers, adapter, evil, monkeypatch):
    write(adapter, evil)
    monkeypatch.syspath_prepend(adapter)
    mapping = {"base_model_class": "Evil", "parent_library": "modeling_evil"}
    edit(adapter, auto_mapping=mapping, base_model_class="modeling_evil.Evil", megatron_core="modeling_evil")
    edit(adapter, runtime_config={"ephemeral_gpu_offload": True})
    assert check_policy_source(model_dir, WHO, adapter)
    for peft in (True, False):
        with trained_policy(trainers[peft], WHO, adapter):
            pass
