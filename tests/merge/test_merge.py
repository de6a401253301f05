"""`trl ama-merge`: an adapter becomes the checkpoint that it is, or is refused; a folder is written whole or not."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import LINEAR, edit, files_of, save_adapter
from saved_adapters import merge_refused as refused
from tiny_models import make_model, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from trl_ama import cli
from trl_ama.common.files import write_json
from trl_ama.merge import weights as merged_weights
from trl_ama.merge.merge import merge_adapter, training_from


@pytest.fixture
def adapter(model_dir, tmp_path):
    return save_adapter(tmp_path / "adapter", model_dir)


def log_probs(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits.float().log_softmax(-1)


def only(folder, *names):
    """Nothing was left beside these."""
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(names)


# ---- The sums ----


def test_what_is_added_is_rounded_once(tokenizer, tmp_path):
    """In 16 bits, a sum of what an adapter learned in small steps would lose more than the last rounding takes."""
    base = tmp_path / "base"
    save(make_model(len(tokenizer)).to(torch.bfloat16), tokenizer, base)
    folder = save_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16)
    weights = load_file(Path(folder, "adapter_model.safetensors"))
    for dtype in (torch.bfloat16, torch.float32):
        output = tmp_path / str(dtype)
        merge_adapter(folder, output, save_dtype="auto" if dtype == torch.bfloat16 else "float32")
        found, plain = load_file(output / "model.safetensors"), load_file(base / "model.safetensors")
        for name in (key for key in plain if "proj" in key):
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            a, b = weights[f"{prefix}A.weight"].float(), weights[f"{prefix}B.weight"].float()
            exact = plain[name].float() + 8 / 4 * b @ a
            assert found[name].dtype == dtype
            # But for sums that lie between two numbers of 16 bits, as near as makes no difference
            assert (found[name] == exact.to(dtype)).float().mean() > 0.999 or dtype == torch.float32
            assert (found[name].float() - exact).abs().max() < (1e-6 if dtype == torch.float32 else 0.01)


# ---- What a checkpoint consists of ----


def test_tokenizer_template_generation_config_and_card(model_dir, tmp_path, tokenizer, adapter):
    """The adapter's own tokenizer counts, as it was trained with it."""
    own = AutoTokenizer.from_pretrained(model_dir)
    own.chat_template = "{{ messages[0]['content'] }} <trained>"
    own.save_pretrained(adapter)
    output = tmp_path / "deep" / "name | of `mine` <b>"
    merge_adapter(adapter, output)
    assert AutoTokenizer.from_pretrained(output).chat_template == own.chat_template
    assert json.loads((output / "generation_config.json").read_text())["pad_token_id"] == own.pad_token_id
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert "<b>" not in card.text and str(tmp_path) not in card.content and model_dir not in card.content
    assert "nats a token" in card.text
    assert oct((output / "model.safetensors").stat().st_mode & 0o777) == "0o644"
    only(output.parent, output.name)


def test_an_adapter_of_the_hub_and_its_base(hub, model_dir, tmp_path):
    api = HfApi()
    for name, folder in (("org/base", model_dir), ("org/adapter", save_adapter(tmp_path / "a", model_dir))):
        api.create_repo(name)
        if name == "org/adapter":
            edit(folder, base_model_name_or_path="org/base", revision=None)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns="README.md")  # PEFT's names a local base
    commit = api.model_info("org/adapter").sha
    note = merge_adapter("org/adapter@main", tmp_path / "merged")
    assert note["adapter_commit"] == commit
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == "org/base" and card.data.base_model_relation == "finetune"
    assert f"org/adapter/tree/{commit}" in card.text
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = log_probs(PeftModel.from_pretrained(plain, tmp_path / "a"))
    found = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_command_says_what_it_did(adapter, tmp_path, capsys):
    assert cli.main(["ama-merge", "--adapter", adapter, "--output", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert f"Merged:     {adapter} (trained on a base: not quantised)" in printed
    assert "Into:       the base as it is saved" in printed and "nats a token" in printed
    assert f"Checkpoint: {tmp_path / 'merged'}" in printed and "in float32" in printed


# ---- Refused ----


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--output is missing"),
        (["--output", "x"], "nothing to merge. Name a recipe"),
        (["--output", "x", "--adapter", "y", "--into", "4bit"], "into is '4bit'"),
        (["--output", "x", "--adapter", "y", "--save_dtype", "int8"], "save_dtype is 'int8'"),
        (["--output", "x", "--adapter", "y"], "('y')"),
        (["--output", "x", "--model_name_or_path", "m", "--output_dir", "nowhere"], "There is no generalist 'ama_s'"),
    ],
)
def test_errors_of_the_command_are_one_line(argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(["ama-merge", *argv])
    assert raised.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trl ama-merge: error: ") and text in line
    only(tmp_path)


def test_what_is_no_adapter_or_does_not_fit(model_dir, tokenizer, tmp_path, adapter):
    output = tmp_path / "merged"
    refused(model_dir, output, "no adapter_config.json.*A full model can be used as it is")
    refused(adapter, output, "is an adapter of", base_model=str(make_base(tmp_path / "other", tokenizer, seed=3)))
    wide = make_base(tmp_path / "wide", tokenizer, hidden_size=48)
    edit(adapter, base_model_name_or_path=str(wide))
    refused(adapter, output, "does not fit the base model.*another shape")
    edit(adapter, base_model_name_or_path=None)
    refused(adapter, output, "does not name its base model.*--model_name_or_path")
    edit(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    refused(adapter, output, "cannot be read.*--model_name_or_path")
    assert not output.exists()


def make_base(folder, tokenizer, seed=0, **config):
    save(make_model(len(tokenizer), seed=seed, **config), tokenizer, folder)
    return folder


def test_prompt_learning_and_replicated_layers(model_dir, tmp_path, adapter):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), prompts).save_pretrained(tmp_path / "prompts")
    refused(tmp_path / "prompts", tmp_path / "merged", "PROMPT_TUNING.*puts tokens of its own")
    edit(adapter, layer_replication=[[0, 1], [0, 2]])
    refused(adapter, tmp_path / "merged", "layer_replication")


def test_resized_embeddings_are_named(model_dir, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer) + 3)
    get_peft_model(model, LoraConfig(r=4, **LINEAR)).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    text = refused(tmp_path / "adapter", tmp_path / "merged", "they were resized.*resize_token_embeddings")
    assert f"{len(tokenizer) + 3} tokens" in text and f"has {len(tokenizer)}" in text
    # With a base of that size, it is merged
    (tmp_path / "resized").mkdir()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer) + 3)
    model.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "resized"))
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.get_input_embeddings().weight.shape[0] == len(tokenizer) + 3


def test_a_quantised_checkpoint_is_no_base(model_dir, tokenizer, tmp_path, adapter):
    base = make_base(tmp_path / "base", tokenizer)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    edit(adapter, base_model_name_or_path=str(base))
    refused(adapter, tmp_path / "merged", "is a quantised checkpoint.*--load_in_4bit")
    refused(save_adapter(tmp_path / "b", model_dir), tmp_path / "merged", "no quantised base", into="dequantized")


def test_a_generalist_that_is_not_finished(adapter, tmp_path):
    write_json(Path(adapter, "stage.json"), {"fingerprint": {"load_in_4bit": False}, "result": None})
    refused(adapter, tmp_path / "merged", "not trained to its end")


@pytest.mark.parametrize(
    ("noted", "text"),
    [
        ({"load_in_4bit": True, "dtype": "save"}, "dtype is 'save'|module 'torch'|do not go together"),
        ({"load_in_4bit": True, "dtype": "float32", "bnb_4bit_quant_type": "<b>"}, "must be nf4 or fp4"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "do not go together"),
        ({"load_in_4bit": [1], "dtype": {"a": 1}}, "do not go together"),
    ],
)
def test_a_note_that_says_nonsense(adapter, tmp_path, noted, text):
    write_json(Path(adapter, "stage.json"), {"fingerprint": noted, "result": {}})
    refused(adapter, tmp_path / "merged", text)


def test_an_adapter_of_8_bits(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(tmp_path / "base", tokenizer, hidden_size=64)
    adapter = save_adapter(tmp_path / "adapter", base)
    training = training_from({"load_in_8bit": True, "dtype": "float32"})
    note = merge_adapter(adapter, tmp_path / "merged", training=training)
    assert note["into"] == "dequantized" and note["trained_on"] == "8 bits" and note["mean_difference"] < 0.1
    merge_adapter(adapter, tmp_path / "plain")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    rounded = (merged["model.layers.0.mlp.up_proj.weight"] - plain["model.layers.0.mlp.up_proj.weight"]).abs()
    assert 0 < rounded.max() < 0.01 and torch.equal(merged["model.norm.weight"], plain["model.norm.weight"])


def test_weights_of_gpt_2_lie_the_other_way_round(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    training = training_from({"load_in_4bit": True, "dtype": "float32"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = {name: value.clone() for name, value in model.named_parameters()}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=training.quantization)
    merged_weights._copy_weights(quantized, model)
    for name, value in model.named_parameters():
        rounded = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert torch.equal(value, plain[name]) != rounded
        assert (value - plain[name]).abs().max() <= 0.16 * plain[name].abs().max()  # half of NF4's widest step


def test_a_merge_that_is_another_model_is_not_saved(adapter, tmp_path, monkeypatch):
    def wrong(wrapped, place):
        model = wrapped.unload()
        model.model.norm.weight.data.mul_(-1)
        return model

    monkeypatch.setattr(merged_weights, "_merge_layers", wrong)
    refused(adapter, tmp_path / "merged", "gives other log-probs than on its base, by .* nats a token")
    only(tmp_path, "adapter")
    monkeypatch.undo()
    change = load_file(Path(adapter, "adapter_model.safetensors"))
    save_file(
        {name: value * float("nan") for name, value in change.items()}, Path(adapter, "adapter_model.safetensors")
    )
    refused(adapter, tmp_path / "merged", "cannot merge.*NaNs")
    only(tmp_path, "adapter")


# ---- The folder ----


def test_a_folder_is_replaced_only_if_it_is_a_merge_and_on_request(adapter, model_dir, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        refused(adapter, output, "is not empty, and was not made by a merge", overwrite=overwrite)
    assert files_of(output) == {"thesis.tex": b"years"}
    (output / "thesis.tex").rename(tmp_path / "thesis.tex")
    merge_adapter(adapter, output)  # empty
    first = files_of(output)
    refused(adapter, output, "holds a merged model already. Pass --overwrite")
    merge_adapter(adapter, output, save_dtype="bfloat16", overwrite=True)
    assert files_of(output)["model.safetensors"] != first["model.safetensors"]
    for inside in (adapter, f"{adapter}/merged", model_dir):
        refused(adapter, inside, "which is read here", overwrite=True)
    refused(adapter, tmp_path / "thesis.tex", "is a file")
    only(tmp_path, "adapter", "merged", "thesis.tex")


@pytest.mark.parametrize("overwrite", [False, True])
def test_written_whole_or_not_at_all(adapter, tmp_path, monkeypatch, overwrite):
    output = tmp_path / "merged"
    if overwrite:
        merge_adapter(adapter, output)
    before = files_of(output) if overwrite else None
    save = PreTrainedModel.save_pretrained

    def full(model, folder, **kwargs):
        save(model, folder, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    refused(adapter, output, "cannot be written.*No space left on device", overwrite=overwrite)
    if overwrite:
        assert files_of(output) == before
    only(tmp_path, "adapter", *(["merged"] if overwrite else []))
    monkeypatch.undo()
    monkeypatch.setattr(os, "rename", rename_fails(os.rename, output))
    refused(adapter, output, "cannot be written", overwrite=overwrite)
    if overwrite:
        assert files_of(output) == before
    only(tmp_path, "adapter", *(["merged"] if overwrite else []))


def rename_fails(rename, output):
    """Once, when the new folder is put in its place."""
    failed = []

    def once(source, target):
        if Path(target) == output and not failed:
            failed.append(source)
            raise OSError(5, "Input/output error")
        rename(source, target)

    return once
