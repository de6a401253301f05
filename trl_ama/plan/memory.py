"""What a training step needs of a device's memory, in bytes, from a model's configuration alone: no weights are read.

    peak = weights + reference model + max(
        optimizer states + gradients and activations at the worst moment of a pass,
        optimizer states + gradients + what the update needs for itself,
        the trial of the fast path before the first step: a plain pass forward over a pair of `max_length`)

Parameters are counted on the meta device, with the adapter that PEFT puts on; activations come from `plan/trace.py`, which runs
the very program on tensors without contents. What is said of libraries below was read in their sources: bitsandbytes 0.50,
PEFT 0.21, transformers 5.23, TRL 1.16, torch 2.13.
"""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..fast_path.packing import CannotShare
from ..fast_path.trial import sequence_limit
from .bytes import (
    count_parameters,
    gradient_bytes,
    is_paged,
    optimizer_bytes,
    saved_bytes,
    trained,
    update_bytes,
    weight_bytes,
)
from .empty_model import MemorySettings, empty_model
from .trace import CannotTrace, trace_pass


GIB = 2**30
Trials = dict[
    tuple[MemorySettings, int], int
]  # settings and tokens of a sequence -> bytes of the trial of the fast path


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


# ---- Weights ----


# ---- Gradients ----


# ---- A stage ----


def training_memory(
    config: PretrainedConfig,
    settings: MemorySettings,
    pairs: list[tuple[int, int, int]],
    packed: bool = True,
    reference: bool = False,
    max_length: int | None = None,
    common: int = 0,
    trials: Trials | None = None,
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
        trials (`dict`, *optional*): Trials of this configuration that were traced already, to which new ones are added.
    """
    return _memory(config, settings, pairs, packed, reference, max_length, common, trials, trains=True)


def scoring_memory(
    config: PretrainedConfig,
    settings: MemorySettings,
    pairs: list[tuple[int, int, int]],
    packed: bool = True,
    second: bool = False,
    max_length: int | None = None,
    common: int = 0,
    trials: Trials | None = None,
) -> StageMemory:
    """Memory of a stage that only scores; with `second`, another whole model is there beside the base. See [`training_memory`].

    Policies that are scored in one sweep run one after the other, so the activations are those of one.
    """
    settings = replace(settings, gradient_checkpointing=False)
    return _memory(config, settings, pairs, packed, second, max_length, common, trials, trains=False)


def why_not_packed(config: PretrainedConfig, settings: MemorySettings) -> str | None:
    """Why a model cannot take packed rows, seen by running one of a few tokens; `None` if it can."""
    try:
        trace_pass(empty_model(config, settings), settings, [(4, 4, 4)], packed=True, trains=False)
    except (CannotShare, CannotTrace) as reason:
        return str(reason)
    return None


def _trial_peak(config: PretrainedConfig, settings: MemorySettings, length: int, trials: Trials) -> int:
    """Of the trial of the fast path on a pair of so many tokens, which is the same before every stage of a run."""
    settings = replace(settings, gradient_checkpointing=False, accumulates=False, distributed=False)
    key = (settings, length)
    if key not in trials:
        half = max(1, length // 2)
        pairs = [(length - half, half, max(1, half - 1))]
        trials[key] = trace_pass(empty_model(config, settings), settings, pairs, packed=False, trains=False).peak
    return trials[key]


def _memory(config, settings, pairs, packed, second, max_length, common, trials, trains) -> StageMemory:
    model = empty_model(config, settings)
    weights, gradients = weight_bytes(model), gradient_bytes(model) if trains else 0
    # The buckets in which DistributedDataParallel sends gradients are copies of them, made before the first step
    buckets = gradients if settings.distributed else 0
    optimizer = optimizer_bytes(trained(model), settings.optim) if trains else 0
    update = update_bytes(trained(model), settings.optim, settings.device) if trains else 0
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
        peak = max(peak, _trial_peak(config, settings, length, {} if trials is None else trials))
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
