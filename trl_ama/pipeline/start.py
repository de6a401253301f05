"""What a run says before it trains anything: what is wrong with its recipe, what it will do, and what it found done."""

import warnings
from collections.abc import Sequence

from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy

from ..common.errors import AMAError
from ..dpo.checks import check_arguments
from ..dpo.losses import check_loss_types
from ..dpo.precision import check_full_fp16
from ..policies.checks import check_policy_source
from ..policies.quantized import check_optimizer, check_quantization
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.settings import RunSettings
from ..sampling.mixture import strategy_for
from ..tasks.account import account_lines
from ..tasks.loading import prompt_fits_into
from ..tasks.template_date import asks_for_the_day
from .generalists import generalist_stage
from .image_checks import check_images
from .run_losses import reference_losses_done, reference_losses_of
from .specialists import require_specialists, specialist_stage


STAGES = ("specialists", "losses", "train", "eval")


def check_recipe(settings: RunSettings, stages: Sequence[str] = STAGES) -> None:
    """Find what is wrong with a recipe before anything is trained."""
    recipe, inputs = settings.recipe, settings.inputs
    if asks_for_the_day(inputs.processor) and PartialState().is_main_process:
        warnings.warn(
            f"The chat template of '{recipe.model_name}' writes today's date into every prompt, so reference losses of one day "
            "are not quite those of the next. Fix it with `template_date: 2025-07-08` (any day) in the recipe.",
            UserWarning,
            stacklevel=2,
        )
    # Reference losses are compared pair by pair, whatever the mixing
    check_loss_types(recipe.training_args.loss_type, recipe.training_args.label_smoothing)
    check_images(recipe, inputs)
    check_quantization(recipe.quantization_config(), recipe.uses_peft)
    _check_optimizers(recipe, inputs, stages)
    # One task is no mixture, but its specialist and losses can be made, to be added to those of others
    mixes = len(recipe.task_names) > 1 or bool({"train", "eval"} & set(stages))
    for strategy in recipe.strategies if mixes else ():
        args = recipe.with_arguments(mixing=strategy)
        built = strategy_for(inputs.data["train"], recipe.task_names, **args.mixing_options)
        check_arguments(args, built, True)
    for task in recipe.task_args.tasks:
        args = recipe.specialist_arguments(task)
        check_loss_types(args.loss_type, args.label_smoothing)
        max_length = args.max_length
        if max_length is not None and args.truncation_mode == "keep_start":  # DPOTrainer drops no pair otherwise
            fits = prompt_fits_into(inputs.processor, max_length)
            pairs = inputs.pairs_of(task.task, "train")
            if not any(map(fits, pairs)):
                raise AMAError(
                    f"The prompts of all {len(pairs)} pairs of task '{task.task}' fill max_length ({max_length}) alone. Raise "
                    "max_length, or remove the task."
                )
    for task, source in recipe.external_specialists.items():
        check_policy_source(
            recipe.model_name,
            f"the specialist of task '{task}'",
            source,
            base_revision=recipe.model_args.model_revision,
            trust_remote_code=recipe.training_args.trust_remote_code,
        )
    args = recipe.training_args
    if args.resume_from_checkpoint is not None:
        raise AMAError(
            f"resume_from_checkpoint is '{args.resume_from_checkpoint}', but `trl ama` finds by itself where each stage was "
            f"stopped, in '{settings.folder.path}'. Leave it out."
        )
    if args.eval_strategy != IntervalStrategy.NO and "test" not in inputs.data:
        raise AMAError(
            f"eval_strategy is '{args.eval_strategy.value}', but no task has held-out pairs. Set `eval_split` of the tasks "
            'or `test_split_size`, or eval_strategy: "no".'
        )


def _check_optimizers(recipe: Recipe, inputs: RunInputs, stages: Sequence[str]) -> None:
    """Every optimizer that a stage of this run is going to use, once."""
    used = []
    if "specialists" in stages:
        chosen = [task for task in recipe.task_args.tasks if task.task in recipe.chosen_tasks]
        tasks = [task for task in chosen if inputs.needs_specialist(task.task)]
        used += [recipe.specialist_arguments(task) for task in tasks]
    if "train" in stages:
        used.append(recipe.training_args)
    for args in used:
        check_full_fp16(args, args.model_init_kwargs["dtype"], not recipe.uses_peft)
    for args in {(str(args.optim), str(args.optim_args)): args for args in used}.values():
        check_optimizer(args)


def describe_plan(settings: RunSettings, stages: Sequence[str]) -> list[str]:
    """What the run will do and what it found done, a line each.

    Raises:
        AMAError: If something that is there was made by other settings.
    """
    recipe, inputs = settings.recipe, settings.inputs
    counts = {split: len(part) for split, part in inputs.data.items()}
    lines = [
        f"AutoMixAlign in '{settings.folder.path}': {len(recipe.task_names)} tasks, {counts['train']} training pairs, "
        f"{counts.get('test', 0)} held out; base model {recipe.model_name}"
    ]
    lines += [f"  rows read         {task:<14} {found}" for task, found in account_lines(inputs.row_accounts)]
    if "specialists" in stages or "losses" in stages:
        for task in recipe.chosen_tasks:
            if task in recipe.external_specialists:
                state = f"from {recipe.external_specialists[task]}"
            elif task in inputs.shared_tasks:
                state = "not needed"
            else:
                stage = specialist_stage(settings, task)
                stage.check()
                state = stage.state
            lines.append(f"  specialist        {task:<14} {state}")
    losses_there = False
    if set(stages) & {"losses", "train", "eval"}:
        done = {task: reference_losses_done(settings, task) for task in recipe.chosen_tasks}
        losses_there = all(done.values())
        if not losses_there and "losses" not in stages:  # these stages cannot do without, and say what is missing
            require_specialists(settings)
            reference_losses_of(settings)
        lines += [
            f"  reference losses  {task:<14} "
            + (f"from {inputs.shared_losses.source}" if task in inputs.shared_tasks else "done" if there else "to do")
            for task, there in done.items()
        ]
    if "train" in stages or "eval" in stages:
        states = dict.fromkeys(recipe.strategies, "to do")
        if losses_there:
            for strategy in states:
                stage = generalist_stage(settings, strategy)
                stage.check()
                states[strategy] = stage.state
        lines += [f"  generalist        {strategy:<14} {state}" for strategy, state in states.items()]
        missing = [strategy for strategy, state in states.items() if state != "done"]
        if missing and "train" not in stages:
            raise AMAError(
                f"The generalist '{missing[0]}' is not there to be evaluated ('{settings.folder.generalist(missing[0])}'); found "
                f"{[strategy for strategy in states if strategy not in missing]}. Run `trl ama --config …` first, or leave it "
                "out of `mixing` and `compare`."
            )
    if "eval" in stages:
        lines.append(
            "  evaluation        held-out pairs of every task"
            if "test" in inputs.data
            else "  evaluation        none: no task has held-out pairs (set `eval_split`, or `test_split_size: 0.1` for all)"
        )
    return lines
