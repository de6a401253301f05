"""Which of the causal language models that transformers can build take the fast path, and whether it is the same there.

    python tests/benchmarks/fast_architectures.py --output fast_architectures.md

Every model type of transformers' list is built tiny from one recipe of settings, of which its configuration takes what it
knows; windows and chunks are 6 tokens. With `prefix_sharing="auto"`, short pairs come first, which no window cuts, then pairs
of up to 40 tokens. The table says which path was taken, why, and the largest difference of a token's log-prob from the plain
path (relative to its size, at least one nat). A type that the recipe cannot build is listed with the error. Ends with 1 if a
fast path gave other numbers.
"""

import argparse
import dataclasses
import inspect
import logging
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from trl_ama.fast_path.choice import PrefixSharing


VOCABULARY, WINDOW, LONGEST = 97, 6, 40
NUMBERS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "intermediate_size_mlp",
            "expert_ffn_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "query_pre_attn_scalar", "kv_lora_rank", "attention_head_dim"), 8),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "lru_width", "attention_window_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout", "attention_dropout", "layerdrop"), 0.0),
    "hidden_size_per_layer_input": 8,
    "floor_scale": 8,  # of Llama 4's temperature, which otherwise begins to count after thousands of tokens
    "use_sliding_window": True,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Where the recipe does not do, or where a setting makes a model of its own kind of it
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
OF_A_TYPE = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT
    ),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), LATENT),
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_target_positions": 128},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"floor_scale": 8, "interleave_moe_layer_step": 1},
    "qwen2": {"max_window_layers": 0},
    "qwen3": {"max_window_layers": 0},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "phi3": {"max_position_embeddings": 128, "original_max_position_embeddings": 128},
    "gpt2": {"n_inner": 64},
}
ROPE = {"rope_theta": 10000.0}
FACTORS = [1.0 + number for number in range(4)]
# Variants of a type that are told apart by a setting; the first has to be a name of the list
VARIANTS = {
    "llama dynamic rope": {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20},
    "llama long rope": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": FACTORS,
            "original_max_position_embeddings": 20,
            "factor": 4.0,
        },
        "max_position_embeddings": 80,
    },
    "llama yarn": {
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20},
        "max_position_embeddings": 80,
    },
    "mistral without window": {"sliding_window": None},
    "falcon alibi": {"alibi": True},
    "falcon new": {"new_decoder_architecture": True},
    "opt relu": {"do_layer_norm_before": False},
    "gpt_bigcode multi-head": {"multi_query": False},
    "gpt2 scaled": {"scale_attn_by_inverse_layer_idx": True},
}  # fmt: skip


def accepted(config_class: type) -> set[str]:
    """Names of settings that a configuration knows."""
    names = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "attribute_map", {}))
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names


def build(name: str) -> torch.nn.Module:
    """A tiny random model; `name` is a model type and perhaps a variant."""
    kind = name.split()[0]
    config_class = CONFIG_MAPPING[kind]
    known = accepted(config_class)
    settings = {key: value for key, value in NUMBERS.items() if key in known}
    # A name and its alias in `attribute_map` would be set twice
    for alias, original in getattr(config_class, "attribute_map", {}).items():
        if alias in settings and original in settings:
            del settings[alias]
    settings |= OF_A_TYPE.get(kind, {}) | VARIANTS.get(name, {})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_class(**settings))
    if sum(parameter.numel() for parameter in empty.parameters()) > 20_000_000:
        raise ValueError("the recipe does not make it tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # as if trained: biases and norms that are not zero and one
            parameter.data += 0.05 * torch.randn_like(parameter)
    add_fused_lm_head(model)
    return model.eval()


def padded(lengths: list[tuple[int, int, int]], seed: int) -> dict:
    """The call that DPOTrainer makes for random pairs of these lengths of prompt, chosen and rejected."""
    draw = random.Random(seed)
    rows = [[], []]
    for prompt, chosen, rejected in lengths:
        start = [draw.randrange(3, VOCABULARY) for _ in range(prompt)]
        for half, size in zip(rows, (chosen, rejected), strict=True):
            half.append((start, [draw.randrange(3, VOCABULARY) for _ in range(size)]))
    rows = rows[0] + rows[1]
    longest = max(len(start) + len(answer) for start, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, answer) in enumerate(rows):
        end = len(start) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor(start + answer), 1
        labels[row, len(start) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "fused_lm_head": True}


def calls() -> list[dict]:
    """The first pairs are shorter than any window of the recipe."""
    return [
        padded([(2, 3, 2), (1, 2, 4)], 0),
        padded([(3, 9, 12), (2, 2, 3), (8, 3, 9)], 1),
        padded([(10, 14, 20), (18, 7, 2), (1, 30, 12), (12, 12, 12)], 2),
        padded([(5, 16, 10)], 3),  # 20 or 21 tokens: at the edge of the variants' original length
        padded([(5, 15, 10)], 3),
        padded([(2, 38, 20), (20, 20, 20)], 4),
    ]


def chooser(max_length: int | None) -> PrefixSharing:
    PartialState()
    args = SimpleNamespace(torch_compile=False, use_liger_kernel=False, max_length=max_length)
    accelerator = SimpleNamespace(mixed_precision="no", parallelism_config=None, distributed_type="NO")
    return PrefixSharing(SimpleNamespace(args=args, accelerator=accelerator), "auto")


def compare(name: str, dtype: torch.dtype, max_length: int | None) -> dict:
    """Path, reason and largest difference of one type."""
    try:
        model = build(name).to(dtype)
    except Exception as error:  # noqa: BLE001 - whatever a foreign configuration says
        return {
            "path": "not built",
            "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}",
        }
    auto, worst = chooser(max_length), 0.0
    forward = auto.forward(model)
    with torch.no_grad():
        for call in calls():
            try:
                expected = model(**call).log_probs.float()
            except Exception as error:  # noqa: BLE001
                return {"path": "not run", "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
            before = auto.taken["fast"]
            ours = forward(**call).log_probs.float()
            if auto.taken["fast"] > before:
                difference = (ours - expected).abs() / expected.abs().clamp(min=1)
                worst = max(worst, float("inf") if not difference.isfinite().all() else difference.max().item())
    taken = auto.taken
    path = (
        "plain"
        if not taken["fast"]
        else "fast"
        if not taken["plain"]
        else f"fast {taken['fast']}, plain {taken['plain']}"
    )
    return {"path": path, "reason": "; ".join(sorted(auto._said)), "difference": worst if taken["fast"] else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tolerance = 1e-3 if options.dtype == "float32" else 0.2
    lines = ["| model type | path | largest difference | why |", "| --- | --- | ---: | --- |"]
    wrong = []
    for name in options.only or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]:
        row = compare(name, getattr(torch, options.dtype), options.max_length or None)
        difference = row.get("difference")
        if difference is not None and not difference <= tolerance:
            wrong.append(name)
        shown = "" if difference is None else f"{difference:.1e}"
        lines.append(f"| {name} | {row['path']} | {shown} | {row['reason']} |")
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n")
    print(f"\n{len(lines) - 2} model types; other numbers on the fast path: {wrong or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
