"""Which pairs of an optimizer step have no finite loss by themselves: in a packed row, a NaN reaches its neighbours."""

from typing import TYPE_CHECKING, Any

import torch

from .preference_losses import PreferenceLossConfig, pair_losses
from .recorded_forward import RecordedForward
from .reference_columns import LOGP_COLUMNS
from .tasks import TASK_COLUMN
from .uneven_batches import COUNTED


if TYPE_CHECKING:
    from .ama_trainer import AMATrainer


@torch.no_grad()
def broken_by_themselves(
    trainer: "AMATrainer", model: torch.nn.Module, batches: list[dict[str, Any]]
) -> dict[str, int]:
    """The pairs without a finite loss on the plain path, by task; every process has to call this.

    Args:
        trainer ([`AMATrainer`]): Who trains.
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
