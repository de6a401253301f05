"""Training on a mixture of tasks: batches drawn as a strategy says, which sees every optimizer step and is saved with the checkpoints."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..mixing import MixingStrategy
from ..sampling.mixture import Mixture


logger = get_logger(__name__)

_STATE_KEY = "ama"  # in trainer_state.json's `stateful_callbacks`


class _BeginMixing(TrainerCallback):
    def __init__(self, trainer: "MixedTraining"):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin_mixing()


class MixedTraining:
    """
    A part of a trainer of TRL's: tasks are drawn as the mixture's strategy says, and after each optimizer step the strategy sees it.

    What the step was, `compute_loss` has told `mixture.recorder`.

    Attributes:
        mixture ([`Mixture`]): Strategy, sampler, and the sums of the step under way; to be set before training.
        have_tasks (`bool`): Whether the training rows name their tasks; if not, no figures by task are logged.
        stage_name (`str`, *optional*): What of a pipeline is trained; `None` in a script of the user's own.
        broken_pairs (`tuple[dict[str, int], int]`, *optional*): Of the step that was just computed, the pairs without a finite loss, by
            task, and how many pairs there were; for [`FiniteSteps`].
    """

    mixture: Mixture
    have_tasks = True
    stage_name: str | None = None
    broken_pairs: tuple[dict[str, int], int] | None = None

    def __init__(self, *args, **kwargs):
        self._step_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)
        self.add_callback(_BeginMixing(self))

    @property
    def strategy(self) -> MixingStrategy:
        """The mixing strategy."""
        return self.mixture.strategy

    # ---- Draws ----

    @property
    def exact_draws(self) -> bool:
        """Whether a run may only be resumed if its draws can go on."""
        # Without a mixture that depends on them, the Trainer goes on with other data, too; a pipeline's stage never does
        return self.strategy.uses_own_sampler or self.stage_name is not None

    def draws(self) -> dict[str, Any]:
        """What decides which pairs are in which step, as JSON types."""
        draws = super().draws()
        if self.strategy.uses_own_sampler and type(self.strategy).observe is not MixingStrategy.observe:
            # A loader's processes draw ahead with what the mixture was then: so many steps, it depends on how a step is split
            ahead = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
            draws["read_ahead"] = [ahead, self.args.gradient_accumulation_steps] if ahead else None
        return draws

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.strategy.uses_own_sampler:
            return super()._get_train_sampler(dataset)
        return self.mixture.make_sampler(dataset, self.args, self._train_batch_size)

    # ---- The mixture's state ----

    def _begin_mixing(self) -> None:
        if self.state.global_step == 0:
            self.mixture.begin(self.state.max_steps)
        else:
            saved = self.state.stateful_callbacks.get(_STATE_KEY)
            self.mixture.resume(self.state.max_steps, saved, skips_data=not self.args.ignore_data_skip)

    def _save_checkpoint(self, model, trial):
        # Part of trainer_state.json, so a checkpoint has either both states or neither
        self.state.stateful_callbacks[_STATE_KEY] = self.mixture.state_dict()
        super()._save_checkpoint(model, trial)

    # ---- Steps ----

    def broken_by_themselves(self, model: torch.nn.Module, batches: list[dict[str, Any]]) -> dict[str, int]:
        """Asked where a step had pairs without a finite loss: which of them have none when they are computed by themselves, by task.

        Every process has to call this. Without an answer, it is those that were seen.

        Args:
            model (`torch.nn.Module`): As `training_step` was given it.
            batches (`list[dict]`): The step's micro-batches on this process.
        """
        return {}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._step_batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._step_batches, num_items

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:  # the last micro-batch of an optimizer step
            figures, warnings = self.mixture.finish_step(self.accelerator)
            broken = self.mixture.broken_pairs
            if broken:
                broken = self.broken_by_themselves(model, self._step_batches) or broken
            self.broken_pairs = (broken, self.mixture.step_pairs) if self.mixture.step_pairs else None
            if not self.have_tasks:
                return loss
            # Only where there are some: nearly always zero, it would be one more curve for every task
            figures |= {f"ama/not_finite/{task}": float(count) for task, count in broken.items()}
            for name, value in figures.items():
                self._metrics["train"][name].append(value)
            for message in warnings:
                logger.warning(message)
        return loss
