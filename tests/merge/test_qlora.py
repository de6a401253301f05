"""A QLoRA generalist merged: a whole checkpoint, and what each way of merging loses."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from qlora_runs import LAYERS, NF4, base_fixture, finished_fixture, recipe_fixture  # noqa: F401 - fixtures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_ama import cli
from trl_ama.merge.merge import merge_adapter
from trl_ama.policies.quantized import dequantized_weight, keep_weights, quantized_layers


def log_probs(model):
    ids = torch.arange(3, 26)[None]
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def merged(finished, recipe, tmp_path_factory):
    """The generalist merged by the command, into what it was trained on and into the base as it is saved."""
    settings, _, _ = finished
    folders = {}
    for into in ("dequantized", "base"):
        folders[into] = tmp_path_factory.mktemp("merged") / into
        argv = ["--config", recipe.config, "--output_dir", str(settings.folder.path), "--output", str(folders[into])]
        assert cli.main(["ama-merge", *argv, *(() if into == "dequantized" else ("--into", into))]) == 0
    return folders


def test_a_merge_is_a_whole_checkpoint(merged, base):
    folder = merged["dequantized"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md",
        "ama_merge.json",
    }  # fmt: skip
    assert not [name for name in names if "adapter" in name or name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and not list(quantized_layers(model))  # the base checkpoint's
    card = (folder / "README.md").read_text()
    assert "NF4 with double quantisation" in card and "the dequantised base" in card and base not in card
    assert "the base as it is saved" in (merged["base"] / "README.md").read_text()
    assert "not exactly the model that was trained" in (merged["base"] / "README.md").read_text()


def test_the_dequantised_merge_holds_the_weights_of_the_training(finished, merged, base):
    settings, _, _ = finished
    quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.bfloat16)
    adapter = load_file(settings.folder.generalist("ama_s") / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged["dequantized"])
    layers = dict(quantized_layers(quantized))
    assert len(layers) == LAYERS
    for name, layer in layers.items():
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        expected = dequantized_weight(layer).float() + 8 / 4 * b @ a
        torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    for name, value in quantized.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(model.get_parameter(name), value.float())


def test_what_each_merge_loses(finished, merged, base, tmp_path):
    """The dequantised merge is the trained model; the 16-bit base is another one; 4 bits round the adapter away."""
    settings, _, _ = finished
    folder = settings.folder.generalist("ama_s")
    trained = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.bfloat16)
    keep_weights(trained)
    expected = log_probs(trained)
    with trained.disable_adapter():
        effect = (log_probs(trained) - expected).abs().mean()
    distance = {}
    for into, path in merged.items():
        distance[into] = (log_probs(AutoModelForCausalLM.from_pretrained(path)) - expected).abs().mean()
    four = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="rounding errors"):
        four = four.merge_and_unload()
    distance["4 bits"] = (log_probs(four) - expected).abs().mean()
    merge_adapter(str(folder), tmp_path / "half", save_dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    distance["dequantised, bf16"] = (log_probs(half) - expected).abs().mean()
    print({"adapter's effect": float(effect), **{name: float(value) for name, value in distance.items()}})
    assert distance["dequantized"] < 0.25 * min(distance["base"], distance["4 bits"])
    assert distance["dequantised, bf16"] < 0.5 * min(distance["base"], distance["4 bits"])
