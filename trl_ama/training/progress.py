"""What the Trainer keeps beside its state, in a checkpoint: without it, a resumed run would log and draw otherwise."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import Trainer

from ..common.errors import AMAError
from ..common.versions import VERSIONS, check_version
from .checkpoints import best_of


logger = get_logger(__name__)

KEY = "ama_progress"  # in trainer_state.json's `stateful_callbacks`


class ResumedProgress:
    """
    The losses and figures since the last log entry, the mean loss and the tokens of the whole run, what decides the draws, and which
    checkpoint is the best one.

    Args:
        trainer ([`~transformers.Trainer`]): One of TRL's, with the part [`ExactResume`].

    Attributes:
        resumed (`bool`): Whether the training goes on from a checkpoint.
        only_for_a_signal (`set[int]`): Steps whose checkpoints an undisturbed run would not have: none of them may become the best one.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._checkpoint: Path | None = None
        self.resumed = False
        self.only_for_a_signal: set[int] = set()

    def begin(self, checkpoint: Path | None) -> None:
        """Begin a training, which may go on from a checkpoint."""
        self._checkpoint = checkpoint
        self.resumed = False
        self.only_for_a_signal.clear()

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as JSON types; every process has to call this."""
        trainer = self._trainer
        losses = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1))  # one of each process
        return {
            "version": VERSIONS[KEY],
            **trainer.draws(),
            "only_for_a_signal": sorted(self.only_for_a_signal),
            "best_global_step": trainer.state.best_global_step,
            "losses": losses.tolist(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "figures": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "tokens": trainer._total_train_tokens,
            "training": trainer.model.training,  # decides which figures the next log entry has
        }

    def restore(self) -> None:
        """After the Trainer has read a checkpoint's state, and before its first step."""
        trainer, state, args = self._trainer, self._trainer.state, self._trainer.args
        self.resumed = state.global_step > 0
        saved = state.stateful_callbacks.get(KEY)
        if not self.resumed or not isinstance(saved, dict):  # a new training, or a checkpoint of an older version
            return
        check_version(KEY, saved, "resume with the trl-ama that wrote the checkpoint, or start a new output_dir")
        if not args.ignore_data_skip:  # with which a user says that the draws need not go on
            self._check_draws(saved)
        losses = saved["losses"]
        ours = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        trainer._tr_loss.fill_(ours)
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update({name: list(values) for name, values in saved["figures"].items()})
        trainer._total_train_tokens = saved["tokens"]
        trainer.model.train(saved["training"])
        self.only_for_a_signal = set(saved.get("only_for_a_signal", ()))
        state.best_global_step = saved.get("best_global_step", state.best_global_step)
        best = best_of(self._checkpoint) if self._checkpoint is not None else None
        if state.best_model_checkpoint is None and best is not None and best.is_dir():
            state.best_model_checkpoint = str(best)  # the folder has moved since

    def _check_draws(self, saved: dict[str, Any]) -> None:
        names = {
            "pairs_per_step": "pairs per optimizer step",
            "pairs": "number of training pairs",
            "seed": "seed",
            "read_ahead": "micro-batches that data loaders read ahead, and micro-batches of a step,",
        }
        ours = self._trainer.draws()
        for field, name in names.items():
            if field == "pairs" and None in (saved[field], ours[field]):
                continue
            if field in ours and field in saved and saved[field] != ours[field]:
                differs = f"The checkpoint was written with {name} {saved[field]}, this run has {ours[field]}, so its draws cannot be continued"
                if self._trainer.exact_draws:
                    raise AMAError(f"{differs}. Resume with the same settings and data, or start a new output_dir.")
                logger.warning(
                    f"{differs}: as with {self._trainer.in_place_of}, some pairs of this epoch may be trained on twice, and others not at all."
                )

    def mean_loss(self) -> float:
        """Of the whole run; the Trainer's is the mean since it was resumed."""
        return self._trainer._total_loss_scalar / max(self._trainer.state.global_step, 0.001)
