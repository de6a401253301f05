"""A merge is held to what its adapter does: every kind of PEFT's is merged right or refused in a sentence, and nothing in between."""

import copy
import dataclasses
import functools
import gc
import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
from adapter_kinds import (
    EXPERTS_KINDS,
    LORA,
    NOT_BUILT,
    NOT_MERGED,
    OTHERS,
    TIED,
    make_adapter,
    make_moe,
)
from huggingface_hub import ModelCard
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, make_model, save
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from trl_ama import AMAError
from trl_ama.merge import weights as merged_weights
from trl_ama.merge.check import check_sequences, in_32_bits, log_probs
from trl_ama.merge.merge import merge_adapter


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("nothing_old_is_searched"),
]


@pytest.fixture(scope="module")
def nothing_old_is_searched():
    """Merging collects garbage several times, and a test run has much that is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    models = {
        "llama": make_model(len(tokenizer), tie_word_embeddings=False),
        "with biases": make_model(len(tokenizer), attention_bias=True),
        "tied": make_model(len(tokenizer)),
        "experts": make_moe(len(tokenizer)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def values(model) -> torch.Tensor:
    """Log-probs of all tokens after texts, in which the tokens that adapters train are."""
    model.eval()
    texts = torch.stack([torch.arange(3, 23), torch.arange(22, 2, -1)])
    with torch.no_grad():
        return model(input_ids=texts).logits.float().log_softmax(-1)


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@functools.cache
def loaded_once(base: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A base, of which copies are taken, and its values."""
    return load(base), values(load(base))


def held(base: str, kind, tmp_path) -> dict:
    """Merge an adapter by us, and hold the result to PEFT's own model, apart from any figure of ours."""
    model, plain = loaded_once(base)
    make_adapter(copy.deepcopy(model), kind).save_pretrained(tmp_path / "adapter")
    expected = values(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter"))
    note = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=base)
    merged = load(tmp_path / "merged")
    effect = (expected - plain).abs().mean().item()
    assert effect > 0.01
    assert (values(merged) - expected).abs().mean().item() < 1e-4 * effect + 2e-6
    assert note["adapter_effect"] > 0.01 and note["share_of_effect"] < 1e-3 and note["rounding"] < 1e-5
    return note


@pytest.mark.parametrize("kind", [name for name in {**LORA, **OTHERS} if name != "lora_bias"])
def test_what_peft_can_merge_is_merged_as_it_computes(bases, tmp_path, kind):
    held(bases["llama"], {**LORA, **OTHERS}[kind], tmp_path)


@pytest.mark.parametrize("kind", ["bias: all", "bias: lora_only", "lora_bias"])
def test_biases_that_were_trained_along(bases, tmp_path, kind):
    held(bases["with biases"], LORA[kind], tmp_path)
    base, merged = (
        load_file(Path(folder, "model.safetensors")) for folder in (bases["with biases"], tmp_path / "merged")
    )
    assert not torch.equal(*(weights["model.layers.0.self_attn.q_proj.bias"] for weights in (base, merged)))


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_stay_tied_where_both_are_changed_alike(bases, tmp_path, kind):
    held(bases["tied"], TIED[kind], tmp_path)
    merged = load(tmp_path / "merged")
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    alike = torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    assert shared == alike == merged.config.tie_word_embeddings
    assert shared == (kind.endswith("kept tied") or kind in ("tokens beside", "tokens alone"))


@pytest.mark.parametrize("kind", EXPERTS_KINDS)
def test_parameters_of_experts(bases, tmp_path, kind):
    held(bases["experts"], EXPERTS_KINDS[kind], tmp_path)
    names = {"gate_up_proj", "down_proj"} if "two" in kind or "and" in kind else {"gate_up_proj"}
    base, merged = (load(folder) for folder in (bases["experts"], tmp_path / "merged"))
    changed = {
        name.rsplit(".")[-1]
        for name, value in merged.named_parameters()
        if ".experts." in name and not torch.equal(value, base.get_parameter(name))
    }
    assert changed == (set() if kind == "router" else names)


@pytest.mark.parametrize("kind", NOT_MERGED)
def test_what_cannot_be_merged_is_refused_in_a_sentence(bases, tmp_path, kind):
    config, text = NOT_MERGED[kind]
    make_adapter(load(bases["llama"]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AMAError, match=text) as caught:
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["llama"])
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_the_table_knows_every_kind_of_peft():
    kinds = [*LORA.values(), *TIED.values(), *OTHERS.values(), *(config for config, _ in NOT_MERGED.values())]
    known = {str(kind().peft_type.value) for kind in kinds}
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - known - NOT_BUILT == set()
    # And every start of LoRA's that its layers name
    source = inspect.getsource(LoraLayer.__init__) + inspect.getsource(peft.tuners.lora.layer)
    literal = {field.name: field.type for field in dataclasses.fields(LoraConfig)}["init_lora_weights"]
    named = {word for word in ("gaussian", "eva", "olora", "pissa", "orthogonal", "lora_ga") if word in source}
    assert "corda" in str(literal) and named <= set(LORA) | {"gaussian"}


# ---- Wrong sums and rounding ----


def test_a_merge_that_is_off_by_a_part_of_the_effect_is_refused(bases, tmp_path, monkeypatch):
    """An adapter that changes little, added one and a half times: far below half a nat, and another model all the same."""
    make_adapter(load(bases["llama"]), LORA["lora"], scale=0.01).save_pretrained(tmp_path / "adapter")
    merge = merged_weights._merge_layers

    def too_much(wrapped, place):
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("specialist", 1.5)
        return merge(wrapped, place)

    monkeypatch.setattr(merged_weights, "_merge_layers", too_much)
    with pytest.raises(AMAError, match="gives other log-probs than on its base") as caught:
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["llama"])
    off = float(str(caught.value).split("by ")[1].split()[0])
    assert 0 < off < 0.1
    monkeypatch.undo()
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["llama"])


def test_osf_is_added_once(bases, tmp_path):
    """PEFT adds what OSF learned again whenever it is asked to merge."""
    make_adapter(load(bases["llama"]), lambda: OSFConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    wrapped = PeftModel.from_pretrained(load(bases["llama"]), tmp_path / "adapter")
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["llama"])
    found = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)


@pytest.fixture
def half_base(tokenizer, tmp_path):
    return save(make_model(len(tokenizer)).bfloat16(), tokenizer, tmp_path / "base")


@pytest.mark.parametrize("kind", ["lora", "dora", "OSF", "embeddings, kept tied", "tokens beside"])
def test_in_16_bits_rounding_is_all_that_is_off(half_base, tmp_path, kind):
    """What rounding does is measured, and what is off is as much."""
    make_adapter(load(half_base), {**LORA, **OTHERS, **TIED}[kind]).save_pretrained(tmp_path / "adapter")
    note = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=half_base)
    assert note["dtype"] == "bfloat16" and note["adapter_effect"] > 0.2
    assert 1e-4 < note["rounding"] < 0.05
    assert note["mean_difference"] < 2 * note["rounding"] and note["share_of_effect"] < 0.1
    types = {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert types == {torch.bfloat16}


def test_an_adapter_is_not_rounded_away_without_being_asked_for(half_base, tmp_path):
    make_adapter(load(half_base), LORA["lora"], scale=0.0003).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    with pytest.raises(AMAError, match="much of it would be rounded away. Keep it with --save_dtype float32"):
        merge_adapter(adapter, tmp_path / "merged", base_model=half_base)
    assert not (tmp_path / "merged").exists()
    exact = merge_adapter(adapter, tmp_path / "exact", base_model=half_base, save_dtype="float32")
    assert exact["share_of_effect"] < 0.01
    rounded = merge_adapter(adapter, tmp_path / "rounded", base_model=half_base, save_dtype="bfloat16")
    assert rounded["share_of_effect"] > 0.25 and rounded["adapter_effect"] == pytest.approx(
        exact["adapter_effect"], rel=0.01
    )
    card = ModelCard.load(tmp_path / "rounded" / "README.md").text
    assert f"{rounded['share_of_effect']:.2%} of what the adapter changes" in card
    assert "Rounding the merged weights to bfloat16 alone" in card


def test_an_adapter_that_does_nothing_leaves_the_base(bases, tmp_path):
    get_peft_model(load(bases["tied"]), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    note = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["tied"])
    assert note["adapter_effect"] == note["mean_difference"] == 0 and note["share_of_effect"] is None
    assert "where the adapter changes nothing" in (tmp_path / "merged" / "README.md").read_text()


# ---- What is measured ----


def test_tokens_of_all_the_vocabulary_and_of_the_adapter(tokenizer):
    sequences = check_sequences(
        tokenizer, len(tokenizer), {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [4]}}
    )
    assert sequences == check_sequences(tokenizer, len(tokenizer), {"trainable_token_indices": [4, 9]})
    assert set().union(*sequences) == set(range(len(tokenizer))) and {4, 9} <= set(sequences[-1])
    assert all(1 < len(sequence) <= 128 for sequence in sequences)
    plain = tokenizer.__class__(tokenizer_object=tokenizer._tokenizer)  # without a chat template
    assert len(check_sequences(plain, len(tokenizer), {})) == 2
    waiting = check_sequences(tokenizer, len(tokenizer), {"alora_invocation_tokens": [5, 6, 7]})
    assert all([5, 6, 7] == one[len(one) // 2 - 1 :][:3] or "567" in "".join(map(str, one)) for one in waiting)


MODELS = {
    "llama": make_model,
    "experts": make_moe,
    "gpt2": lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4)),
    "gemma": lambda size: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=size, head_dim=8, initializer_range=0.2, **SIZES,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_16_bits_computed_in_32_are_those_of_the_wide_model(tokenizer, name):
    """The same as of the whole model in 32 bits, a module at a time; afterwards no weight is another one."""
    torch.manual_seed(0)
    model = MODELS[name](len(tokenizer)).bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12]]
    with in_32_bits(model):
        found = log_probs(model, ids)
    with in_32_bits(model, moved=[""]):
        moved = log_probs(model, ids)
    assert all(
        torch.equal(value, before[key]) and value.dtype == before[key].dtype
        for key, value in model.state_dict().items()
    )
    narrow = log_probs(model, ids)
    wide = log_probs(model.float(), ids)
    torch.testing.assert_close(found, wide, rtol=0, atol=1e-5)
    assert (narrow - wide).abs().mean() > 1e-4  # what is not measured: arithmetic in 16 bits
    assert 1e-5 < (moved - found).abs().mean() < 0.1


def test_a_folder_of_several_adapters_names_them(bases, tmp_path):
    model = get_peft_model(load(bases["tied"]), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="code")
    model.add_adapter("prose", LoraConfig(r=4, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(AMAError, match=r"name one of \['code', 'prose'\]"):
        merge_adapter(str(tmp_path / "adapters"), tmp_path / "merged", base_model=bases["tied"])
    merge_adapter(str(tmp_path / "adapters" / "code"), tmp_path / "merged", base_model=bases["tied"])


def test_a_weight_that_two_layers_share_is_not_missing(bases, tmp_path):
    """VB-LoRA's bank is saved once; one that is not saved at all is named."""
    make_adapter(load(bases["llama"]), OTHERS["VB-LoRA"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "vector_bank" not in name}, path)
    with pytest.raises(AMAError, match="vblora_vector_bank"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base_model=bases["llama"])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "VBLORA"
