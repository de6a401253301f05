"""Tiny random models and padded pairs for the tests of prefix sharing."""

import copy
from types import SimpleNamespace

import torch
import transformers
from accelerate import PartialState
from peft.utils.integrations import dequantize_bnb_weight
from tiny_models import SIZES
from trl.trainer.utils import add_fused_lm_head

from trl_ama.fast_path.choice import PrefixSharing


VOCABULARY = 97
_TENSORS = ("input_ids", "attention_mask", "labels")
ROUNDING = 8  # times as far from float64 as the plain path may be; what is wrong is off by thousands of times
TINY = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_8 = {**TINY, "head_dim": 8}
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

EXPERTS = {**HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}

# Window 6 is shorter than the sequences below
FAST = {
    "Llama": TINY,
    "Qwen2": {**TINY, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},  # in one of two layers
    "Qwen3": {**HEADS_OF_8, "tie_word_embeddings": True},
    "Mistral": {**TINY, "sliding_window": 6},
    "Gemma3Text": {**HEADS_OF_8, "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "GPT2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
    },
    "Phi": TINY,  # a head with a bias
    "Qwen3Moe": EXPERTS,
    "Granite": {**TINY, "logits_scaling": 2.0},
    "Olmo3": {**TINY, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Cohere2": {**TINY, "sliding_window": 6, "logit_scale": 0.5},
    "DeepseekV3": {
        **TINY,
        **LATENT,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "SmolLM3": {**TINY, "no_rope_layers": [1, 0]},
}


def build(name: str, settings: dict):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    for module in model.modules():  # as DPOTrainer does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def sharing(mode="auto", **arguments) -> PrefixSharing:
    PartialState()
    args = SimpleNamespace(**{"torch_compile": False, "use_liger_kernel": False, "max_length": 64, **arguments})
    accelerator = SimpleNamespace(mixed_precision="no", parallelism_config=None)
    return PrefixSharing(SimpleNamespace(args=args, accelerator=accelerator), mode)


def padded(pairs: list[tuple[list[int], list[int], list[int]]]) -> dict:
    """The call that DPOTrainer makes, of (prompt, chosen, rejected) token ids."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels, mask = (
        torch.zeros(len(rows), length).long(),
        torch.full((len(rows), length), -100),
        torch.zeros(len(rows), length).long(),
    )
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "fused_lm_head": True}


def random_pairs(count: int, seed: int, prompts=(1, 10), answers=(1, 14), beginning=0):
    """Pairs whose answers may begin alike, be the same, or one a part of the other; all prompts with the same tokens first."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(bounds):
        size = int(torch.randint(*bounds, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    pairs = []
    system = tokens((beginning, beginning + 1))
    for number in range(count):
        prompt, chosen, rejected = system + tokens(prompts), tokens(answers), tokens(answers)
        rejected = {1: chosen[:3] + rejected, 2: chosen + rejected, 3: list(chosen), 4: chosen[:1]}.get(
            number % 8, rejected
        )
        pairs.append((prompt, chosen, rejected))
    return pairs


def gradients(outputs, model, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum of log-probs with respect to every parameter that has one."""
    model.zero_grad()
    (outputs.log_probs * weights).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def weights_for(call: dict, seed: int = 1) -> torch.Tensor:
    """Random weights of a call's log-probs."""
    shape = call["labels"][:, 1:].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_gradients(model, call: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What [`gradients`] of the plain path would be without rounding: the same model in float64, scored from its logits."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "quant_state"):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(dequantize_bnb_weight(module.weight), requires_grad=False)
            exact.set_submodule(name, plain)
    exact = exact.double()
    exact.config._experts_implementation = "eager"  # the kernel for groups of experts takes no float64
    for module in exact.modules():
        module.__dict__.pop("forward", None)  # the fused head's, which is bound to the model that was copied
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    exact.zero_grad()
    for ids, mask, labels, weight in zip(*(call[name] for name in _TENSORS), weights, strict=True):
        size = int(mask.sum())  # each sequence alone: a row of padding that sees nothing is NaN in float64
        logits = exact(input_ids=ids[None, :size], use_cache=False).logits[0, :-1]
        labels = labels[1:size]
        logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        (logps * weight[: size - 1]).masked_fill(labels == -100, 0).sum().backward()
    return {name: value.grad for name, value in exact.named_parameters() if value.grad is not None}


def assert_same_gradients(ours: dict, theirs: dict, exact: dict) -> None:
    """Parameter by parameter: as near to the gradients without rounding as the plain path is, on whatever processor.

    How far rounding takes a path depends on the order of sums, which is the processor's and the number of threads'. So the
    plain path's own distance from float64 is the measure, with a few units in the last place for where it is exact by chance.
    """
    assert ours.keys() == theirs.keys() and theirs
    assert theirs.keys() == exact.keys(), theirs.keys() ^ exact.keys()
    scale = max(float(gradient.abs().max()) for gradient in exact.values())
    assert scale > 0
    unit = torch.finfo(torch.float32).eps
    errors = {name: [float((path[name] - exact[name]).abs().max()) for path in (ours, theirs)] for name in exact}
    typical = sorted(their for _, their in errors.values())[len(errors) // 2]
    for name, (our, their) in errors.items():
        allowed = ROUNDING * max(their, typical, unit * float(exact[name].abs().max()), unit / 4 * scale)
        assert our <= allowed, (
            f"{name}: {our / scale:.2g} of the scale, where the plain path is off by {their / scale:.2g}"
        )
