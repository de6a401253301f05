"""The model of a plan: as DPOTrainer would train it, without weights."""

import copy
from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ..common.errors import AMAError, sentence


_HEAD = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPOTrainer asks of TRL's head, for its metrics


@dataclass(frozen=True)
class MemorySettings:
    """What decides the memory of a step beside the batch.

    Args:
        dtype (`torch.dtype`): Of the weights that are not quantised.
        autocast (`torch.dtype`, *optional*): `bf16` or `fp16` of the training arguments.
        quantization (`BitsAndBytesConfig`, *optional*): 4 or 8 bits.
        peft_config (`PeftConfig`, *optional*): The adapter; `None` trains all parameters.
        attention (`str`, *optional*): `"sdpa"`, `"eager"` or a flash attention; the model's default if `None`.
        gradient_checkpointing (`bool`): Whether a layer is computed again in the backward pass.
        optim (`str`): Name of the optimizer in the training arguments.
        accumulates (`bool`): Whether gradients are there already when a pass begins.
        distributed (`bool`): Whether gradients are averaged over processes by DistributedDataParallel.
        device (`str`): `"cuda"` or `"cpu"`, which differ in attention, in the LM head and in the update.
    """

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    quantization: BitsAndBytesConfig | None = field(default=None, hash=False)
    peft_config: PeftConfig | None = field(default=None, hash=False)
    attention: str | None = None
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch_fused"
    accumulates: bool = False
    distributed: bool = False
    device: str = "cuda"

    @property
    def flash(self) -> bool:
        """Whether attention is a flash attention, which need not be installed here to be planned for."""
        return self.attention is not None and "flash" in self.attention


def empty_model(config: PretrainedConfig, settings: MemorySettings) -> torch.nn.Module:
    """The model as DPOTrainer would train it, on the meta device: quantised, with TRL's fused head and the adapter.

    Raises:
        AMAError: If transformers, bitsandbytes or PEFT refuse the configuration.
    """
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=settings.dtype,
                attn_implementation="sdpa" if settings.flash else settings.attention,  # see `plan/trace.py`
            )
        model.tie_weights()  # which the meta device has taken apart
        if settings.quantization is not None:
            bits = 4 if settings.quantization.load_in_4bit else 8
            AutoHfQuantizer.from_config(settings.quantization).preprocess_model(model, device_map=None)
            setattr(model, f"is_loaded_in_{bits}bit", True)  # which PEFT asks for
        add_fused_lm_head(model, outputs=_HEAD)
        if settings.peft_config is not None:
            model = get_peft_model(model, copy.deepcopy(settings.peft_config), low_cpu_mem_usage=True)
    except (ValueError, ImportError, AttributeError, KeyError, NotImplementedError, RuntimeError) as error:
        raise AMAError(
            f"A model of type '{config.model_type}' cannot be planned with these settings: {sentence(error)} Check the model, "
            "the adapter's and the quantisation's settings."
        ) from error
    disable_dropout_in_model(model)
    scales_loss = settings.autocast is torch.float16  # for which adapters are held in 32 bits, see dpo/precision.py
    if settings.quantization is not None and settings.peft_config is not None and not scales_loss:
        for name, parameter in model.named_parameters():  # as DPOTrainer does, for QLoRA
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside of PEFT's."""
    return model.get_base_model() if is_peft_model(model) else model
