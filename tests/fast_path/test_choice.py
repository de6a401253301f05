"""Which models take the fast path: those have the same numbers and gradients there, with and without gradient checkpointing;
the others say why not. `tests/benchmarks/fast_architectures.py` goes through all of transformers' causal language models."""

import copy
import logging

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from prefix_cases import (
    FAST,
    HEADS_OF_8,
    OUTPUTS,
    TINY,
    VOCABULARY,
    assert_same_gradients,
    build,
    exact_gradients,
    gradients,
    padded,
    random_pairs,
    sharing,
    weights_for,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from trl_ama import AMAError
from trl_ama.fast_path.attention import PairAttention
from trl_ama.fast_path.trial import _check_masks


ROPE = {"rope_theta": 10000.0}
PLAIN = {
    "Gemma2": ({**HEADS_OF_8, "sliding_window": 6, "query_pre_attn_scalar": 8}, "attn_implementation='eager'"),
    "GptOss": (
        {**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        "attn_implementation='eager'",
    ),
    "Mamba": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "attn_implementation",
    ),
    "Lfm2": ({**TINY, "layer_types": ["conv", "full_attention"]}, "layers of type \\['conv'\\]"),
    "Llama4Text": (
        {
            **HEADS_OF_8,
            "attention_chunk_size": 6,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
        },
        "layers of type \\['chunked_attention'\\]",
    ),
    "Falcon": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "0 of its 2 layers",
    ),
}


@pytest.fixture(scope="module")
def models():
    """Each model is built once; a test that changes it takes a copy."""
    built = {}
    return lambda name: built.setdefault(name, build(name, FAST[name]))


# ---- The same numbers ----


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("name", FAST)
def test_outputs_and_gradients_equal_those_of_the_plain_path(name, beginning, models):
    model, chooser = models(name), sharing()
    call = padded(random_pairs(8, seed=0, beginning=beginning))
    shared, plain = chooser.forward(model)(**call), model(**call)
    assert chooser.taken == {"fast": 1, "plain": 0}
    answers = call["labels"][:, 1:] != -100
    for field in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert torch.allclose(shared[field], plain[field], atol=2e-5, rtol=1e-5), field
        assert (shared[field][~answers] == 0).all()
    assert torch.equal(shared.is_top1, plain.is_top1)
    weights = weights_for(call)
    assert_same_gradients(
        gradients(shared, model, weights), gradients(plain, model, weights), exact_gradients(model, call, weights)
    )


class Counter:
    """Counts what the attention layers compute in packed rows."""

    def __init__(self, monkeypatch):
        self.calls = 0
        packed = PairAttention.packed

        def counted(attention, *args, **kwargs):
            self.calls += 1
            return packed(attention, *args, **kwargs)

        monkeypatch.setattr(PairAttention, "packed", counted)


def adapted(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """A copy of a model with a random adapter, or for full fine-tuning."""
    model = copy.deepcopy(model)
    add_head_again(model)
    if kind == "full":
        return model
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        use_dora=kind == "dora",
        modules_to_save=["lm_head", "embed_tokens"] if kind == "modules_to_save" else None,
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, and then half of the gradients are
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def add_head_again(model: torch.nn.Module) -> None:
    """The fused head's forward is bound to the model that was copied."""
    model.__dict__.pop("forward", None)
    add_fused_lm_head(model, outputs=OUTPUTS)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "full") for name in FAST),
        ("Llama", "lora"),
        ("Llama", "dora"),
        ("Llama", "modules_to_save"),
        ("Qwen3", "dora"),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(name, kind, reentrant, models, monkeypatch):
    model, chooser = adapted(models(name), kind).train(), sharing()
    call = padded(random_pairs(4, seed=3))
    weights = weights_for(call)
    theirs = gradients(model(**call), model, weights)  # plain, and nothing is checkpointed
    exact = exact_gradients(model, call, weights)
    with torch.no_grad():
        chooser.forward(model)(**call)  # the trial
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with torch.no_grad():
        chooser.forward(model)(**call)  # the proof, with what checkpointing has hung on the model
    counter = Counter(monkeypatch)
    outputs = chooser.forward(model)(**call)
    forward = counter.calls
    ours = gradients(outputs, model, weights)
    assert forward == 2 and counter.calls == 4  # both layers were computed again, from the packed row
    assert chooser.taken == {"fast": 3, "plain": 0}
    assert_same_gradients(ours, theirs, exact)


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_adapters_have_the_gradients_of_the_plain_path(kind, models):
    model, chooser = adapted(models("Llama"), kind).train(), sharing()
    call = padded(random_pairs(8, seed=4))
    weights = weights_for(call)
    ours = gradients(chooser.forward(model)(**call), model, weights)
    assert chooser.taken == {"fast": 1, "plain": 0}
    assert all("lora_" in name or "modules_to_save" in name for name in ours)
    assert any("lm_head.modules_to_save" in name for name in ours) == (kind == "modules_to_save")
    assert_same_gradients(ours, gradients(model(**call), model, weights), exact_gradients(model, call, weights))


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPT2"])
def test_bf16_is_no_further_from_f32_than_the_plain_path(name, models):
    model = copy.deepcopy(models(name))
    add_head_again(model)
    calls = [padded(random_pairs(8, seed=seed, answers=(6, 20))) for seed in range(12)]

    def totals(path):
        with torch.no_grad():
            return torch.cat([path(**call).log_probs.float().sum(dim=1) for call in calls])

    exact = totals(model)
    model.bfloat16()
    chooser = sharing()
    shared, plain = totals(chooser.forward(model)), totals(model)
    assert chooser.taken == {"fast": 12, "plain": 0}
    ours, theirs = (shared - exact).abs(), (plain - exact).abs()
    assert 0 < ours.mean() < 1.1 * theirs.mean()
    assert ours.quantile(0.95) < 1.2 * theirs.quantile(0.95)


def test_a_quantised_model_under_an_adapter(tmp_path, models):
    pytest.importorskip("bitsandbytes")
    models("Llama").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    try:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(f"bitsandbytes does not quantise on this machine: {error}")
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    model, chooser = adapted(base, "lora").train(), sharing()
    call = padded(random_pairs(8, seed=6))
    weights = weights_for(call)
    ours = gradients(chooser.forward(model)(**call), model, weights)
    assert chooser.taken == {"fast": 1, "plain": 0}
    assert_same_gradients(ours, gradients(model(**call), model, weights), exact_gradients(model, call, weights))


# ---- Where it is not taken ----


@pytest.mark.parametrize("name", PLAIN)
def test_other_architectures_take_the_plain_path_and_say_why(name, caplog):
    settings, reason = PLAIN[name]
    model, chooser = build(name, settings), sharing()
    call = padded(random_pairs(4, seed=0))
    if name == "Llama4Text":  # TRL's fused head does not know its outputs, so only the decision can be asked for
        assert chooser.pack(model, call) is None
        with pytest.raises(AMAError, match=reason):
            sharing(True).pack(model, call)
        return
    with caplog.at_level(logging.WARNING), torch.no_grad():
        shared = chooser.forward(model)(**call)
        chooser.forward(model)(**call)
        assert torch.equal(shared.log_probs, model(**call).log_probs)
    assert chooser.taken == {"fast": 0, "plain": 2}
    assert len([record for record in caplog.records if "Prefix sharing is off" in record.message]) == 1
    with pytest.raises(AMAError, match=f"prefix_sharing=True, but .*{reason}.*'auto'"):
        sharing(True).forward(model)(**call)


def test_a_trial_finds_what_no_rule_knows():
    """A layer that mixes neighbours, as a convolution does, hidden in an ordinary Llama."""
    model = build("Llama", TINY)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    with pytest.raises(AMAError, match="moved by up to .* with the tokens of another"):
        sharing(True).forward(model)(**padded(random_pairs(2, seed=0, prompts=(4, 9), answers=(4, 9))))


@pytest.mark.parametrize("hidden", ["", "a small leak", "positions of its own"])
def test_a_trial_in_16_bits_is_as_sharp(hidden):
    model = build("Llama", {**TINY, "initializer_range": 0.3}).bfloat16()
    call = padded(random_pairs(2, seed=0, prompts=(4, 9), answers=(4, 9)))

    def count_on(module, args, kwargs):
        return args, {**kwargs, "position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]}

    if hidden == "a small leak":
        model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output + 0.02 * output.roll(1, dims=1))
    elif hidden:
        model.model.rotary_emb.register_forward_pre_hook(count_on, with_kwargs=True)
    if not hidden:
        assert sharing(True).pack(model, call) is not None
        return
    reason = "with the tokens of another" if hidden == "a small leak" else "with the length of chosen ones"
    with pytest.raises(AMAError, match=f"moved by up to .* {reason}"):
        sharing(True).pack(model, call)


def test_a_convolution_is_seen_whatever_it_does():
    """It may do too little for a trial in 16 bits to tell it from rounding."""
    model = build("Llama", TINY)
    model.model.layers[0].mixer = torch.nn.Conv1d(32, 32, 4)
    with pytest.raises(AMAError, match="it has convolutions"):
        sharing(True).pack(model.bfloat16(), padded(random_pairs(2, seed=0)))


SHORT = [([5, 6], [7, 8, 9], [10, 11])]
LONG = [([5, 6] * 9, [7, 8, 9] * 3, [10, 11] * 4)]  # 27 tokens


# The first pairs of a run may be too short to show it
@pytest.mark.parametrize(
    ("name", "settings", "limit", "reason"),
    [
        ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 6,
                      "moe_intermediate_size": 32}, 6, "sees other tokens than causal attention"),
        ("Llama", {"max_position_embeddings": 20, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
         19, "rotary embedding \\('dynamic'\\)"),
        ("Llama", {"max_position_embeddings": 80, "rope_parameters": {
            **ROPE, "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 20}},
         19, "rotary embedding \\('longrope'\\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_length", [64, None])
def test_long_sequences_take_the_plain_path_where_short_ones_need_not(
    name, settings, limit, reason, max_length, caplog
):
    model, chooser = build(name, {**TINY, **settings}), sharing(max_length=max_length)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for number, call in enumerate([SHORT, LONG, [(p, c[:8], r) for p, c, r in LONG], SHORT]):
            call = padded(call)
            ours = chooser.forward(model)(**call).log_probs
            assert torch.allclose(ours, model(**call).log_probs, rtol=1e-5, atol=1e-5), number
    assert chooser.taken == {"fast": 2, "plain": 2}
    said = [record.message for record in caplog.records if "Prefix sharing is off" in record.message]
    assert len(said) == 1 and f"sequences of more than {limit} tokens" in said[0]  # once, and not for each length
    with pytest.raises(AMAError, match=reason):
        sharing(True, max_length=max_length).forward(model)(**padded(LONG))


@pytest.mark.parametrize("max_length", [1024, None])
def test_a_trial_stays_within_learned_positions(max_length):
    """GPT-2 has a table of 64; on a GPU, an index beyond it would end the process."""
    model, chooser = build("GPT2", FAST["GPT2"]), sharing(max_length=max_length)
    with torch.no_grad():
        chooser.forward(model)(**padded([([5] * 20, [7] * 20, [8] * 20)]))
        chooser.forward(model)(**padded([([5] * 44, [7] * 20, [8] * 20)]))
    assert chooser.taken == {"fast": 2, "plain": 0}


def test_a_sequence_at_the_limit_is_shared_and_one_token_more_is_not():
    settings = {"max_position_embeddings": 20, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}
    model, chooser = build("Llama", {**TINY, **settings}), sharing()
    for extra in (0, 1):
        call = padded([([5] * 10, [7] * 9 + [8] * extra, [6, 7])])  # 19 and 20 tokens
        with torch.no_grad():
            assert torch.allclose(chooser.forward(model)(**call).log_probs, model(**call).log_probs, atol=1e-5)
        assert chooser.taken == {"fast": 1, "plain": extra}


def test_without_max_length_the_trial_goes_further_when_it_must(models):
    model, chooser = models("Llama"), sharing(max_length=None)
    tried = []
    for size in (4, 6, 12, 40):
        with torch.no_grad():
            chooser.forward(model)(**padded([([5] * size, [7] * size, [8] * size)]))
        tried.append(chooser._trials[model].length)
    # Twice what was asked for, and again only when a sequence is longer; not beyond the positions that there are
    assert tried == [16, 16, 48, 128]
    assert chooser.taken == {"fast": 4, "plain": 0}


def test_a_sharded_model_is_tried_once(models, caplog):
    """Another process may have shorter sequences, and would not join in."""
    model, chooser = models("Llama"), sharing(max_length=None)
    chooser._trainer.accelerator.distributed_type = "DistributedType.FSDP"
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for size in (4, 12, 4):
            chooser.forward(model)(**padded([([5] * size, [7] * size, [8] * size)]))
    assert chooser.taken == {"fast": 2, "plain": 1}
    assert "sequences of more than 16 tokens, it was not tried" in caplog.text


def test_16_bits_do_not_hide_a_window_that_attention_is_not_told():
    """What a token sees is compared as masks: log-probs would agree to their rounding."""
    real = torch.ones(2, 8, dtype=torch.bool)
    columns = torch.arange(8)
    distance = columns[:, None] - columns
    causal = (distance >= 0)[None, None].expand(2, 1, 8, 8)
    window = causal & (distance < 6)
    additive = torch.zeros(2, 1, 8, 8).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask, told in ((None, None), (causal, None), (window, 6), (additive, None), (causal, 8)):
        _check_masks([("Attention", mask, told)], real)
    for mask, told in (
        (window, None),
        (causal, 6),
        (None, 6),
        (torch.ones_like(causal), None),
        (additive + distance, None),
    ):
        with pytest.raises(ValueError, match="Attention"):
            _check_masks([("Attention", None, None), ("Attention", mask, told)], real)
    real[1, 4:] = False  # what padding sees is nobody's business
    _check_masks([("Attention", causal & real[:, None, None, :], None)], real)


def test_dropout_outside_of_dropout_modules_is_seen():
    """OPT's dropout is a number, which TRL's `disable_dropout` does not reach."""
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "dropout": 0.1,
                "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}  # fmt: skip
    model, chooser = build("OPT", settings), sharing()
    call = padded(random_pairs(2, seed=0))
    assert chooser.pack(model.eval(), call) is not None
    assert chooser.pack(model.train(), call) is None
    assert any("dropout is on" in reason for reason in chooser._said)
    assert sharing().pack(build("OPT", {**settings, "dropout": 0.0}).train(), call) is not None


# ---- Nothing is left behind ----


def test_two_models_in_one_process_and_a_failing_one_between(models):
    failing = build("Llama", TINY)
    handle = failing.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    failing_in_trial = build("Llama", TINY)
    failing_in_trial.model.layers[1].mlp.register_forward_hook(lambda *_: torch.ones(3, 5))
    call = padded(random_pairs(4, seed=8))
    chooser = sharing()
    with torch.no_grad():
        for name in ("Llama", "Mistral"):
            model = models(name)
            expected = model(**call).log_probs
            with pytest.raises(ZeroDivisionError):
                chooser.forward(failing)(**call)
            assert chooser.pack(failing_in_trial, call) is None
            assert torch.allclose(chooser.forward(model)(**call).log_probs, expected, atol=1e-5)
            assert torch.equal(model(**call).log_probs, expected)
    assert any("a trial failed (RuntimeError" in reason for reason in chooser._said)
    for model in (failing, failing_in_trial, models("Llama"), models("Mistral")):
        assert not model.model._forward_hooks
        assert model.config._attn_implementation == "sdpa"
    assert isinstance(ALL_ATTENTION_FUNCTIONS["sdpa"], PairAttention)
    assert not isinstance(ALL_ATTENTION_FUNCTIONS["sdpa"]._plain, PairAttention)  # wrapped once
    handle.remove()
    with torch.no_grad():
        assert torch.allclose(chooser.forward(failing)(**call).log_probs, failing(**call).log_probs, atol=1e-5)
