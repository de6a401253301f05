"""A trainer whose model takes no step along a gradient that is not finite.

One NaN in a batch makes every gradient NaN, the next optimizer step every weight, and the checkpoint after it replaces one
that was good. So such a step is left out: weights and optimizer stay as they were, and the run goes on. If it happens again
and again, or the weights themselves are broken, the run ends with what to do about it.
"""

import math
from pathlib import Path

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..common.errors import AMAError


logger = get_logger(__name__)

MOST_IN_A_ROW = 5  # left-out steps; a rare overflow does not meet five batches one after the other


class _NoBrokenSaves(TrainerCallback):
    """Comes after the Trainer's own callback, which says when to save."""

    def __init__(self, trainer: "FiniteSteps"):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and not self._trainer.may_save():
            control.should_save = False

    on_epoch_end = on_step_end


class FiniteSteps:
    """
    A part of a [`~transformers.Trainer`]: it leaves out the optimizer steps whose gradient is not finite.

    fp16's loss scaling does so itself, and DeepSpeed steps within the backward pass, where nothing can be left out; the run
    ends after [`trl_ama.training.finite_steps.MOST_IN_A_ROW`] steps there, too.

    Attributes:
        what (`str`): Who is trained, for messages.
        broken_pairs (`tuple[dict[str, int], int]`, *optional*): Of the step under way, where another part can tell pairs apart: those
            without a finite loss, by task, and how many there were. It is forgotten with the step.
    """

    what = "The policy"
    broken_pairs: tuple[dict[str, int], int] | None = None
    _left_out = _in_a_row = _verified_step = 0
    _gives_no_number = _may_be_one_pair = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_NoBrokenSaves(self))

    def train(self, *args, **kwargs):
        """As [`~transformers.Trainer.train`].

        Raises:
            AMAError: If several steps in a row had no finite gradient, or the policy gives no finite number at the end.
        """
        self._left_out = self._in_a_row = self._verified_step = 0
        self._gives_no_number = self._may_be_one_pair = False
        output = super().train(*args, **kwargs)
        chose_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        # A single pair in the last batch is no reason to throw away a run
        if not chose_best and not self._is_sound(but_for=self._may_be_one_pair):
            raise AMAError(self._diverged("weights or losses that are not finite at the end of the run", {}))
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        known, self.broken_pairs = self.broken_pairs, None
        broken, pairs = known or ({}, 0)
        scales = getattr(self.accelerator, "scaler", None) is not None
        if isinstance(norm, torch.Tensor):
            norm = float(norm)  # the Trainer logs it: without this, it would wait for the device once more
        if not broken and (norm is None or math.isfinite(norm) or scales):
            self._in_a_row, self._gives_no_number, self._may_be_one_pair = 0, False, False
            self._verified_step = self.state.global_step  # the weights after so many steps gave finite numbers
            return norm
        if not scales:
            for parameter in model.parameters():  # DeepSpeed's `zero_grad` is another method
                parameter.grad = None  # a parameter without a gradient is passed over: no momentum, no decay
        self._left_out += 1
        self._in_a_row += 1
        self._gives_no_number = sum(broken.values()) == pairs if known else True  # where nobody knows, the worst
        self._may_be_one_pair = not known and self._in_a_row == 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise AMAError(self._diverged(f"{_found(broken)} in {self._in_a_row} optimizer steps in a row", broken))
        # The first, second, fourth, …: what happens now and then needs no thousand lines
        if self._left_out & (self._left_out - 1) == 0:
            logger.warning(
                f"{self.what}: step {self.state.global_step + 1} had {_found(broken)}, so the policy was left as it was "
                f"({self._left_out} such steps so far). If that goes on, {self._fix(broken)}."
            )
        return norm

    def _fix(self, broken: dict[str, int]) -> str:
        # The worst of them, as the others may only have been in the same step
        pairs = f"the pairs of task '{max(broken, key=broken.get)}'" if broken else "the pairs"
        return f"lower learning_rate (it is {self.args.learning_rate:.3g}), or look at {pairs} with `trl ama-check`"

    def _diverged(self, signs: str, broken: dict[str, int]) -> str:
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        if last is None:
            left = "There is no checkpoint from before."
        elif int(last.rpartition("-")[2]) <= self._verified_step:
            left = f"The last checkpoint, '{last}', is from before and intact."
        else:
            left = f"The last checkpoint, '{last}', may be broken already: delete it before you resume."
        return f"{self.what} has diverged: {signs}. To mend it, {self._fix(broken)}. {left}"

    def _is_sound(self, but_for: bool = False) -> bool:
        """Whether the policy gave finite numbers in the last step (`but_for` that), and its weights are finite, on all processes."""
        if self._gives_no_number and not but_for:
            return False
        broken = sum(
            not torch.isfinite(_local(parameter).detach()).all()
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )
        count = torch.tensor(float(broken), device=self.accelerator.device)
        return self.accelerator.reduce(count, reduction="sum").item() == 0

    def may_save(self) -> bool:
        """Whether a checkpoint of now is worth having, which may replace an older one."""
        is_sound = self._is_sound()
        if not is_sound:
            logger.warning(
                f"{self.what}: no checkpoint is written at step {self.state.global_step}, because the policy gives no finite numbers "
                "there. Older ones stay as they are."
            )
        return is_sound


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP or ZeRO-3 has split."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def _found(broken: dict[str, int]) -> str:
    if not broken:
        return "a gradient that is not finite"
    pairs = ", ".join(f"{count} of task '{task}'" for task, count in broken.items())
    return f"pairs without a finite loss ({pairs})"
