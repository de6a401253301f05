"""Quantised layers and 8-bit optimizers on a CPU, and settings that are refused before anything is trained."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qlora_runs import NF4, base_fixture, gradient, recipe_fixture  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAError, run_pipeline
from trl_ama.pipeline.start import check_recipe
from trl_ama.policies.quantized import check_optimizer, dequantized_weight, keep_weights, quantized_layers
from trl_ama.recipe.settings import RunSettings


pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import has_avx512bf16  # noqa: E402


def adapted(base):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear")
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.bfloat16), config
    )


@pytest.mark.parametrize("kept", [True, False])
def test_evaluation_leaves_the_weights_as_they_were_trained(base, kept):
    """Without us bitsandbytes packs them, and no gradient passes any more; this fails when it has mended that."""
    if not kept and not has_avx512bf16():
        pytest.skip("bitsandbytes packs only where the CPU knows AVX512-BF16")
    model = adapted(base)
    if kept:
        keep_weights(model)
    before = gradient(model)
    weights = [dequantized_weight(layer).clone() for _, layer in quantized_layers(model)]
    model.eval()
    with torch.no_grad():
        model(torch.arange(5, 25)[None])
    after = gradient(model)
    same = [
        torch.equal(dequantized_weight(layer), one)
        for (_, layer), one in zip(quantized_layers(model), weights, strict=True)
    ]
    if kept:
        assert torch.equal(before, after) and all(same)
        return
    assert after.norm() < 0.5 * before.norm() and not any(same)
    with pytest.raises(AMAError, match="packed its weights.*Load it again"):
        keep_weights(model)


@pytest.fixture
def nothing_trained(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--use_peft", "false"], "load_in_4bit is set without use_peft.*use_peft: true"),
        (["--dtype", "auto"], "quantisation do not go together.*set dtype to bfloat16"),
        (["--load_in_8bit", "true"], "both load in 8 bit and 4 bit|go together|8 ?bit"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, nothing_trained, flags, text):
    with pytest.raises((AMAError, ValueError), match=text) as caught:
        run_pipeline(*recipe(tmp_path, *flags))
    assert "\n" not in str(caught.value).strip()


def test_bitsandbytes_is_missing(recipe, tmp_path, monkeypatch, nothing_trained):
    arguments = recipe(tmp_path)
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(AMAError, match=r"load_in_4bit needs bitsandbytes.*trl-ama\[quantization\]"):
        run_pipeline(*arguments)
    arguments = recipe(tmp_path, "--load_in_4bit", "false")
    with pytest.raises(AMAError, match="optim is 'paged_adamw_8bit', which needs bitsandbytes.*adamw_torch"):
        run_pipeline(*arguments)


def test_a_specialists_own_optimizer_is_tried_too(recipe, tmp_path, monkeypatch, nothing_trained):
    arguments = recipe(
        tmp_path, "--optim", "adamw_torch", "--load_in_4bit", "false", "--specialist_args", "{optim: lion_8bit}"
    )
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(AMAError, match="optim is 'lion_8bit'"):
        run_pipeline(*arguments)


def test_an_optimizer_that_does_not_run_here(recipe, tmp_path, monkeypatch, nothing_trained):
    import bitsandbytes

    def step(*args, **kwargs):
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", step)
    with pytest.raises(
        AMAError, match=r"'paged_adamw_8bit', which does not run on this machine's cpu \(NotImp.*no kernel\)"
    ):
        check_recipe(RunSettings(*recipe(tmp_path)))


OPTIMIZERS = [
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_8bit",
    "paged_lion_8bit",
    "ademamix_8bit",
    "rmsprop_bnb_8bit",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_bitsandbytes_run_on_a_cpu_and_a_warning_says_what_for(tmp_path, monkeypatch, name):
    said = []
    monkeypatch.setattr("trl_ama.policies.quantized.logger.warning", said.append)
    check_optimizer(DPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim=name))
    assert len(said) == 1 and name in said[0] and "adamw_torch" in said[0]


def test_other_optimizers_are_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ama.policies.quantized.Trainer", None)
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd"):
        check_optimizer(DPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim=name))
