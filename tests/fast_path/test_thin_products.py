"""LoRA that is added by the matrix product itself: PEFT's numbers and gradients, on plain layers alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prefix_cases import TINY, build, padded, random_pairs

from trl_ama.fast_path import thin_products as adapters
from trl_ama.fast_path.forward import packed_forward
from trl_ama.fast_path.packing import pack_pairs
from trl_ama.fast_path.thin_products import thin_products


@pytest.fixture
def calls(monkeypatch):
    found, forward = [], adapters._Added.forward
    monkeypatch.setattr(
        adapters._Added, "forward", staticmethod(lambda *args, **kwargs: found.append(1) or forward(*args, **kwargs))
    )
    return found


@pytest.fixture
def batch():
    call = padded(random_pairs(3, 0))
    return pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


def adapted(dtype=torch.float32, **settings):
    model = build("Llama", TINY).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def numbers(model, batch, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_probs = packed_forward(model, batch, use_cache=False).log_probs
    log_probs.sum().backward()
    return [log_probs.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def distance(values, reference):
    return sum((a.float() - b).norm() ** 2 / b.norm() ** 2 for a, b in zip(values, reference, strict=True)) ** 0.5


def test_numbers_and_gradients_of_peft(calls, batch, monkeypatch):
    model = adapted(torch.bfloat16)  # adapters of 32 bits
    ours_16 = numbers(model, batch, autocast=True)
    ours = numbers(model.float(), batch)
    assert len(calls) == 28  # two passes through 2 layers with 7 adapters each
    monkeypatch.setattr(adapters, "_adapters", lambda module: [])
    theirs = numbers(model, batch)
    theirs_16 = numbers(adapted(torch.bfloat16), batch, autocast=True)
    assert len(calls) == 28
    assert distance(ours, theirs) < 1e-5
    assert distance(ours_16, theirs) <= 1.2 * distance(theirs_16, theirs)


def test_layers_are_left_as_they_were(calls):
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(ZeroDivisionError), thin_products(model), torch.autocast("cpu", torch.bfloat16):
        assert layer.lora_variant
        1 / 0  # noqa: B018
    assert not layer.lora_variant and layer.cast_input_dtype_enabled


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_stay_with_peft(calls, batch, settings):
    numbers(adapted(**settings), batch)
    assert not calls


def test_hooks_and_gradient_checkpointing_see_what_they_always_saw(calls, batch):
    model = adapted()
    seen = []
    for layer in model.base_model.model.model.layers:
        layer.mlp.up_proj.lora_B["default"].register_forward_hook(lambda *_: seen.append(1))
    numbers(model, batch)
    assert len(seen) == 2 and len(calls) == 12
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    numbers(model, batch)
    assert len(calls) == 12
