"""What the Trainer keeps beside its state, in a checkpoint: without it, a resumed run would log and draw otherwise."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from .checkpoints import best_of
from .errors import AMAError
from .versions import VERSIONS, check_version


logger = get_logger(__name__)

KEY = "ama_progress"  # in trainer_state.json's `stateful_callbacks`


class ResumedProgress:
    """
    A mixin for a Trainer: the losses and figures since the last log entry, the mean loss and the tokens of the whole run, what
    decides the draws, and which checkpoint is the best one.
    """

    _resumed = False
    _exact_draws = True  # whether a run may only be resumed if its draws can go on
    _resumed_from: Path | None = None
    # Steps whose checkpoints an undisturbed run would not have: none of them may become the best one
    _only_for_a_signal: set[int]

    def _progress(self) -> dict[str, Any]:
        """What the Trainer keeps beside its state, as JSON types."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1))  # one of each process
        return {
            "version": VERSIONS[KEY],
            **self._draws(),
            "only_for_a_signal": sorted(self._only_for_a_signal),
            "best_global_step": self.state.best_global_step,
            "losses": losses.tolist(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "figures": {name: list(values) for name, values in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
            "training": self.model.training,  # decides which figures the next log entry has
        }

    def _draws(self) -> dict[str, Any]:
        """What decides which pairs are in which step."""
        args = self.args
        return {
            "pairs_per_step": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "pairs": len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,  # not of streams
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def _restore_progress(self) -> None:
        """After the Trainer has read a checkpoint's state, and before its first step."""
        state, args = self.state, self.args
        self._resumed = state.global_step > 0
        saved = state.stateful_callbacks.get(KEY)
        if not self._resumed or not isinstance(saved, dict):  # a new training, or a checkpoint of an older version
            return
        check_version(KEY, saved, "resume with the trl-ama that wrote the checkpoint, or start a new output_dir")
        if not args.ignore_data_skip:  # with which a user says that the draws need not go on
            self._check_draws(saved)
        losses = saved["losses"]
        ours = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        self._tr_loss.fill_(ours)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in saved["figures"].items()})
        self._total_train_tokens = saved["tokens"]
        self.model.train(saved["training"])
        self._only_for_a_signal = set(saved.get("only_for_a_signal", ()))
        state.best_global_step = saved.get("best_global_step", state.best_global_step)
        best = best_of(self._resumed_from) if self._resumed_from is not None else None
        if state.best_model_checkpoint is None and best is not None and best.is_dir():
            state.best_model_checkpoint = str(best)  # the folder has moved since

    def _check_draws(self, saved: dict[str, Any]) -> None:
        names = {
            "pairs_per_step": "pairs per optimizer step",
            "pairs": "number of training pairs",
            "seed": "seed",
            "read_ahead": "micro-batches that data loaders read ahead, and micro-batches of a step,",
        }
        ours = self._draws()
        for field, name in names.items():
            if field == "pairs" and None in (saved[field], ours[field]):
                continue
            if field in ours and field in saved and saved[field] != ours[field]:
                differs = f"The checkpoint was written with {name} {saved[field]}, this run has {ours[field]}, so its draws cannot be continued"
                if self._exact_draws:
                    raise AMAError(f"{differs}. Resume with the same settings and data, or start a new output_dir.")
                logger.warning(
                    f"{differs}: as with DPOTrainer, some pairs of this epoch may be trained on twice, and others not at all."
                )

    def log(self, logs, start_time=None):
        if self._resumed and "train_loss" in logs:  # the Trainer's is the mean since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)
