"""One DPO adapter (or full model) per task, from the same start, by TRL's `DPOTrainer` on the fast path."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from accelerate.utils import release_memory
from transformers import set_seed
from trl import DPOTrainer

from ..common.errors import AMAError
from ..common.processes import from_main
from ..dpo.losses import PairLogProbs, PreferenceLossConfig, pair_losses, untrained_loss
from ..dpo.pair_trainer import SpecialistTrainer
from ..dpo.scoring import score_pairs
from ..metrics import task_metrics
from ..policies.switching import reference_policy
from ..recipe.fingerprint import specialist_fingerprint
from ..recipe.settings import RunSettings
from ..training.stage import TrainingStage
from .specialist_card import write_specialist_card


def specialist_stage(settings: RunSettings, task: str) -> TrainingStage:
    """The stage that trains a task's specialist."""
    fingerprint = specialist_fingerprint(settings.recipe, settings.inputs, task)
    folder = settings.folder.specialist(task)
    reuse = (
        "To keep this specialist while the generalist changes, set its old value in `specialist_args`, or choose another output_dir "
        f"and name it there: `specialists: {{{task}: {folder}}}`."
    )
    return TrainingStage(folder, f"The specialist of task '{task}'", fingerprint, reuse)


def train_specialist(settings: RunSettings, task: str) -> dict[str, float]:
    """Train a task's specialist, unless it is finished already, and hold it against the base on held-out pairs.

    Returns:
        `dict` of `steps`, `train_loss` and, with held-out pairs, `eval_loss`, `eval_accuracy`, `eval_margin`, `eval_pairs`
        and `base_loss`.

    Raises:
        AMAError: If the folder holds a specialist that other settings made.
    """
    stage = specialist_stage(settings, task)
    stage.check()
    done = from_main(lambda: stage.result)  # of one opinion, whatever a network filesystem shows the others by now
    if done is not None:
        return done
    recipe, inputs = settings.recipe, settings.inputs
    args = recipe.specialist_arguments(recipe.task(task))
    held_out = inputs.pairs_of(task, "test")
    set_seed(args.seed)  # fresh adapters are drawn here, whatever was or was not done before in this process
    trainer = SpecialistTrainer(
        model=recipe.model_name,
        args=args,
        train_dataset=inputs.pairs_of(task, "train").remove_columns("task"),
        eval_dataset=None if held_out is None else held_out.remove_columns("task"),
        processing_class=inputs.processing_class,
        quantization_config=recipe.quantization_config(),
        peft_config=inputs.peft_config(),
    )
    trainer.what = stage.what
    if len(trainer.train_dataset) == 0:
        raise AMAError(
            f"All pairs of task '{task}' were dropped, because their prompts alone fill max_length ({args.max_length}). "
            "Raise max_length, or remove the task."
        )
    stage.train(trainer)
    inputs.restore_template(stage.folder)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"steps": trainer.state.global_step, "train_loss": history[-1] if history else None}
    if held_out is not None and len(trainer.eval_dataset):
        result |= _held_out_figures(trainer, task)
        if not math.isfinite(result["eval_loss"]):
            raise AMAError(
                f"{stage.what} has diverged: its loss on held-out pairs is {result['eval_loss']}. Delete '{stage.folder}' and train it with a "
                "lower learning_rate (specialist_args), or look at its pairs with `trl ama-check`."
            )
    if trainer.accelerator.is_main_process:
        write_specialist_card(settings, task, result)
    stage.finish(result)
    del trainer
    release_memory()
    return result


def _held_out_figures(trainer: DPOTrainer, task: str) -> dict[str, float]:
    """Means over held-out pairs; the Trainer's own evaluation would give means over batches, and no pair to a tie."""
    pairs, config = trainer.eval_dataset, PreferenceLossConfig.from_args(trainer.args)
    with reference_policy(trainer) as model:
        base = score_pairs(trainer, model, pairs, f"{task}, held out: base")
    own = score_pairs(trainer, trainer.model, pairs, f"{task}, held out: specialist")
    columns = [own["chosen_logps"], own["rejected_logps"], base["chosen_logps"], base["rejected_logps"]]
    logps = PairLogProbs(*map(torch.as_tensor, [*columns, own["chosen_tokens"], own["rejected_tokens"]]))
    losses = pair_losses(logps, config).numpy()
    margins = (config.beta * (logps.chosen_logratios - logps.rejected_logratios)).numpy()
    figures = task_metrics(np.zeros(len(pairs), dtype=int), losses, margins, None, [task])[task]
    result = {f"eval_{key}": figures[key] for key in ("loss", "accuracy", "margin", "pairs")}
    trainer.log(dict(result))
    return {**result, "base_loss": untrained_loss(config)}


def quality_warning(task: str, result: dict[str, float]) -> str | None:
    """What to tell the user about a specialist that does not beat the base on its own held-out pairs; `None` if it does.

    The base has the loss of an untrained policy and gets half of the pairs right. "Beats" means a lower loss and an
    accuracy more than one standard error above ½.
    """
    if "eval_loss" not in result:
        return None
    loss, base, accuracy = result["eval_loss"], result["base_loss"], result["eval_accuracy"]
    error = math.sqrt(0.25 / result["eval_pairs"])
    if loss < base and accuracy > 0.5 + error:
        return None
    beyond = " beyond chance" if loss < base and accuracy > 0.5 else ""
    return (
        f"The specialist of task '{task}' does not beat the base model on its own {result['eval_pairs']} held-out pairs{beyond}: "
        f"loss {loss:.3f} against {base:.3f}, accuracy {accuracy:.2f} against 0.50 ± {error:.2f}. Its reference losses are "
        "then no target worth reaching. Train it longer or with a higher learning_rate (specialist_args), hold out more "
        "pairs, or look at the data."
    )


def train_specialists(
    settings: RunSettings, done: Callable[[str, dict[str, float]], None] | None = None
) -> dict[str, dict[str, float]]:
    """Train the specialists of the chosen tasks that need one.

    Args:
        settings ([`RunSettings`]): The run.
        done (`Callable`, *optional*): Called with each task and its specialist's figures, as soon as it is there.

    Returns:
        Task → the specialist's figures.
    """
    results = {}
    for task in settings.recipe.chosen_tasks:
        if not settings.inputs.needs_specialist(task):
            continue
        results[task] = train_specialist(settings, task)
        if done is not None:
            done(task, results[task])
        message = quality_warning(task, results[task])
        if message is not None:
            warnings.warn(message, UserWarning, stacklevel=2)
    return results


def require_specialists(settings: RunSettings) -> None:
    """Raise an `AMAError` that names the chosen tasks whose specialist is missing."""
    there = [
        task
        for task in settings.recipe.chosen_tasks
        if not settings.inputs.needs_specialist(task) or specialist_stage(settings, task).result is not None
    ]
    missing = [task for task in settings.recipe.chosen_tasks if task not in there]
    if missing:
        also = f" (nor have {missing[1:]})" if len(missing) > 1 else ""
        raise AMAError(
            f"Task '{missing[0]}' has no specialist in '{settings.folder.specialist(missing[0])}'{also}; found {there}. Run "
            "`trl ama-specialists --config …` first, or name one with `specialist:` in the task."
        )
