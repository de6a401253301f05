"""A trainer whose checkpoints are whole, and from which a training goes on as if it had not stopped; also when a signal asks to leave.

That is, where the kernels are deterministic, to the same bits: on a CPU, and on a GPU with `full_determinism`.

The Trainer restores weights, optimizer, scheduler, random numbers, log and position in the data. What it does not, `training/progress.py`
restores, and here what the end of an epoch still has to do.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from ..common import interruption
from ..common.errors import AMAError, first_line
from .checkpoints import (
    begin_checkpoint,
    complete_checkpoint,
    could_not_write,
    damage_of,
    newest_good_checkpoint,
    remove_checkpoint,
    remove_halves,
    rotate,
)
from .progress import KEY, ResumedProgress


logger = get_logger(__name__)


class _CheckpointFlow(TrainerCallback):
    """When checkpoints are written. Comes after the Trainer's own callbacks, so that it sees what they decided."""

    def __init__(self, trainer: "ExactResume"):
        self._trainer = trainer
        self._due = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._due = False
        self._trainer.progress.restore()

    def on_step_end(self, args, state, control, **kwargs):
        if self._trainer._handles_signals and interruption.asked(self._trainer.accelerator):
            self._trainer._leaving = True
            if args.save_strategy == SaveStrategy.NO:
                self._trainer._leave("save_strategy is 'no'")
            if not self._trainer.may_save():
                self._trainer._leave("the policy gives no finite numbers there")
            if not control.should_save and args.save_strategy != SaveStrategy.BEST:
                self._trainer.progress.only_for_a_signal.add(state.global_step)
            control.should_save = True
        # Where the end of an epoch evaluates or logs, what is saved before would have to do that when it is resumed
        ends = control.should_training_stop or float(state.epoch).is_integer()
        strategies = (args.eval_strategy, args.logging_strategy, args.save_strategy)
        if control.should_save and ends and any(strategy == IntervalStrategy.EPOCH for strategy in strategies):
            control.should_save, self._due = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:  # without a signal too
            self._trainer.progress.only_for_a_signal.discard(state.global_step)
        if self._due:
            control.should_save, self._due = True, False


class ExactResume:
    """
    A part of a trainer of TRL's: checkpoints that are whole, exact resuming, and leaving on SIGTERM and Ctrl-C.

    Attributes:
        stage_name (`str`, *optional*): What is trained, for messages; `None` in a script of the user's own.
        progress ([`ResumedProgress`]): What is kept in a checkpoint beside the Trainer's own state.
        exact_draws (`bool`): Whether a run may only be resumed if its draws can go on.
        in_place_of (`str`): Who goes on with other draws then, for a message.

    Raises:
        AMAError: From `train`, if the checkpoint to resume from is damaged, or of other data or another batch size; or if one
            could not be written. The older ones are as they were then.
    """

    stage_name: str | None = None
    exact_draws = True
    in_place_of = "the Trainer"
    _leaving = _saving = False
    _saved_at: Path | None = None  # the last complete checkpoint of this training

    def __init__(self, *args, **kwargs):
        given = kwargs.get("args")
        if getattr(given, "enable_jit_checkpoint", False):
            # transformers' own saves in the middle of a step, when the mixture has seen the step and the weights have not
            kwargs["args"] = copy.copy(given)
            kwargs["args"].enable_jit_checkpoint = False
        self.progress = ResumedProgress(self)
        super().__init__(*args, **kwargs)
        self.add_callback(_CheckpointFlow(self))

    # ---- Resuming ----

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        checkpoint = self._checked(resume_from_checkpoint)
        self._leaving, self._saved_at = False, None
        self.progress.begin(Path(checkpoint) if isinstance(checkpoint, str) else None)
        with contextlib.ExitStack() as stack:
            if self._handles_signals:
                stack.enter_context(interruption.caught())
                stack.enter_context(interruption.finishing())
            try:
                output = super().train(checkpoint, *args, **kwargs)
            except RuntimeError as error:
                if not (interruption.asked() and "DataLoader worker" in str(error)):
                    raise
                self._leave("the processes of a data loader were ended first")
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    @property
    def _handles_signals(self) -> bool:
        return getattr(self.args, "save_on_signal", False)  # TRL's own arguments have no such field

    def _checked(self, checkpoint: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from, which is whole."""
        if not checkpoint:
            return checkpoint
        problem = None
        if self.accelerator.is_main_process:  # reads whole files, which once is enough
            try:
                checkpoint = self._newest_good() if checkpoint is True else _whole(Path(checkpoint))
                _name(remove_halves(Path(self.args.output_dir)))
            except AMAError as error:
                problem = str(error)
        checkpoint, problem = broadcast_object_list([checkpoint, problem])
        if problem is not None:
            raise AMAError(problem)
        return checkpoint

    def _newest_good(self) -> str | bool:
        folder = Path(self.args.output_dir)
        found = newest_good_checkpoint(folder, best=self.args.load_best_model_at_end, unlisted=True, exact=False)
        for path, reason in found.bad:
            logger.warning(f"The checkpoint '{path}' is not used: {reason}.")
        if found.good is None and found.bad:
            raise AMAError(
                f"None of the {len(found.bad)} checkpoints in '{folder}' can be used; of the newest, {found.bad[0][1]}. Start "
                "without resume_from_checkpoint."
            )
        return str(found.good) if found.good is not None else True  # the Trainer says that there is none

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished training; the Trainer would do one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.progress.resumed:  # eval_on_start, which is in the log already
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def draws(self) -> dict[str, Any]:
        """What decides which pairs are in which step, as JSON types; other parts may add to it."""
        args = self.args
        return {
            "pairs_per_step": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "pairs": len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,  # not of streams
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def log(self, logs, start_time=None):
        if self.progress.resumed and "train_loss" in logs:
            logs["train_loss"] = self.progress.mean_loss()
        super().log(logs, start_time)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        reason = damage_of(best) if self.args.should_save else None
        if reason is not None:
            raise AMAError(
                f"The best checkpoint '{best}' cannot be used: {reason}. Run again, which goes on from a checkpoint before it, or "
                "turn load_best_model_at_end off."
            )
        super()._load_best_model()

    # ---- Saving ----

    def may_save(self) -> bool:
        """Whether a checkpoint of now is worth having: if no part below says otherwise."""
        below = getattr(super(), "may_save", None)
        return below is None or below()

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self._saved_at, self._saving = self.args.save_total_limit, None, True
        try:
            if self.args.should_save:
                remove_checkpoint(folder)  # of an earlier training, or incomplete
                begin_checkpoint(folder)
            self.state.stateful_callbacks[KEY] = self.progress.state_dict()  # all processes meet here, and then write
            with self._unwanted_best_hidden():
                super()._save_checkpoint(model, trial)
            self._complete(folder)
        except Exception as error:
            if self._saved_at == folder or not could_not_write(error):
                raise
            raise self._not_saved(folder, error) from error
        finally:
            self.args.save_total_limit, self._saving = limit, False
        if self.args.should_save:
            _name(rotate(folder.parent, limit, self.state.best_model_checkpoint))

    @contextlib.contextmanager
    def _unwanted_best_hidden(self) -> Iterator[None]:
        """The Trainer takes the folder of the best step for the best checkpoint, if there is one, whyever it was saved."""
        best = self.state.best_global_step
        if best in self.progress.only_for_a_signal:
            self.state.best_global_step = None
        try:
            yield
        finally:
            self.state.best_global_step = best

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self._saving:  # for the rest of `_save_checkpoint`: no older one goes before the new one is complete
            self.args.save_total_limit = None

    def _push_from_checkpoint(self, checkpoint_folder):
        self._complete(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _complete(self, folder: Path) -> None:
        if self._saved_at == folder:
            return
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            lacks = None
            if self.args.save_only_model:
                lacks = "the optimizer's state (save_only_model)"
            elif self.args.sync_ref_model:
                lacks = "the reference model, which sync_ref_model moves"
            complete_checkpoint(folder, lacks)
        # A process that leaves earlier makes a launcher stop the one that still writes
        self.accelerator.wait_for_everyone()
        self._saved_at = folder

    def _not_saved(self, folder: Path, error: Exception) -> AMAError:
        remove_checkpoint(folder)
        good = newest_good_checkpoint(folder.parent, unlisted=True, exact=False, by_size=True).good
        kept = f"'{good.name}' is intact" if good is not None else "There is no earlier one"
        return AMAError(
            f"The checkpoint '{folder}' could not be written ({first_line(error)}). {kept}: make room on the disk, and run again to go "
            f"on from {'there' if good is not None else 'the start'}."
        )

    # ---- Leaving ----

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        step_is_over = not any(
            callback._due for callback in self.callback_handler.callbacks if isinstance(callback, _CheckpointFlow)
        )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self._leaving and step_is_over:
            if self._saved_at is None or self._saved_at.name != f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
                self._save_checkpoint(model, trial)  # save_strategy="best" saves only what is
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._leave()

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self._handles_signals and getattr(loader, "num_workers", 0):
            loader.worker_init_fn = interruption.OutlivingWorker(loader.worker_init_fn)
        return loader

    def _leave(self, unsaved_because: str | None = None) -> None:
        step, what, checkpoint = self.state.global_step, self.stage_name, self._saved_at
        if unsaved_because is not None:
            done = f"step {step}{f' of {what}' if what else ''} is not saved, as {unsaved_because}"
            interruption.leave(
                done, interruption.AGAIN if what else "Training goes on from the checkpoint before, if any."
            )
        elif what:
            interruption.leave(f"saved at step {step} of {what}")
        else:
            interruption.leave(
                f"saved at step {step} in '{checkpoint}'", "Go on with `trainer.train(resume_from_checkpoint=True)`."
            )


def _name(halves: list[tuple[Path, str]]) -> None:
    for path, reason in halves:
        logger.warning(f"The checkpoint '{path}' is not used and is removed: {reason}.")


def _whole(checkpoint: Path) -> str:
    reason = damage_of(checkpoint)
    if reason is None:
        return str(checkpoint)
    good = newest_good_checkpoint(checkpoint.parent, unlisted=True, exact=False).good
    fix = f"Resume from '{good}'" if good is not None else "Start without resume_from_checkpoint"
    raise AMAError(f"The checkpoint '{checkpoint}' cannot be used: {reason}. {fix}.")
