"""The path for flash attention, which needs a GPU, with its two functions computed here as their documentation says. All of
transformers' code before them is the real one."""

import pytest
import torch
from fake_flash import fake_flash as fake_flash
from prefix_cases import (
    FAST,
    HEADS_OF_8,
    assert_same_gradients,
    build,
    exact_gradients,
    gradients,
    padded,
    random_pairs,
    sharing,
    weights_for,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_ama import AMAError
from trl_ama.fast_path.attention import PairAttention, is_flash, knows_attention
from trl_ama.fast_path.packing import pack_pairs


SOFTCAPPED = {**HEADS_OF_8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
MODELS = {
    **{name: FAST[name] for name in ("Llama", "Mistral", "Qwen2", "Gemma3Text", "DeepseekV3")},
    "Gemma2": SOFTCAPPED,
    "GptOss": {**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
}


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_those_of_other_attention(name, beginning, fake_flash):
    """Of the plain path with the same flash attention, and with the model's own default."""
    model = build(name, MODELS[name])
    call = padded(random_pairs(6, seed=0, beginning=beginning))
    weights = weights_for(call)
    default = model(**call)
    expected, exact = gradients(default, model, weights), exact_gradients(model, call, weights)
    assert model.config._attn_implementation in ("sdpa", "eager") and not fake_flash.varlen_calls
    model.config._attn_implementation = "flash_attention_2"
    plain = model(**call)
    assert torch.allclose(plain.log_probs, default.log_probs, atol=2e-5)  # or the fake is not what it should be
    assert fake_flash.varlen_calls[0][0] == call["attention_mask"].sum(dim=1).tolist()

    chooser = sharing(True)
    with torch.no_grad():
        chooser.forward(model)(**call)  # the trial
    del fake_flash.varlen_calls[:]
    shared = chooser.forward(model)(**call)
    pairs = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    assert pairs.common == beginning
    queries = [size for prefix, chosen, rejected in pairs.lengths for size in (prefix + chosen, rejected)]
    queries = [size for size in (beginning, *queries) if size]
    assert [sizes for sizes, _ in fake_flash.varlen_calls] == [queries] * 2  # one call a layer
    assert sum(queries) == pairs.input_ids.shape[1] < int(call["attention_mask"].sum())
    for other in (plain, default):
        assert torch.allclose(shared.log_probs, other.log_probs, atol=2e-5)
    assert_same_gradients(gradients(shared, model, weights), expected, exact)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, fake_flash):
    model = build("Mistral", MODELS["Mistral"]).train()
    model.config._attn_implementation = "flash_attention_2"
    call = padded(random_pairs(5, seed=1))
    weights = weights_for(call)
    expected = gradients(model(**call), model, weights)
    exact = exact_gradients(model, call, weights)
    chooser = sharing(True)
    with torch.no_grad():
        chooser.forward(model)(**call)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with torch.no_grad():
        chooser.forward(model)(**call)  # the proof, with what checkpointing has hung on the model
    del fake_flash.varlen_calls[:]
    assert_same_gradients(gradients(chooser.forward(model)(**call), model, weights), expected, exact)
    assert len(fake_flash.varlen_calls) == 4  # two layers, forward and again


def test_generation_and_other_calls_are_as_before(fake_flash):
    model = build("Llama", MODELS["Llama"]).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad():
        sharing(True).forward(model)(**padded(random_pairs(3, seed=2)))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_kernels_that_align_the_mask_at_the_start_are_refused(fake_flash, monkeypatch):
    """Flash attention before 2.1, and on some accelerators: the rejected branch would not see its prompt."""
    model = build("Llama", MODELS["Llama"])
    model.config._attn_implementation = "flash_attention_2"
    call = padded(random_pairs(3, seed=2))
    monkeypatch.setattr("trl_ama.fast_path.rules.flash_attn_supports_top_left_mask", lambda: True)
    assert sharing().pack(model, call) is None
    with pytest.raises(AMAError, match="aligns causal masks at the start"):
        sharing(True).pack(model, call)


def test_a_sequence_of_which_no_query_is_left_is_no_sequence():
    """A kernel may not be called with empty sequences: a rejected answer that is where the chosen one begins."""
    call = padded([([5, 6], [7, 8, 9], [7]), ([5], [6], [7]), ([5, 6], [7, 8], [9, 10])])
    pairs = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    plan = pairs.plan(torch.device("cpu"))
    assert pairs.lengths == [(3, 1, 0), (1, 0, 0), (2, 1, 1)]
    assert plan.cu_q.tolist() == [0, 4, 5, 8, 9]
    assert plan.cu_k.tolist() == [0, 4, 5, 8, 11]
    assert plan.gather.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 8]
    assert (plan.max_q, plan.max_k, plan.cu_k.diff().max()) == (128, 128, 4)  # bounds, the same ones for many batches
    assert isinstance(plan.max_q, int)  # a tensor would make the host wait in every layer


# ---- Kernels of the Hub ----


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", "org/fa3@v1.0:attention"])
def test_a_flash_attention_of_the_hub_is_taught_under_its_own_name(name, fake_flash, monkeypatch):
    """`flash_attention_2` without its package becomes such a name; transformers registers it as done here."""
    monkeypatch.setattr(
        type(ALL_ATTENTION_FUNCTIONS), "_global_mapping", dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    )
    monkeypatch.setattr(
        type(ALL_MASK_ATTENTION_FUNCTIONS), "_global_mapping", dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
    )
    ALL_ATTENTION_FUNCTIONS.register(name, flash_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model = build("Mistral", MODELS["Mistral"])
    call = padded(random_pairs(4, seed=1))
    expected = model(**call).log_probs
    model.config._attn_implementation = name
    shared = sharing(True).forward(model)(**call)
    assert torch.allclose(shared.log_probs, expected, atol=2e-5)
    assert isinstance(ALL_ATTENTION_FUNCTIONS[name], PairAttention)
    queries, keys = fake_flash.varlen_calls[-1]
    assert sum(keys) > sum(queries)  # gathered prefixes: the row went through


def test_names_of_attention(monkeypatch):
    monkeypatch.setattr(
        type(ALL_ATTENTION_FUNCTIONS), "_global_mapping", dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    )
    for name in ("flash_attention_2", "flash_attention_4", "kernels-community/flash-attn3", "org/my-flash@rev:fn"):
        assert is_flash(name) and knows_attention(name)
    for name in ("sdpa", "eager", "flex_attention", "org/sage", "paged|flash_attention_2", "flashy", None):
        assert not is_flash(name) and knows_attention(name) == (name == "sdpa")
    # A kernel that is called in its own way, whatever it is named
    ALL_ATTENTION_FUNCTIONS.register("org/flash-sparse", lambda *args, **kwargs: None)
    ALL_ATTENTION_FUNCTIONS.register("org/sage", flash_attention_forward)
    assert not knows_attention("org/flash-sparse") and is_flash("org/sage")
    model = build("Llama", MODELS["Llama"])
    model.config._attn_implementation = "org/flash-sparse"
    with pytest.raises(
        AMAError, match="attn_implementation='org/flash-sparse' is not one of .*, nor a flash attention of the Hub"
    ):
        sharing(True).pack(model, padded(random_pairs(2, seed=0)))
