"""Every kind of adapter that PEFT knows, small enough for the tests' models; a new one is a line here."""

from collections.abc import Callable

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShadowConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from tiny_models import SIZES, SPECIAL
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


TWO = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
TEXT = {"task_type": "CAUSAL_LM"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_VIRTUAL = {"num_virtual_tokens": 4, **TEXT}

# Ways to use LoRA: starts, variants, and what is trained along
LORA = {
    "lora": lambda: LoraConfig(r=4, **ALL),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, **TWO),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **ALL),
    "kasa": lambda: LoraConfig(r=4, kasa_config=KasaConfig(), **TWO),
    "bdlora": lambda: LoraConfig(
        r=4, use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2), **TWO
    ),
    "patterns": lambda: LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, **TWO),
    "one layer": lambda: LoraConfig(r=4, layers_to_transform=[1], **TWO),
    "gaussian": lambda: LoraConfig(r=4, init_lora_weights="gaussian", **TWO),
    "orthogonal": lambda: LoraConfig(r=4, init_lora_weights="orthogonal", **TWO),
    "olora": lambda: LoraConfig(r=4, init_lora_weights="olora", **TWO),
    "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", **TWO),
    "eva": lambda: LoraConfig(r=4, init_lora_weights="eva", **TWO),
    "lora_ga": lambda: LoraConfig(r=4, init_lora_weights="lora_ga", **TWO),
    "bias: all": lambda: LoraConfig(r=4, bias="all", **TWO),
    "bias: lora_only": lambda: LoraConfig(r=4, bias="lora_only", **TWO),
    "lora_bias": lambda: LoraConfig(r=4, lora_bias=True, **TWO),
    "norms saved": lambda: LoraConfig(r=4, modules_to_save=["norm", "input_layernorm"], **TWO),
    "attention's parameter": lambda: LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
}

# What touches embeddings or head, which may be tied
TIED = {
    "head": lambda: LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "embeddings by DoRA": lambda: LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "head and embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "embeddings, kept tied": lambda: LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "head saved": lambda: LoraConfig(r=4, modules_to_save=["lm_head"], **TWO),
    "embeddings saved": lambda: LoraConfig(r=4, modules_to_save=["embed_tokens"], **TWO),
    "both saved": lambda: LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], **TWO),
    "saved, kept tied": lambda: LoraConfig(r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True, **TWO),
    "tokens beside": lambda: LoraConfig(r=4, trainable_token_indices=[3, 5], **TWO),
    "tokens of each": lambda: LoraConfig(r=4, trainable_token_indices={"embed_tokens": [3], "lm_head": [5]}, **TWO),
    "tokens, kept tied": lambda: LoraConfig(r=4, trainable_token_indices=[3, 5], ensure_weight_tying=True, **TWO),
    "tokens alone": lambda: TrainableTokensConfig(token_indices=[5, 6, 7]),
}

# Mixtures of experts hold their experts' weights as parameters, not as layers
EXPERTS_KINDS = {
    "experts, one parameter": lambda: LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS[:1]),
    "experts, two at once": lambda: LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS),
    "experts and layers": lambda: LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS),
    "experts and head": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=EXPERTS, modules_to_save=["lm_head"]
    ),
    "router": lambda: LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
}

OTHERS = {
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, total_step=10, **TWO),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, **TWO),
    "C3A": lambda: C3AConfig(block_size=4, **TWO),
    "DEFT": lambda: DeftConfig(r=4, **TWO),
    "DeLoRA": lambda: DeloraConfig(r=4, **TWO),
    "FourierFT": lambda: FourierFTConfig(n_frequency=20, **TWO),
    "FRoD": lambda: FrodConfig(progressbar=False, **TWO),
    "GLoRA": lambda: GloraConfig(r=4, **TWO),
    "GraLoRA": lambda: GraloraConfig(r=4, gralora_k=2, **TWO),
    "HiRA": lambda: HiraConfig(r=4, **TWO),
    "HRA": lambda: HRAConfig(r=4, **TWO),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "LN tuning": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "LoHa": lambda: LoHaConfig(r=4, **TWO),
    "LoKr": lambda: LoKrConfig(r=4, **TWO),
    "MiSS": lambda: MissConfig(r=4, **TWO),
    "MiSS, bat": lambda: MissConfig(r=4, init_weights="bat", **TWO),
    "MiSS, mini": lambda: MissConfig(r=4, init_weights="mini", mini_r=2, **TWO),
    "OFT": lambda: OFTConfig(oft_block_size=4, **TWO),
    "OSF": lambda: OSFConfig(**TWO),
    "PEANuT": lambda: PeanutConfig(r=4, **TWO),
    "PSOFT": lambda: PsoftConfig(r=4, **TWO),
    "PVeRA": lambda: PveraConfig(r=4, **TWO),
    "RandLoRA": lambda: RandLoraConfig(r=4, **TWO),
    "RoAd": lambda: RoadConfig(group_size=4, **TWO),
    "SHiRA": lambda: ShiraConfig(r=4, **TWO),
    "Supertuning": lambda: SupertuningConfig(**TWO),
    "TinyLoRA": lambda: TinyLoraConfig(r=2, **TWO),
    "UniLoRA": lambda: UniLoraConfig(r=4, theta_d_length=64, **TWO),
    "VB-LoRA": lambda: VBLoRAConfig(r=4, num_vectors=16, vector_length=8, topk=2, **TWO),
    "VeRA": lambda: VeraConfig(r=4, **TWO),
    "WaveFT": lambda: WaveFTConfig(n_frequency=20, **TWO),
}

# Kinds whose work no base's weights can do, with what says so
NOT_MERGED = {
    "aLoRA": (
        lambda: LoraConfig(r=4, alora_invocation_tokens=[5, 6], **TEXT, **TWO),
        "works from its invocation tokens on",
    ),
    "BEFT": (lambda: BeftConfig(target_modules=["v_proj"]), "Base layer has no bias"),
    "Lily": (lambda: LilyConfig(r=4, stride_A=1, num_B=2, **TWO), "not supported for Lily"),
    "bias of its own": (LORA["lora_bias"], "the base layer has no bias"),
    "random start": (
        lambda: LoraConfig(r=4, init_lora_weights="pissa_niter_4", **TWO),
        "random numbers that are drawn anew at every load",
    ),
    "adaption prompts": (
        lambda: AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TEXT),
        "beside the base's layers",
    ),
    "Poly": (lambda: PolyConfig(r=4, n_tasks=1, n_skills=1, **TWO), "POLY, gives no log-probs of plain text"),
    "Shadow": (lambda: ShadowConfig(**TWO), "sets shadow_model"),
    "prompt tuning": (lambda: PromptTuningConfig(**_VIRTUAL), "puts tokens of its own"),
    "prefix tuning": (lambda: PrefixTuningConfig(**_VIRTUAL), "puts tokens of its own"),
    "P-tuning": (lambda: PromptEncoderConfig(encoder_hidden_size=8, **_VIRTUAL), "puts tokens of its own"),
    "cartridge": (lambda: CartridgeConfig(**_VIRTUAL), "puts tokens of its own"),
    "CPT": (
        lambda: CPTConfig(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **TEXT),
        "puts tokens of its own",
    ),
    "multitask prompts": (lambda: MultitaskPromptTuningConfig(num_tasks=2, **_VIRTUAL), "puts tokens of its own"),
}

# Not built here: AdaMSS and LoftQ want packages that the tests do not (scikit-learn, scipy); X-LoRA is made of other adapters
NOT_BUILT = {"ADAMSS", "XLORA"}


def make_moe(vocab_size: int) -> Qwen3MoeForCausalLM:
    """A random mixture of 4 experts, of about 10,000 parameters."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8, max_position_embeddings=512,
        initializer_range=0.2, tie_word_embeddings=False, **SIZES, **SPECIAL,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def make_adapter(base: torch.nn.Module, kind: Callable[[], PeftConfig], scale: float = 0.1) -> PeftModel:
    """An adapter of some kind on a base, with random weights, so that it changes what the model says."""
    torch.manual_seed(1)
    model = get_peft_model(base, kind())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model
