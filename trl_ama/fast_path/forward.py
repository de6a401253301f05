"""The forward pass over a row of packed pairs; see `fast_path/packing.py` for the row, `fast_path/attention.py` for its attention."""

import contextlib
from typing import Any

import torch

from .attention import install
from .frozen_head import frozen_head
from .packing import PAIRS_KEY, PackedPairs
from .varlen import planned_for_a_gpu


_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's FusedCausalLMOutput


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with its adapters, inside Accelerate's wrappers (`.module`)."""
    while hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
        model = model.module
    return model


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside wrappers of Accelerate and PEFT."""
    model = unwrapped(model)
    # PEFT's own method: `is_peft_model` asks the installed packages every time, milliseconds in every forward pass
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keep_scored(module, args, kwargs, outputs):
    """Forward hook of the backbone: of the hidden states, only those that predict an answer token go to the head."""
    pairs = kwargs.get(PAIRS_KEY)
    if pairs is not None:
        hidden = outputs.last_hidden_state  # of a split model, not where its inputs are
        outputs.last_hidden_state = hidden[:, pairs.score_positions.to(hidden.device)]  # (1, T, H) -> (1, N, H)
    return outputs


def packed_forward(model: torch.nn.Module, pairs: PackedPairs, metrics: bool = True, **kwargs) -> Any:
    """Run a model that has TRL's fused head on packed pairs.

    Args:
        model (`torch.nn.Module`): The model as it is trained, in all its wrappers.
        pairs ([`PackedPairs`]): The batch.
        metrics (`bool`): Whether more than log-probs is wanted.
        kwargs: For the model.

    Returns:
        `FusedCausalLMOutput` as for the padded batch; without `loss` and `label_mask`, which `DPOTrainer` does not read.
    """
    install(causal_lm(model).config._attn_implementation)
    handle = causal_lm(model).base_model.register_forward_hook(_keep_scored, with_kwargs=True)
    try:
        with contextlib.nullcontext() if planned_for_a_gpu() else frozen_head(metrics):  # which a GPU does not take
            outputs = model(
                input_ids=pairs.input_ids,
                position_ids=pairs.position_ids,
                # A mask of four dimensions is passed on as it is, and the attention above looks at none
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pairs.input_ids.device),
                shift_labels=pairs.labels,
                fused_lm_head=True,
                **{PAIRS_KEY: pairs},
                **kwargs,
            )
    finally:
        handle.remove()
    fields = {name: pairs.unpack(outputs.get(name)) for name in _PER_TOKEN if outputs.get(name) is not None}
    return type(outputs)(**fields)
