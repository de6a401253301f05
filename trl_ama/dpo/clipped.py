"""Pairs that `excess_clip="pair"` has clipped send no gradient: where it is cheaper, only the others run backward.

The whole batch then runs forward without a graph, for losses, metrics and the mixture, and the pairs that send a gradient run
once more, with one. Which pairs these are, and what the loss is, the first pass says; the second only has the gradient.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.logging import get_logger
from trl import DPOTrainer

from ..common.processes import is_sharded
from .losses import pair_losses
from .pair_batches import RecordedForward


logger = get_logger(__name__)

# Shares of clipped pairs above which two passes are cheaper (docs/speed.md; the first two are measured): by whether there is gradient
# checkpointing, and several processes, which wait for the one that has most pairs left
PAYS_ABOVE = {(False, False): 0.6, (True, False): 0.1, (False, True): 0.75, (True, True): 0.6}
_WHOLE_STEPS = 2  # optimizer steps that several processes begin with


class ClippedPairs:
    """Decides, for each micro-batch of a training, whether clipped pairs are left out of the backward pass.

    The decision is a function of the settings and of the mixture's state, so all processes decide alike, and so does a run that
    is resumed; but that several processes begin a training, a resumed one too, with steps that run whole.

    Args:
        trainer (`DPOTrainer`): An [`AMATrainer`], which has a mixture.

    Attributes:
        skipped (`int`): Pairs of all trainings that did not run backward, on this process.
    """

    def __init__(self, trainer: DPOTrainer):
        self._trainer = trainer
        self._ran_in_step = -1  # the last optimizer step in which a micro-batch ran backward
        self._whole_steps: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()  # of a model in its wrappers
        self.skipped = 0

    def pay(self, model: torch.nn.Module) -> bool:
        """Whether the next micro-batch runs in two passes."""
        trainer = self._trainer
        mode = trainer.args.skip_clipped
        if mode is False:
            return False
        # DDP rebuilds its buckets, of all processes at once, in the first pass with a graph after its first step
        if trainer.accelerator.num_processes > 1 and self._whole_steps.get(model, 0) < _WHOLE_STEPS:
            return False
        if mode == "auto":
            lately = trainer.mixture.clipped_lately
            case = (bool(trainer.args.gradient_checkpointing), trainer.accelerator.num_processes > 1)
            if lately is None or lately <= PAYS_ABOVE[case]:
                return False
        reason = self.hindrance(model)
        if reason is not None and mode is True:
            logger.warning_once(f"skip_clipped=True, but all pairs run backward: {reason}.")
        return reason is None

    def hindrance(self, model: torch.nn.Module) -> str | None:
        """Why two passes would not give the same numbers, as half a sentence; `None` if they do."""
        trainer = self._trainer
        args, strategy = trainer.args, trainer.strategy
        if strategy.objective != "excess":
            return f"mixing='{args.mixing}' descends the losses themselves, which are not clipped"
        if args.excess_clip != "pair":
            return f"with excess_clip='{args.excess_clip}' no single pair is clipped"
        if trainer.aux_loss_enabled:
            return "the router's load-balancing loss (router_aux_loss_coef) has a gradient on every pair"
        if is_sharded(trainer.accelerator):
            return "every process has to run the layers of a sharded model as often as the others"
        if getattr(args, "n_gpu", 1) > 1:
            return "DataParallel splits a batch over devices, and would split a second pass otherwise"
        if args.torch_compile:
            return "torch_compile compiles for shapes, and a second pass has another one at every step"
        sharing = trainer.prefix_sharing
        if sharing.knows_draws(model) and sharing.may_draw(model):  # the first pass finds it out
            return "training draws random numbers in the forward pass (dropout, NEFTune), and a second pass would draw others"
        return None

    def with_gradient(
        self, loss: torch.Tensor, sends: torch.Tensor, weights: torch.Tensor, forward: RecordedForward, inputs: dict
    ) -> torch.Tensor:
        """The loss of a micro-batch that ran without a graph, with its gradient.

        Args:
            loss (`torch.Tensor`): Of the whole micro-batch.
            sends (`torch.Tensor`): Which pairs send a gradient. # (B,) bool
            weights (`torch.Tensor`): What each pair's loss is multiplied by in `loss`. # (B,)
            forward ([`RecordedForward`]): What the micro-batch was run with.
            inputs (`dict`): The micro-batch, with reference log-probs.
        """
        keep = self._to_run(sends, inputs)
        self.skipped += len(keep) - int(keep.sum())
        if not keep.any():
            return loss.detach().requires_grad_()  # a backward pass that reaches no weight
        trainer = self._trainer
        again = forward.log_probs_again(keep, inputs, trainer.ld_alpha)
        # What is clipped stays so, where rounding would have it otherwise in another row
        part = (pair_losses(again, trainer.pair_loss_config) * torch.where(sends, weights, 0)[keep]).sum()
        return part + (loss - part).detach()

    def _to_run(self, sends: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Which pairs run again. # (B,) bool

        Where none has to, one does if the optimizer step would else see no gradient instead of zeros, which momentum and weight
        decay tell apart, and if other processes wait for this one's.
        """
        accelerator, step = self._trainer.accelerator, self._trainer.state.global_step
        tokens = inputs["completion_mask"][:, 1:].sum(dim=1)  # (2B,)
        scored = tokens.view(2, -1).sum(dim=0) > 0  # (B,): the others have no gradient, and nothing to run
        keep = sends & scored
        if not keep.any() and accelerator.sync_gradients:
            if accelerator.num_processes > 1 or self._ran_in_step != step:
                lengths = inputs["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0)  # (B,)
                keep[torch.where(scored, lengths, lengths.max() + 1).argmin()] = True
        if keep.any():
            self._ran_in_step = step
        return keep

    def ran_whole(self, model: torch.nn.Module) -> None:
        """Note that a micro-batch ran backward as a whole."""
        self._whole_steps[model] = self._whole_steps.get(model, 0) + int(self._trainer.accelerator.sync_gradients)
        self._ran_in_step = self._trainer.state.global_step
