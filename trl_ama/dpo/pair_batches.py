"""A step's batches of pairs: what `DPOTrainer` saw of one, which of its pairs count, and which have no finite loss."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from trl import DPOTrainer

from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS
from ..tasks.pairs import TASK_COLUMN
from .losses import PairLogProbs, PreferenceLossConfig, pair_losses, sequence_logps


# In a batch with repeats: how many of its pairs count, which come first, and how many do on all processes together
COUNTED = "counted_pairs"


class RecordedForward:
    """Forwards calls to the model and keeps the outputs of the first, with their graph.

    `DPOTrainer` only ever calls the model that its loss is given, so this stands in for it.

    Args:
        model (`Callable`): What is called.
        then (`Callable`, *optional*): What to do when the first call is done.
    """

    def __init__(self, model: Callable, then: Callable[[], None] | None = None):
        self._model, self._then = model, then
        self.outputs = None

    def __call__(self, *args, **kwargs):
        outputs = _beside(self._model(*args, **kwargs), kwargs["input_ids"].device)
        if self.outputs is None:
            self.outputs = outputs
            if self._then is not None:
                self._then()
        return outputs

    def log_probs(self, inputs: dict[str, Any], ld_alpha: float | None) -> PairLogProbs:
        """Policy and reference on a batch that carries the reference's log-probs. # (B,) each"""
        return _log_probs(self.outputs, inputs["completion_mask"], inputs, ld_alpha)

    @property
    def has_graph(self) -> bool:
        """Whether the outputs have their graph."""
        return getattr(self._model, "graph", True)

    def log_probs_again(self, keep: torch.Tensor, inputs: dict[str, Any], ld_alpha: float | None) -> PairLogProbs:
        """As `log_probs`, of some pairs that are run once more, with a graph. # keep (B,) bool -> (b,) each"""
        reference = {name: inputs[name][keep] for name in REFERENCE_COLUMNS}
        mask = inputs["completion_mask"][keep.repeat(2)]
        return _log_probs(self._model.again(keep), mask, reference, ld_alpha)


def _log_probs(
    outputs: Any, mask: torch.Tensor, reference: dict[str, torch.Tensor], ld_alpha: float | None
) -> PairLogProbs:
    policy = sequence_logps(outputs.log_probs, mask, ld_alpha)
    return PairLogProbs(*policy, *(reference[name] for name in REFERENCE_COLUMNS), *mask.sum(dim=1).chunk(2))


def _beside(outputs: Any, device: torch.device) -> Any:
    """Outputs on the batch's device: where a model is spread over devices, TRL's head leaves them on its own, and its loss does not
    expect that."""
    log_probs = getattr(outputs, "log_probs", None)  # which a call for logits does not have
    if log_probs is None or log_probs.device == device:
        return outputs
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in outputs.items()}
    return type(outputs)(**moved)


def mark_repeats(batches: list[dict[str, Any]], accelerator: Accelerator, epoch_pairs: int | None) -> list[int]:
    """Mark the repeats in the micro-batches of an optimizer step on several processes.

    Where the last pairs do not fill a micro-batch of every process, Accelerate (`even_batches`) repeats the epoch's first ones.
    They run, because every process has to, but they do not count: then a step is that of one process with the same pairs.

    Args:
        batches (`list[dict]`): This process's micro-batches of 2B rows each, chosen ones first.
        accelerator (`Accelerator`): Knows whether the epoch ends with them.
        epoch_pairs (`int`, *optional*): Pairs of an epoch; `None` if no batch is incomplete or nobody knows.

    Returns:
        `list[int]`: Of each micro-batch, the pairs that count on all processes together. # (M,)
    """
    processes = accelerator.num_processes
    sizes = [len(batch["input_ids"]) // 2 for batch in batches]
    rounds = [size * processes for size in sizes]
    if processes > 1 and batches and epoch_pairs is not None and accelerator.gradient_state.end_of_dataloader:
        rest = epoch_pairs % rounds[-1]
        if rest:
            own = min(max(rest - accelerator.process_index * sizes[-1], 0), sizes[-1])
            batches[-1][COUNTED] = (own, rest)
            rounds[-1] = rest
    return rounds


@torch.no_grad()
def broken_on_plain_path(trainer: DPOTrainer, model: torch.nn.Module, batches: list[dict[str, Any]]) -> dict[str, int]:
    """The pairs of an optimizer step that have no finite loss by themselves, on the plain path, by task: in a packed row, a NaN
    reaches its neighbours. Every process has to call this.

    Args:
        trainer (`DPOTrainer`): An [`AMATrainer`], which tells tasks apart.
        model (`torch.nn.Module`): As `training_step` was given it.
        batches (`list[dict]`): The step's micro-batches on this process.
    """
    counts = torch.zeros(len(trainer.task_names), device=trainer.accelerator.device)
    config = PreferenceLossConfig.of_pairs(trainer.args)
    mode, trainer.prefix_sharing.mode = trainer.prefix_sharing.mode, False
    try:
        for batch in batches:
            inputs = dict(trainer._prepare_inputs(batch))
            tasks = trainer.tasks_of(inputs)
            own, _ = inputs.pop(COUNTED, (len(tasks), None))
            inputs = trainer.with_reference(inputs)
            ours = ("completion_mask", TASK_COLUMN, *LOGP_COLUMNS)
            kwargs = {key: value for key, value in inputs.items() if key not in ours}
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            forward = RecordedForward(model)
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                forward(**kwargs, labels=labels, use_cache=False, fused_lm_head=True)
            losses = pair_losses(forward.log_probs(inputs, trainer.ld_alpha), config)[:own]
            counts += torch.bincount(tasks[:own][~losses.isfinite()], minlength=len(counts))
    finally:
        trainer.prefix_sharing.mode = mode
    counts = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    return {task: int(count) for task, count in zip(trainer.task_names, counts, strict=True) if count}
