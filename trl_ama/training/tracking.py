"""Trackers: every stage of the pipeline is a run of its own, although all stages share one process.

transformers' callbacks keep one Weights & Biases run per process, so the steps of the stages would overlap in it. Here
each stage gets its own run, named after it, and the run is finished with the stage. No tracker is imported that the
trainer's own callbacks have not imported already.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


# What ends the runs of the stage that is open; each takes an exit code. One list, as the trackers' runs are global too
_finishers: list[Callable[[int], None]] = []


def begin_runs(trainer: Trainer, folder: Path) -> None:
    """Prepare a stage's tracker runs: name them, and keep those that are open already out of their way.

    Args:
        trainer ([`~transformers.Trainer`]): The stage's trainer, before `train`. Its `args.run_name` is set.
        folder (`Path`): The stage's folder, `<output folder>/<kind>s/<name>`.
    """
    finish_runs(exit_code=1)  # of a stage that failed after its training
    group = trainer.args.run_name or folder.resolve().parents[1].name
    kind = folder.parent.name.removesuffix("s")
    name = f"{group}-{kind}-{folder.name}"  # no slash: it would be refused in names of W&B artifacts
    callbacks = trainer.callback_handler.callbacks
    if trainer.args.run_name is None and any(isinstance(callback, TrackioCallback) for callback in callbacks):
        # Trackio goes on with an old run of the same name. That may be of another folder of this name, so it happens
        # only under a name that the user chose
        name += f"-{datetime.now():%Y%m%d-%H%M%S}"
    trainer.args.run_name = name
    if not trainer.is_world_process_zero():
        return
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            _begin_tensorboard(callback, name)
        elif isinstance(callback, WandbCallback):
            _begin_wandb(name, group, kind)
        elif isinstance(callback, TrackioCallback):
            _begin_trackio()


def finish_runs(exit_code: int = 0) -> None:
    """Finish what `begin_runs` and the training after it have opened, and only that."""
    while _finishers:
        _finishers.pop()(exit_code)


def _begin_tensorboard(callback: TensorBoardCallback, name: str) -> None:
    # By default a run goes to the stage's own folder; TENSORBOARD_LOGGING_DIR is one folder for all
    if callback.logging_dir is not None:
        callback.logging_dir = os.path.join(callback.logging_dir, name)

    def finish(exit_code: int) -> None:
        if callback.tb_writer is not None:  # an evaluation after the training opens one anew
            callback.tb_writer.close()
            callback.tb_writer = None

    _finishers.append(finish)


def _begin_wandb(name: str, group: str, kind: str) -> None:
    wandb = sys.modules["wandb"]
    if wandb.run is not None or "WANDB_RUN_ID" in os.environ:
        warnings.warn(
            "A Weights & Biases run was opened or chosen (WANDB_RUN_ID) before this training, so every stage logs into "
            "it, and their steps overlap. For one run per stage, call wandb.finish() first and unset WANDB_RUN_ID.",
            UserWarning,
            stacklevel=4,
        )
        return
    # The callback takes a run that is open; its own `init` knows no group
    wandb.init(
        project=os.getenv("WANDB_PROJECT", "huggingface"),
        name=name,
        group=os.getenv("WANDB_RUN_GROUP", group),
        job_type=os.getenv("WANDB_JOB_TYPE", kind),
    )
    _finishers.append(lambda exit_code: wandb.finish(exit_code=exit_code))


def _begin_trackio() -> None:
    # `trackio.init` finishes the run that is current, so the user's is put aside and becomes current again afterwards
    trackio = sys.modules["trackio"]
    variables = [value for value in vars(trackio.context_vars).values() if isinstance(value, ContextVar)]
    before = {variable: variable.get() for variable in variables}
    config = trackio.config
    trackio.context_vars.current_run.set(None)

    def finish(exit_code: int) -> None:
        if trackio.context_vars.current_run.get() is not None:  # an evaluation after the training opens it anew
            trackio.finish()
        for variable, value in before.items():
            variable.set(value)
        trackio.config = config

    _finishers.append(finish)
