"""The stages in order, each skipping what is there already: specialists, reference losses, generalists, evaluation."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import disable_progress_bars as disable_dataset_bars
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars
from trl import ModelConfig

from . import interruption
from .ama_config import AMAConfig
from .errors import AMAError, first_line
from .evaluation import evaluate_policies, evaluation_fingerprint
from .fingerprint import read_json, write_json
from .generalist_card import write_card
from .generalists import generalist_stage, train_generalist
from .hub import check_login, time_limit
from .length_note import length_lines
from .loss_dataset import tasks_in
from .loss_scoring import compute_reference_losses
from .pipeline_arguments import PipelineArguments
from .policy_sources import check_policy_source
from .processes import from_main, main_first
from .publishing import Publisher
from .quantized import check_optimizer, check_quantization
from .reference_losses import reference_losses_done, reference_losses_of
from .report import plot_mixture, result_table
from .run_lock import folder_held
from .run_note import leave_page
from .run_settings import RunSettings
from .safe_files import check_seal, is_full, sealed
from .specialists import require_specialists, specialist_stage, train_specialists
from .task_config import TaskMixtureConfig
from .task_loading import prompt_fits_into
from .template_date import asks_for_the_day
from .trainer_checks import check_arguments, strategy_for
from .versions import VERSIONS, check_version


STAGES = ("specialists", "losses", "train", "eval")
_MOST_LOCKS = 100  # open files; a job of more tasks holds the whole folder


def run_pipeline(
    pipeline_args: PipelineArguments,
    training_args: AMAConfig,
    model_args: ModelConfig,
    task_args: TaskMixtureConfig,
    stages: Sequence[str] = STAGES,
) -> dict[str, Any] | None:
    """Run stages of AutoMixAlign in one output folder; a stage that is done is not done again.

    Args:
        pipeline_args, training_args, model_args, task_args: The parsed recipe.
        stages (`Sequence[str]`): Of `specialists`, `losses`, `train` and `eval`.

    Returns:
        The results of the evaluation (see [`evaluate_policies`]), if it ran.

    Raises:
        AMAError: If the recipe, the data or what earlier runs left do not fit together, or `push_to_hub` is on and the token
            may not push, before anything is trained; or at the end, if a push failed. If another process runs in the output
            folder, or its disk is full.
        Interrupted: A `SystemExit` with code 75, on SIGTERM and Ctrl-C, when what was under way is saved.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise AMAError(f"Unknown stage '{unknown[0]}'; known are {list(STAGES)}.")
    if training_args.disable_tqdm:
        disable_dataset_bars()
        disable_transformers_bars()
    user = None
    if training_args.push_to_hub:  # a wrong token would fail every download too
        user = from_main(lambda: check_login(training_args.hub_token))
    with main_first():  # which downloads, tokenises and caches; the others find it
        settings = RunSettings(pipeline_args, training_args, model_args, task_args)
        given, stages = stages, _stages_of(settings, stages)
    with (
        interruption.caught(training_args.save_on_signal),
        folder_held(settings.output_dir, _tasks_alone(settings, stages)),
        _enough_room(settings),
    ):
        with main_first():
            check_recipe(settings, stages)
            plan = describe_plan(settings, stages)
        _say("\n".join(plan))
        with time_limit():
            publisher = Publisher(settings, stages, user)
            results = _run_stages(settings, publisher, stages)
        if pipeline_args.only_tasks:
            _say(_what_is_left(settings, given))
        publisher.finish()
    return results


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def _stages_of(settings: RunSettings, stages: Sequence[str]) -> Sequence[str]:
    """The stages that a run with `only_tasks` can do, of those that it was asked for."""
    if not settings.pipeline_args.only_tasks:
        return stages
    own = [stage for stage in stages if stage in ("specialists", "losses")]
    if not own:
        raise AMAError(
            f"only_tasks {settings.pipeline_args.only_tasks} chooses specialists and reference losses, but this command makes "
            "neither: generalist and evaluation are of all tasks. Leave it out."
        )
    return own


def _what_is_left(settings: RunSettings, stages: Sequence[str]) -> str:
    there = {*tasks_in(settings.losses_dir), *settings.shared_tasks}
    missing = [task for task in settings.task_names if task not in there]
    left = f"reference losses are still missing of {missing}" if missing else "all reference losses are there"
    ended = ", so there is no generalist" if "train" in stages else ""
    return (
        f"only_tasks was {settings.chosen_tasks}{ended}; {left}. `trl ama --config …` without only_tasks makes what is missing, "
        "the generalist and the page."
    )


def _tasks_alone(settings: RunSettings, stages: Sequence[str]) -> list[str] | None:
    """The tasks of a run that writes nothing but theirs, and shares its folder with others like it; `None` for any other."""
    tasks = getattr(settings.pipeline_args, "only_tasks", None)
    if not tasks:
        tasks = settings.task_names if set(stages) <= {"specialists", "losses"} else []
    return list(tasks) if 0 < len(tasks) <= _MOST_LOCKS else None


@contextlib.contextmanager
def _enough_room(settings: RunSettings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise AMAError(
            f"The disk of '{settings.output_dir}' is full ({first_line(error)}). What was finished is intact: make room, and run the "
            "same command again to go on."
        ) from error


def _run_stages(settings: RunSettings, publisher: Publisher, stages: Sequence[str]) -> dict[str, Any] | None:
    if "specialists" in stages:
        train_specialists(settings, publisher.specialist)
        _leave_page(settings, publisher)
    if "losses" in stages:
        require_specialists(settings)
        compute_reference_losses(settings)
        publisher.losses()
        _leave_page(settings, publisher)
    if "train" in stages:
        for strategy in settings.strategies:
            train_generalist(settings, strategy, publisher.generalist_id)
            _leave_page(settings, publisher)
    results = None
    if "eval" in stages:
        if "test" in settings.data:
            results = evaluate(settings, publisher.published)
        else:
            _say("No task has held-out pairs (`eval_split`, `test_split_size`), so there is nothing to evaluate on.")
    if set(stages) & {"train", "eval"}:
        if results is None and PartialState().is_main_process:
            report(settings, None, publisher.published)
        publisher.generalist()
    return results


def _leave_page(settings: RunSettings, publisher: Publisher) -> None:
    # Jobs side by side leave the page, which is of the whole run, to the one that does the rest
    if not settings.pipeline_args.only_tasks:
        leave_page(settings, publisher.published)


def check_recipe(settings: RunSettings, stages: Sequence[str] = STAGES) -> None:
    """Find what is wrong with a recipe before anything is trained."""
    if asks_for_the_day(settings.tokenizer) and PartialState().is_main_process:
        warnings.warn(
            f"The chat template of '{settings.model_name}' writes today's date into every prompt, so reference losses of one day "
            "are not quite those of the next. Fix it with `template_date: 2025-07-08` (any day) in the recipe.",
            UserWarning,
            stacklevel=2,
        )
    check_quantization(settings)
    _check_optimizers(settings, stages)
    # One task is no mixture, but its specialist and losses can be made, to be added to those of others
    mixes = len(settings.task_names) > 1 or bool({"train", "eval"} & set(stages))
    for strategy in settings.strategies if mixes else ():
        args = settings.with_arguments(mixing=strategy)
        check_arguments(args, strategy_for(args, settings.data["train"], settings.task_names), True)
    for task in settings.task_args.tasks:
        args = settings.specialist_arguments(task)
        max_length = args.max_length
        if max_length is not None and args.truncation_mode == "keep_start":  # DPOTrainer drops no pair otherwise
            fits = prompt_fits_into(settings.tokenizer, max_length)
            pairs = settings.pairs_of(task.task, "train")
            if not any(map(fits, pairs)):
                raise AMAError(
                    f"The prompts of all {len(pairs)} pairs of task '{task.task}' fill max_length ({max_length}) alone. Raise "
                    "max_length, or remove the task."
                )
    for task, source in settings.external_specialists.items():
        check_policy_source(
            settings.model_name,
            f"the specialist of task '{task}'",
            source,
            base_revision=settings.model_args.model_revision,
            trust_remote_code=settings.training_args.trust_remote_code,
        )
    args = settings.training_args
    if args.resume_from_checkpoint is not None:
        raise AMAError(
            f"resume_from_checkpoint is '{args.resume_from_checkpoint}', but `trl ama` finds by itself where each stage was "
            f"stopped, in '{settings.output_dir}'. Leave it out."
        )
    if args.eval_strategy != IntervalStrategy.NO and "test" not in settings.data:
        raise AMAError(
            f"eval_strategy is '{args.eval_strategy.value}', but no task has held-out pairs. Set `eval_split` of the tasks "
            'or `test_split_size`, or eval_strategy: "no".'
        )


def _check_optimizers(settings: RunSettings, stages: Sequence[str]) -> None:
    """Every optimizer that a stage of this run is going to use, once."""
    used = []
    if "specialists" in stages:
        chosen = [task for task in settings.task_args.tasks if task.task in settings.chosen_tasks]
        tasks = [task for task in chosen if settings.needs_specialist(task.task)]
        used += [settings.specialist_arguments(task) for task in tasks]
    if "train" in stages:
        used.append(settings.training_args)
    for args in {(str(args.optim), str(args.optim_args)): args for args in used}.values():
        check_optimizer(args)


def describe_plan(settings: RunSettings, stages: Sequence[str]) -> list[str]:
    """What the run will do and what it found done, a line each.

    Raises:
        AMAError: If something that is there was made by other settings.
    """
    counts = {split: len(part) for split, part in settings.data.items()}
    lines = [
        f"AutoMixAlign in '{settings.output_dir}': {len(settings.task_names)} tasks, {counts['train']} training pairs, "
        f"{counts.get('test', 0)} held out; base model {settings.model_name}"
    ]
    for task, dropped in settings.dropped_empty.items():
        found = " and ".join(f"{count} of {split}" for split, count in dropped.items())
        lines.append(f"  without an answer {task:<14} {found} dropped")
    lines += length_lines(settings)
    if "specialists" in stages or "losses" in stages:
        for task in settings.chosen_tasks:
            if task in settings.external_specialists:
                state = f"from {settings.external_specialists[task]}"
            elif task in settings.shared_tasks:
                state = "not needed"
            else:
                stage = specialist_stage(settings, task)
                stage.check()
                state = stage.state
            lines.append(f"  specialist        {task:<14} {state}")
    losses_there = False
    if set(stages) & {"losses", "train", "eval"}:
        done = {task: reference_losses_done(settings, task) for task in settings.chosen_tasks}
        losses_there = all(done.values())
        if not losses_there and "losses" not in stages:  # these stages cannot do without, and say what is missing
            require_specialists(settings)
            reference_losses_of(settings)
        lines += [
            f"  reference losses  {task:<14} "
            + (
                f"from {settings.shared_losses.source}"
                if task in settings.shared_tasks
                else "done"
                if there
                else "to do"
            )
            for task, there in done.items()
        ]
    if "train" in stages or "eval" in stages:
        states = dict.fromkeys(settings.strategies, "to do")
        if losses_there:
            for strategy in states:
                stage = generalist_stage(settings, strategy)
                stage.check()
                states[strategy] = stage.state
        lines += [f"  generalist        {strategy:<14} {state}" for strategy, state in states.items()]
        missing = [strategy for strategy, state in states.items() if state != "done"]
        if missing and "train" not in stages:
            raise AMAError(
                f"The generalist '{missing[0]}' is not there to be evaluated ('{settings.generalist_dir(missing[0])}'); found "
                f"{[strategy for strategy in states if strategy not in missing]}. Run `trl ama --config …` first, or leave it "
                "out of `mixing` and `compare`."
            )
    if "eval" in stages:
        lines.append(
            "  evaluation        held-out pairs of every task"
            if "test" in settings.data
            else "  evaluation        none: no task has held-out pairs (set `eval_split`, or `test_split_size: 0.1` for all)"
        )
    return lines


def evaluate(settings: RunSettings, published: dict[str, str] | None = None) -> dict[str, Any]:
    """Evaluate the generalists, unless that was done; write results, table, plot, card and page, and print the table.

    Args:
        settings ([`RunSettings`]): The run.
        published (`dict[str, str]`, *optional*): Hub ids of what the run publishes, for the card's links.
    """
    policies = {strategy: str(settings.generalist_dir(strategy)) for strategy in settings.strategies}
    made_from = evaluation_fingerprint(settings, policies)
    path = settings.output_dir / "results.json"
    results = from_main(lambda: _results_in(path))
    if results is None or results.get("made_from") != made_from:
        results = sealed(
            {"version": VERSIONS[path.name], **evaluate_policies(settings, policies), "made_from": made_from}
        )
    if not PartialState().is_main_process:
        return results
    write_json(path, results)
    report(settings, results, published or {})
    return results


def _results_in(path: Path) -> dict[str, Any] | None:
    """The results that are there; `None` if there are none, or they are damaged."""
    try:
        results = read_json(path)
        if results is None:
            return None
        if isinstance(results, dict):
            check_version(path, results, "delete it, and the generalists are evaluated again")
        known = isinstance(results, dict) and set(results) - {"version"} == {"tasks", "policies", "made_from"}
        if not known:  # as they were before they were sealed
            check_seal(results, path)
    except AMAError as error:
        if "of version" in str(error):
            raise
        warnings.warn(f"{str(error).split(' Delete it')[0]} It is made again.", UserWarning, stacklevel=2)
        return None
    return results


def report(settings: RunSettings, results: dict[str, Any] | None, published: dict[str, str]) -> None:
    """Write table, plot, card and page, and print the table.

    Args:
        settings ([`RunSettings`]): The run.
        results (`dict`, *optional*): What [`evaluate_policies`] returns; `None` if there was nothing to evaluate on.
        published (`dict[str, str]`): Hub ids of what the run publishes, for the card's links.
    """
    if results is not None:
        table = result_table(results)
        (settings.output_dir / "results.md").write_text(table, encoding="utf-8")
        print(f"\n{table}\nResults: {settings.output_dir / 'results.md'}")
    plot = settings.output_dir / "plots" / "mixture.png"
    plot_mixture(settings, plot)
    print(f"Plot:    {plot}")
    print(f"Card:    {write_card(settings, results, plot, published)}")
    print(f"Page:    {leave_page(settings, published)}")
