"""What a training step needs of a device's memory, in bytes, from a model's configuration alone: no weights are read.

    peak = weights + reference model + max(
        optimizer states + gradients and activations at the worst moment of a pass,
        optimizer states + gradients + what the update needs for itself,
        the trial of the fast path before the first step: a plain pass forward over a pair of `max_length`)

Parameters are counted on the meta device, with the adapter that PEFT puts on; activations come from `memory_trace.py`, which runs
the very program on tensors without contents. What is said of libraries below was read in their sources: bitsandbytes 0.50,
PEFT 0.21, transformers 5.23, TRL 1.16, torch 2.13.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from accelerate import init_empty_weights
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from .errors import AMAError, sentence
from .optimizer_memory import is_paged, optimizer_bytes, update_bytes
from .prefix_trial import sequence_limit
from .quantized import quantized_layers


GIB = 2**30
NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # weights to a scale, and scales to a scale of scales (bitsandbytes' defaults)
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


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one device, and its parameters; see docs/plan.md for what each term is."""

    parameters: int
    trainable: int
    saved: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int | None  # None if the model cannot be run without contents; the peak is then a lower bound
    peak: int
    paged: bool
    packed: bool
    pairs: list[tuple[int, int, int]]  # tokens of prompt, chosen and rejected answer, of the batch that is planned
    common: int  # tokens that these prompts begin with, which are in a packed row once
    why_plain: str | None = None  # why the batch is not packed, or not run at all, as half a sentence

    def fits(self, gib: float, overhead: float = 0.0) -> bool:
        """Whether a device of so many GiB holds the peak and `overhead` GiB that are not ours."""
        return self.peak + overhead * GIB <= gib * GIB

    @property
    def tokens(self) -> int:
        """Tokens of the batch as it runs: in one packed row, without the last of each answer, or in padded rows."""
        if self.packed:
            return sum(prompt + chosen + rejected - 2 for prompt, chosen, rejected in self.pairs) - self.common * (
                len(self.pairs) - 1
            )
        return 2 * len(self.pairs) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.pairs)


# ---- The model without weights ----


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
                attn_implementation="sdpa" if settings.flash else settings.attention,  # see `memory_trace.py`
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
    if settings.quantization is not None and settings.peft_config is not None:
        for name, parameter in model.named_parameters():  # as DPOTrainer does, for QLoRA
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside of PEFT's."""
    return model.get_base_model() if is_peft_model(model) else model


# ---- Weights ----


def nf4_bytes(elements: int, double_quant: bool = True) -> int:
    """Bytes of a weight in 4 bits: two to a byte, and its scales.

    A block of 64 shares a scale in 32 bits. Double quantisation stores a scale in 8 bits, with one in 32 bits for 256 of them, a
    table of 256 values and an offset. The table of the 16 levels is the weight's own.
    """
    blocks = math.ceil(elements / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + 4 * 256 + 4 if double_quant else 4 * blocks
    return math.ceil(elements / 2) + scales + 4 * 16


def int8_bytes(rows: int, columns: int) -> int:
    """Bytes of a weight in 8 bits: a byte each, and a scale in 32 bits for each row."""
    return rows * columns + 4 * rows


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as they are held in training; what is tied counts once."""
    quantised = {module.weight: module for _, module in quantized_layers(model)}
    total = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        module = quantised.get(parameter)
        if module is None:
            total += parameter.nbytes
        elif type(module).__name__ == "Linear4bit":
            elements = module.in_features * module.out_features
            total += nf4_bytes(elements, module.weight.compress_statistics)
        else:
            total += int8_bytes(module.out_features, module.in_features)
    return total


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters and those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights' file that a finished training leaves: PEFT's adapter, or the model. Without the file's header."""
    if is_peft_model(model):
        # PEFT would ask the Hub whether the vocabulary has grown, which it does not here
        return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values())
    return sum(parameter.nbytes for parameter in model.parameters())


# ---- Gradients ----


def _trained(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def gradient_bytes(model: torch.nn.Module) -> int:
    """Bytes of the gradients: as their parameters."""
    return sum(parameter.nbytes for parameter in _trained(model))


# ---- A stage ----


def training_memory(
    config: PretrainedConfig,
    settings: MemorySettings,
    pairs: list[tuple[int, int, int]],
    packed: bool = True,
    reference: bool = False,
    max_length: int | None = None,
    common: int = 0,
) -> StageMemory:
    """Memory of a stage that trains.

    Args:
        config (`PretrainedConfig`): The base model's.
        settings ([`MemorySettings`]): The rest that decides.
        pairs (`list[tuple[int, int, int]]`): Tokens of prompt, chosen and rejected answer, of the pairs of the largest batch.
        packed (`bool`): Whether the fast path is asked for; it is not taken where the model does not allow it.
        reference (`bool`): Whether a second model is in memory for the reference, as in full fine-tuning by DPOTrainer.
        max_length (`int`, *optional*): Of the training arguments: what the trial of the fast path goes up to. Without, it goes
            up to twice the longest of `pairs`.
        common (`int`): Tokens that all prompts begin with, which are in a packed row once.
    """
    return _memory(config, settings, pairs, packed, reference, max_length, common, trains=True)


def scoring_memory(
    config: PretrainedConfig,
    settings: MemorySettings,
    pairs: list[tuple[int, int, int]],
    packed: bool = True,
    second: bool = False,
    max_length: int | None = None,
    common: int = 0,
) -> StageMemory:
    """Memory of a stage that only scores; with `second`, another whole model is there beside the base. See [`training_memory`].

    Policies that are scored in one sweep run one after the other, so the activations are those of one.
    """
    settings = replace(settings, gradient_checkpointing=False)
    return _memory(config, settings, pairs, packed, second, max_length, common, trains=False)


def why_not_packed(config: PretrainedConfig, settings: MemorySettings) -> str | None:
    """Why a model cannot take packed rows, seen by running one of a few tokens; `None` if it can."""
    from .memory_trace import CannotTrace, trace_pass
    from .prefix_sharing import CannotShare

    try:
        trace_pass(empty_model(config, settings), settings, [(4, 4, 4)], packed=True, trains=False)
    except (CannotShare, CannotTrace) as reason:
        return str(reason)
    return None


def _memory(config, settings, pairs, packed, second, max_length, common, trains) -> StageMemory:
    from .memory_trace import CannotTrace, trace_pass
    from .prefix_sharing import CannotShare

    model = empty_model(config, settings)
    weights, gradients = weight_bytes(model), gradient_bytes(model) if trains else 0
    # The buckets in which DistributedDataParallel sends gradients are copies of them, made before the first step
    buckets = gradients if settings.distributed else 0
    optimizer = optimizer_bytes(_trained(model), settings.optim) if trains else 0
    update = update_bytes(_trained(model), settings.optim, settings.device) if trains else 0
    saved, (parameters, trainable) = saved_bytes(model), count_parameters(model)
    reference = weight_bytes(empty_model(config, replace(settings, peft_config=None))) if second else 0
    why_plain, traced = None, None
    try:
        try:
            traced = trace_pass(model, settings, pairs, packed, trains, common)
        except (CannotShare, CannotTrace) as reason:
            if not packed:
                raise
            why_plain, packed = str(reason), False
            traced = trace_pass(empty_model(config, settings), settings, pairs, False, trains)
    except CannotTrace as reason:
        why_plain = str(reason)
    during = gradients if traced is None else traced.peak + (gradients if trains and settings.accumulates else 0)
    peak = optimizer + max(during, gradients + update)
    if (
        traced is not None and packed
    ):  # before the first step, the fast path is tried on a pair as long as there can be
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)
        length = min(max_length or 2 * longest, sequence_limit(config)[0])
        half = max(1, length // 2)
        plain = replace(settings, gradient_checkpointing=False, accumulates=False)
        trial = [(length - half, half, max(1, half - 1))]
        peak = max(peak, trace_pass(empty_model(config, settings), plain, trial, packed=False, trains=False).peak)
    return StageMemory(
        parameters=parameters,
        trainable=trainable if trains else 0,
        saved=saved if trains else 0,
        weights=weights,
        reference=reference,
        gradients=gradients + buckets,
        optimizer=optimizer,
        activations=None if traced is None else traced.peak - traced.gradients,
        peak=weights + reference + buckets + peak,
        paged=is_paged(settings.optim),
        packed=packed,
        pairs=pairs,
        common=common if packed else 0,
        why_plain=why_plain,
    )
