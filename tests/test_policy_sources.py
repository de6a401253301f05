"""Policies pulled from folders and the Hub: the right weights are used, the wrong ones refused, and no code is run."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import HfApi, constants
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from safetensors.torch import load_file, save_file
from saved_adapters import KINDS, LINEAR, WHO, edit, files_of, logits, refused, save_adapter
from tiny_models import SIZES as TINY_SIZES
from tiny_models import lora, make_model, save
from tiny_pairs import make_dataset, make_rows
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from trl_ama import AMAConfig, AMAError, AMATrainer, policy_files
from trl_ama.adapter_keys import keys_problem, saved_shapes
from trl_ama.model_identity import model_identity
from trl_ama.policies import trained_policy
from trl_ama.policy_sources import check_policy_source, split_revision
from trl_ama.prefix_trainer import ScoringTrainer
from trl_ama.safe_files import read_json


SIZES = {"list": 8, "sort": 8}


def change_weights(folder, change) -> None:
    path = Path(folder, "adapter_model.safetensors")
    save_file(change(load_file(path)), path)


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(policy_files, "_checked", {})


@pytest.fixture
def adapter(model_dir, tmp_path):
    return save_adapter(tmp_path / "adapter", model_dir)


@pytest.fixture(scope="module")
def trainers(model_dir, tmp_path_factory):
    """A trainer with an adapter of its own, and one without."""

    def build(peft):
        args = AMAConfig(str(tmp_path_factory.mktemp("out")), **QUICK)
        return ScoringTrainer(
            model_dir, args=args, train_dataset=make_dataset({"list": 4}), peft_config=lora() if peft else None
        )

    return {peft: build(peft) for peft in (True, False)}


# ---- Kinds of adapters ----


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


def test_prompts_are_no_adapters_to_score_with(model_dir, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    text = refused(model_dir, save_adapter(tmp_path / "prompts", model_dir, config))
    assert "kind PROMPT_TUNING" in text and "Use a LoRA adapter" in text


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


# ---- Weights that do not fit ----


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


# ---- Nothing is run ----


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Files that try to leave a mark in every way that a repository has; the test fails if one does."""
    sentinel = tmp_path / "was_here"
    code = f"open({str(sentinel)!r}, 'w').close()\n"
    auto_map = {name: f"modeling_evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(3) %}" + (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(sentinel) + "') }}{% endfor %}"
    )
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Evil(sentinel))
    tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_evil.T", None]}, "chat_template": template}
    yield {
        "adapter_model.bin": pickled,
        "pytorch_model.bin": pickled,
        "training_args.bin": pickled,
        "modeling_evil.py": code.encode(),
        "__init__.py": code.encode(),
        "custom_generate/generate.py": code.encode(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "chat_template.jinja": template.encode(),
        "config.json": json.dumps({"model_type": "evil", "auto_map": auto_map}).encode(),
    }
    assert not sentinel.exists()
    Evil(sentinel).__reduce__()[0](sentinel)  # it does leave a mark if it is run
    assert sentinel.exists()


def write(folder, files) -> str:
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


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


# ---- From the Hub ----


@pytest.fixture
def pulled(hub, model_dir, tmp_path):
    """Two commits of an adapter on the Hub, and the same as folders."""
    folders = [save_adapter(tmp_path / f"local{seed}", model_dir, seed=seed) for seed in (1, 2)]
    commits = [hub.write("model", "org/adapter", files_of(folder)) for folder in folders]
    return commits, folders


def test_by_id_commit_branch_and_tag(hub, pulled, trainers, model_dir):
    """The right one of two commits is used, and the fingerprint names it."""
    (old, new), folders = pulled
    api = HfApi()
    api.create_tag("org/adapter", tag="v1", revision=old)
    api.create_branch("org/adapter", branch="next/2", revision=new)
    expected = {}
    for commit, folder in zip((old, new), folders, strict=True):
        with trained_policy(trainers[True], WHO, folder) as model:
            expected[commit] = logits(model)
    assert not torch.allclose(expected[old], expected[new])
    for revision, commit in (("", new), (f"@{old}", old), (f"@{new}", new), ("@v1", old), ("@next/2", new)):
        source = f"org/adapter{revision}"
        assert split_revision(source) == ("org/adapter", revision[1:] or None)
        assert check_policy_source(model_dir, WHO, source)
        assert model_identity(source) == f"org/adapter@{commit}"
        for peft in (True, False):
            with trained_policy(trainers[peft], WHO, source) as model:
                assert torch.equal(logits(model), expected[commit]) or not peft
                torch.testing.assert_close(logits(model), expected[commit])


def test_what_was_checked_is_what_is_used(hub, pulled, trainers, model_dir):
    """A branch that moves during a run does not change what is loaded, or named, until it is checked again."""
    (_, commit), folders = pulled
    with trained_policy(trainers[True], WHO, folders[1]) as model:
        expected = logits(model)
    assert check_policy_source(model_dir, WHO, "org/adapter")
    moved = hub.write("model", "org/adapter", files_of(folders[0]))
    assert model_identity("org/adapter") == f"org/adapter@{commit}"
    with trained_policy(trainers[True], WHO, "org/adapter") as model:
        torch.testing.assert_close(logits(model), expected)
    assert check_policy_source(model_dir, WHO, "org/adapter")
    assert model_identity("org/adapter") == f"org/adapter@{moved}"


def test_only_three_files_of_an_adapter_are_asked_for(hub, pulled, model_dir, evil, trainers):
    hub.write("model", "org/adapter", evil)
    hub.clear_log()
    assert check_policy_source(model_dir, WHO, "org/adapter")
    with trained_policy(trainers[True], WHO, "org/adapter"):
        pass
    got = {request.path.rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request.path}
    assert got == {"adapter_config.json", "adapter_model.safetensors", "stage.json"}
    assert len([request for request in hub.requests if "/api/models/" in request.path]) == 1


def test_offline(hub, pulled, trainers, model_dir, tmp_path, tokenizer, monkeypatch):
    (_, commit), _ = pulled
    make_model(len(tokenizer), seed=3).save_pretrained(tmp_path / "full")
    full = hub.write("model", "org/full", files_of(tmp_path / "full"))
    hub.write("model", "org/unseen", {"adapter_config.json": b"{}"})
    for source, is_adapter in (("org/adapter", True), ("org/full", False)):
        assert check_policy_source(model_dir, WHO, source) is is_adapter
        with trained_policy(trainers[True], WHO, source):
            pass
    hub.clear_log()
    policy_files._checked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source, is_adapter, oid in (("org/adapter", True, commit), ("org/full", False, full)):
        assert model_identity(source) == f"{source}@{oid}"
        assert check_policy_source(model_dir, WHO, source) is is_adapter
        with trained_policy(trainers[True], WHO, source):
            pass
    for unseen in ("org/unseen", "org/adapter@other", f"org/adapter@{'0' * 40}"):
        text = refused(model_dir, unseen)
        assert "is not on this machine, and the Hub cannot be reached" in text and "`hf download org/" in text
    assert hub.requests == []


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_hub_in_trouble(hub, pulled, model_dir, fault):
    """What is in the cache is used; what is not is refused with a sentence."""
    (_, commit), _ = pulled
    assert check_policy_source(model_dir, WHO, "org/adapter")
    hub.fail(fault, times=100)
    policy_files._checked.clear()
    assert check_policy_source(model_dir, WHO, "org/adapter")
    assert model_identity("org/adapter") == f"org/adapter@{commit}"
    assert "the Hub cannot be reached" in refused(model_dir, "org/nothing")


def test_repositories_and_revisions_that_are_not_there(hub, pulled, model_dir):
    text = refused(model_dir, "org/nothing")
    assert "shows no such repository" in text and "HF_TOKEN" in text
    for revision in ("v9", "0" * 40):
        text = refused(model_dir, f"org/adapter@{revision}")
        assert f"'org/adapter' has no branch, tag or commit '{revision}'" in text
    with pytest.raises(AMAError, match="The model 'org/adapter' .*no branch, tag or commit 'v9'"):
        model_identity("org/adapter", "v9")
    with pytest.raises(AMAError, match="shows no such repository"):
        model_identity("org/nothing")
    for name in ("./nowhere", "/no/where", "a b"):
        assert "there is no such folder, and it cannot be a Hub id" in refused(model_dir, name)
    hub.write("model", "org/empty", {"README.md": b"nothing"})
    assert "neither an adapter (no adapter_config.json) nor a model" in refused(model_dir, "org/empty")


def test_private_repositories(hub, pulled, model_dir, adapter, monkeypatch):
    hub.create("model", "org/secret", private=True)
    commit = hub.write("model", "org/secret", files_of(adapter))
    for token in (None, hub.OTHER_TOKEN, "hf_wrong"):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        for source in ("org/secret", f"org/secret@{commit}"):
            text = refused(model_dir, source)
            assert "token" in text and "hf auth" in text and (token is None or token not in text)
    monkeypatch.setenv("HF_TOKEN", hub.READ_TOKEN)
    assert check_policy_source(model_dir, WHO, "org/secret")
    assert model_identity("org/secret") == f"org/secret@{commit}"


def test_a_pickle_on_the_hub(hub, model_dir, adapter, evil, trainers):
    Path(adapter, "adapter_model.safetensors").unlink()
    hub.write("model", "org/pickle", {**files_of(adapter), **evil})
    text = refused(model_dir, "org/pickle")
    assert "adapter_model.bin only, which is a pickle" in text
    with pytest.raises(AMAError, match="pickle"), trained_policy(trainers[True], WHO, "org/pickle"):
        pass
    assert not [request for request in hub.requests if request.path.endswith(".bin") and request.method == "GET"]


def test_a_model_with_code_on_the_hub(hub, model_dir, tmp_path, tokenizer, evil, trainers):
    make_model(len(tokenizer), seed=3).save_pretrained(tmp_path / "full")
    files = files_of(tmp_path / "full")
    config = json.loads(files["config.json"])
    auto_map = json.loads(evil["config.json"])["auto_map"]
    hub.write("model", "org/full", {**evil, **files})
    assert not check_policy_source(model_dir, WHO, "org/full")
    with trained_policy(trainers[True], WHO, "org/full") as model:
        plain = logits(model)
    hub.write("model", "org/full", {"config.json": json.dumps({**config, "auto_map": auto_map})})
    assert "`auto_map` in its config.json" in refused(model_dir, "org/full")
    with trained_policy(trainers[True], WHO, f"org/full@{hub.commits('model', 'org/full')[1].oid}") as model:
        assert torch.equal(logits(model), plain)


def test_revisions_of_the_base_model(hub, model_dir, adapter):
    old = hub.write("model", "org/base", files_of(model_dir))
    new = hub.write("model", "org/base", {"README.md": b"new"})
    HfApi().create_tag("org/base", tag="v1", revision=old)
    edit(adapter, base_model_name_or_path="org/base", revision=old)
    for revision in (old, "v1"):
        assert check_policy_source("org/base", WHO, adapter, base_revision=revision)
    for revision in (None, "main", new):
        text = refused("org/base", adapter, base_revision=revision)
        assert f"trained on revision '{old}' of 'org/base'" in text and f"'{revision or 'main'}' ({new})" in text
        assert f"Set model_revision to '{old}'" in text
    edit(adapter, revision="v1")
    assert check_policy_source("org/base", WHO, adapter, base_revision=old)
    assert f"revision 'v1' ({old})" in refused("org/base", adapter)
    for unknown in ("gone", None):  # nothing to compare
        edit(adapter, revision=unknown)
        assert check_policy_source("org/base", WHO, adapter)


def test_the_trainer_with_specialists_of_the_hub(hub, pulled, model_dir, quick_args):
    """Their log-probs are those of the same adapters from folders, number for number."""
    (old, _), folders = pulled

    def columns(first, second):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(max_steps=2),
            train_dataset=make_dataset(SIZES),
            peft_config=lora(),
            specialists={"list": first, "sort": second},
        )
        trainer.train()
        return {name: trainer.train_dataset[name] for name in trainer.train_dataset.column_names if "logps" in name}

    ours, theirs = columns(f"org/adapter@{old}", "org/adapter"), columns(*folders)
    assert set(ours) == {f"{who}_{side}_logps" for who in ("ref", "specialist") for side in ("chosen", "rejected")}
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    assert not np.allclose(ours["specialist_chosen_logps"], ours["ref_chosen_logps"])


def test_the_pipeline_with_specialists_of_the_hub(hub, pulled, model_dir, tmp_path):
    from trl import ModelConfig, TrlParser

    from trl_ama import TaskMixtureConfig, run_pipeline
    from trl_ama.pipeline_arguments import PipelineArguments

    (old, new), folders = pulled
    for task in SIZES:
        rows = "".join(json.dumps(row) + "\n" for row in make_rows(task, 12, 0))
        (tmp_path / f"{task}.jsonl").write_text(rows)

    def losses(output_dir, *specialists):
        recipe = {
            **QUICK,
            "model_name_or_path": model_dir,
            "output_dir": str(output_dir),
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
            "tasks": [
                {"task": task, "path": "json", "data_files": str(tmp_path / f"{task}.jsonl"), "specialist": specialist}
                for task, specialist in zip(SIZES, specialists, strict=True)
            ],
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(recipe))
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        run_pipeline(*parser.parse_args_and_config(["--config", str(path)]), stages=("losses",))
        parts = [output_dir / "reference_losses" / task / "train.parquet" for task in SIZES]
        return concatenate_datasets([Dataset.from_parquet(str(part)) for part in parts])

    ours = losses(tmp_path / "hub", "org/adapter", f"org/adapter@{old}")
    theirs = losses(tmp_path / "local", folders[1], folders[0])
    for name in ("specialist_chosen_logps", "specialist_rejected_logps"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for task, commit in zip(SIZES, (new, old), strict=True):
        note = read_json(tmp_path / "hub" / "reference_losses" / task / "fingerprint.json")
        assert note["fingerprint"]["specialist"] == f"org/adapter@{commit}"
    moved = hub.write("model", "org/adapter", files_of(folders[0]))
    with pytest.raises(AMAError, match=f"specialist='org/adapter@{new}', but this run has .*@{moved}"):
        losses(tmp_path / "hub", "org/adapter", f"org/adapter@{old}")
