"""Adapters of every kind in folders, and what is said of those that are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from trl_ama import AMAError
from trl_ama.merge.merge import merge_adapter
from trl_ama.policies.checks import check_policy_source


WHO = "the specialist of task 'list'"


def save_adapter(folder, model_dir, config=None, seed=0, **kwargs) -> str:
    """An adapter with random weights, so that it changes what the model says."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir, **kwargs)
    config = config or LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def edit(folder, **changes) -> None:
    """Change fields of an adapter's configuration."""
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def refused(base, source, **kwargs) -> str:
    with pytest.raises(AMAError) as caught:
        check_policy_source(base, WHO, source, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("The specialist of task 'list'") and source in text, text
    return text


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


KINDS = {
    "lora": LoraConfig(r=4, **LINEAR),
    "rslora": LoraConfig(r=4, use_rslora=True, **LINEAR),
    "dora": LoraConfig(r=4, use_dora=True, **LINEAR),
    "ranks": LoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **LINEAR),
    "olora": LoraConfig(r=4, init_lora_weights="olora", **LINEAR),
    "orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal", **LINEAR),
    "modules_to_save": LoraConfig(r=4, modules_to_save=["lm_head"], **LINEAR),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "layers": LoraConfig(r=4, layers_to_transform=[1], target_modules=["q_proj"]),
    "target_parameters": LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(r=4, total_step=10, target_modules=["q_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


def merge_refused(adapter, output, text, **kwargs):
    with pytest.raises(AMAError, match=text) as caught:
        merge_adapter(str(adapter), output, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
