"""Trainer settings that people switch on, as one table: what DPOTrainer makes of them, AMATrainer must make, too.

A report is added by a line in `SETTINGS` (or in `ADAPTERS`, for a kind of adapter or a way to configure one). Tests draw from it
with `trainer_of`, which makes any trainer class with a setting, a tiny model and a few pairs.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tiny_models import CHAT_TEMPLATE
from tiny_pairs import make_rows
from tiny_runs import QUICK


@dataclass(frozen=True)
class Setting:
    """What differs from a plain run of full fine-tuning.

    Args:
        args: Of the `DPOConfig`.
        adapter: Kind and arguments of a PEFT configuration, as in `ADAPTERS`.
        model: Of the `LlamaConfig`.
        tokenizer: Attributes of the tokenizer.
        path: Whether `prefix_sharing="auto"` must take the `"fast"` path in training, must not (`"plain"`), or either (`None`).
        collator: Makes a data collator of a trainer's own.
        callbacks: Make callbacks.
        rows: Changes the pairs.
        needs: What it takes beside the packages of the tests, as a module's name.
    """

    args: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[str, dict[str, Any]] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    path: str | None = "fast"
    collator: Callable | None = None
    callbacks: tuple[Callable, ...] = ()
    rows: Callable[[list[dict]], list[dict]] | None = None
    needs: str | None = None


ALL_LINEAR = {"r": 4, "target_modules": "all-linear"}

# Name → kind and arguments of its configuration, beside `task_type` and, where it has them, `target_modules` (see `peft_config_of`)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", ALL_LINEAR),
    "dora": ("LORA", {**ALL_LINEAR, "use_dora": True}),
    "rslora": ("LORA", {**ALL_LINEAR, "use_rslora": True}),
    "lora with bias": ("LORA", {"r": 4, "lora_bias": True, "bias": "all"}),
    "lora, gaussian": ("LORA", {"r": 4, "init_lora_weights": "gaussian"}),
    "lora, orthogonal": ("LORA", {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora that begins away from zero": ("LORA", {"r": 4, "init_lora_weights": False}),
    "pissa": ("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    "olora": ("LORA", {"r": 4, "init_lora_weights": "olora"}),
    "lora, ranks by layer": ("LORA", {"r": 4, "rank_pattern": {"layers.0": 2}, "layers_to_transform": [0]}),
    "lora on doubled layers": ("LORA", {"r": 4, "layer_replication": [[0, 2], [0, 2]]}),
    "lora on embeddings": ("LORA", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora and saved modules": ("LORA", {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "lora and a saved norm": ("LORA", {"r": 4, "modules_to_save": ["norm"]}),
    "alora": ("LORA", {"r": 4, "alora_invocation_tokens": [4]}),
    "adalora": ("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, "deltaT": 1}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "oft": ("OFT", {"oft_block_size": 8, "r": 0}),
    "loha": ("LOHA", {"r": 4}),
    "lokr": ("LOKR", {"r": 4}),
    "loha with dropout": ("LOHA", {"r": 4, "module_dropout": 0.5}),
    "lokr with dropout": ("LOKR", {"r": 4, "rank_dropout": 0.5}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "layer norms": ("LN_TUNING", {"target_modules": ["input_layernorm"]}),
    "vera": ("VERA", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "pvera": ("PVERA", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "fourierft": ("FOURIERFT", {"n_frequency": 50}),
    "hra": ("HRA", {"r": 4}),
    "vblora": ("VBLORA", {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2}),
    "randlora": ("RANDLORA", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "shira": ("SHIRA", {"r": 4}),
    "c3a": ("C3A", {"block_size": 8}),
    "miss": ("MISS", {"r": 4}),
    "bone": ("MISS", {"r": 4, "init_weights": "bat"}),
    "road": ("ROAD", {"group_size": 16}),
    "waveft": ("WAVEFT", {"n_frequency": 50}),
    "osf": ("OSF", {"target_modules": ["q_proj"]}),
    "delora": ("DELORA", {"r": 4}),
    "gralora": ("GRALORA", {"r": 4, "gralora_k": 2}),
    "trainable tokens": ("TRAINABLE_TOKENS", {"token_indices": [5, 6, 7]}),
    "prompt tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 3}),
    "p-tuning": ("P_TUNING", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "prefix tuning": ("PREFIX_TUNING", {"num_virtual_tokens": 3}),
    "lily": ("LILY", {}),
}
PLAIN_ADAPTERS = {
    "alora",
    "prompt tuning",
    "p-tuning",
    "prefix tuning",
    "pvera",
    "lily",
    "loha with dropout",
    "lokr with dropout",
}


def peft_config_of(adapter: tuple[str, dict[str, Any]] | None) -> Any:
    """The PEFT configuration of an entry in `ADAPTERS`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    if adapter is None:
        return None
    kind, given = adapter
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {one.name for one in dataclasses.fields(config)}
    usual = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    return config(**{**{name: value for name, value in usual.items() if name in fields}, **given})


def other_adapter_kinds() -> list[str]:
    """Kinds of the installed PEFT that `ADAPTERS` does not name."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(
        {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        - {kind for kind, _ in ADAPTERS.values()}
    )


LORA = ("LORA", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
LORA_DROPOUT = ("LORA", {**ALL_LINEAR, "lora_dropout": 0.1})

SETTINGS: dict[str, Setting] = {
    "nothing": Setting(),
    # Noise and dropout
    "neftune": Setting({"neftune_noise_alpha": 5.0}, path="plain"),
    "neftune, lora": Setting({"neftune_noise_alpha": 5.0}, LORA, path="plain"),
    "neftune, precomputed reference": Setting(
        {"neftune_noise_alpha": 5.0, "precompute_ref_log_probs": True}, path="plain"
    ),
    "dropout of an adapter, turned off by TRL": Setting({}, LORA_DROPOUT),
    "dropout of an adapter": Setting({"disable_dropout": False}, LORA_DROPOUT, path="plain"),
    "dropout of attention": Setting({"disable_dropout": False}, model={"attention_dropout": 0.1}, path="plain"),
    "dropout of both": Setting(
        {"disable_dropout": False}, LORA_DROPOUT, model={"attention_dropout": 0.1}, path="plain"
    ),
    # Memory
    "gradient checkpointing": Setting({"gradient_checkpointing": True}, LORA),
    "gradient checkpointing, full": Setting({"gradient_checkpointing": True}),
    "gradient checkpointing, reentrant": Setting(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, LORA
    ),
    "accumulation": Setting({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, LORA),
    "batches of one": Setting({"per_device_train_batch_size": 1}, LORA),
    # Lengths and batches
    "padding_free": Setting({"padding_free": True}),
    "pad_to_multiple_of": Setting({"pad_to_multiple_of": 16}),
    "max_length cuts": Setting({"max_length": 9}),
    "max_length cuts, keep_end": Setting({"max_length": 9, "truncation_mode": "keep_end"}),
    "no max_length": Setting({"max_length": None}),
    "left padding": Setting(tokenizer={"padding_side": "left"}),
    "bos": Setting(tokenizer={"bos_token": "<unk>", "chat_template": "{{ bos_token }} " + CHAT_TEMPLATE}),
    "pad is eos": Setting(tokenizer={"pad_token": "</s>"}),
    "drop_last": Setting({"dataloader_drop_last": True, "num_train_epochs": 2, "max_steps": -1}),
    "a last batch that is smaller": Setting(
        {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 5}
    ),
    "workers": Setting({"dataloader_num_workers": 1}),
    "sequential": Setting({"train_sampling_strategy": "sequential"}),
    # Losses
    **{
        f"loss {kind}": Setting({"loss_type": [kind]})
        for kind in (
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
        )
    },
    "loss exo_pair": Setting({"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    "loss robust": Setting({"loss_type": ["robust"], "label_smoothing": 0.1}),
    "two losses": Setting({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}),
    "use_weighting": Setting({"use_weighting": True}),
    "ld_alpha": Setting({"ld_alpha": 0.3}),
    "forward_kl": Setting({"f_divergence_type": "forward_kl"}),
    "js_divergence": Setting({"f_divergence_type": "js_divergence"}),
    "alpha_divergence": Setting({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    # Reference
    "precompute_ref_log_probs": Setting({"precompute_ref_log_probs": True}),
    "precompute_ref_log_probs, lora": Setting({"precompute_ref_log_probs": True}, LORA),
    "sync_ref_model": Setting({"sync_ref_model": True, "ref_model_sync_steps": 1}),
    # Precision and kernels
    "bf16": Setting({"bf16": True}, LORA),
    "model in bfloat16": Setting({"model_init_kwargs": {"dtype": "bfloat16"}}, LORA),
    "eager attention": Setting({"model_init_kwargs": {"attn_implementation": "eager"}}, path="plain"),
    "torch_compile": Setting({"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}, path="plain"),
    "liger": Setting({"use_liger_kernel": True}, needs="liger_kernel"),
    # Optimizers
    **{f"optimizer {name}": Setting({"optim": name}) for name in ("adafactor", "rmsprop", "adagrad")},
    "optimizer sgd": Setting({"optim": "sgd", "learning_rate": 0.3}),
    "weight decay and clipping": Setting({"weight_decay": 0.1, "max_grad_norm": 0.1, "warmup_steps": 1}),
    "cosine": Setting({"lr_scheduler_type": "cosine"}),
    # Models
    "untied head": Setting(model={"tie_word_embeddings": False}),
    "untied head, saved": Setting({}, ADAPTERS["lora and saved modules"], model={"tie_word_embeddings": False}),
    "tokens beside an adapter": Setting(
        {}, ("LORA", {"r": 4, "trainable_token_indices": [5, 6]}), model={"tie_word_embeddings": False}
    ),
    # Adam would make steps of the rounding that is the gradient of a key's bias
    "biases": Setting({"optim": "sgd", "learning_rate": 0.3}, model={"attention_bias": True, "mlp_bias": True}),
    "one key head": Setting(model={"num_key_value_heads": 1}),
    # Kinds of adapters
    **{
        f"adapter {name}": Setting({}, adapter, path="plain" if name in PLAIN_ADAPTERS else "fast")
        for name, adapter in ADAPTERS.items()
    },
}


def pairs_of(setting: Setting, count: int = 12) -> list[dict]:
    """Pairs for a run with this setting."""
    rows = make_rows("list", count, seed=0)
    return rows if setting.rows is None else setting.rows(rows)


def trainer_of(
    trainer_class: type,
    config_class: type,
    setting: Setting,
    model: str,
    tokenizer: Any,
    output_dir: str,
    task: str | None = None,
    **args,
) -> Any:
    """A trainer with this setting.

    Args:
        trainer_class, config_class: `DPOTrainer` and `DPOConfig`, or `AMATrainer` and `AMAConfig`.
        setting: From `SETTINGS`.
        model: Folder of a model that was made with `setting.model`.
        tokenizer: Without the setting's attributes.
        output_dir: Of the run.
        task: Of all pairs, for a trainer that wants to know.
        args: Of the configuration, before the setting's.
    """
    import copy

    from datasets import Dataset

    tokenizer = copy.deepcopy(tokenizer)
    for name, value in setting.tokenizer.items():
        setattr(tokenizer, name, value)
    usual = {
        **QUICK,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 7,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(output_dir, **{**usual, "lr_scheduler_type": "constant", **args, **setting.args})
    return trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_list(
            pairs_of(setting) if task is None else [{**row, "task": task} for row in pairs_of(setting)]
        ),
        processing_class=tokenizer,
        peft_config=peft_config_of(setting.adapter),
        callbacks=[make() for make in setting.callbacks],
        data_collator=None if setting.collator is None else setting.collator(tokenizer),
    )
