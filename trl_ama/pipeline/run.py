"""The stages in order, each skipping what is there already: specialists, reference losses, generalists, evaluation."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import disable_progress_bars as disable_dataset_bars
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars
from trl import ModelConfig

from ..common import interruption
from ..common.errors import AMAError, first_line
from ..common.files import check_seal, is_full, read_json, sealed, write_json
from ..common.hub import check_login, time_limit
from ..common.processes import from_main, main_first
from ..common.run_folder import RunFolder
from ..common.versions import VERSIONS, check_version
from ..dpo.config import AMAConfig
from ..recipe.arguments import PipelineArguments
from ..recipe.fingerprint import evaluation_fingerprint
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.rehearsal import rehearse_stages
from ..recipe.settings import RunSettings
from ..reference_losses.files import tasks_in
from ..report.results import plot_mixture, result_table
from ..tasks.config import TaskMixtureConfig
from .cards import write_card
from .evaluation import evaluate_policies
from .generalists import train_generalist
from .length_note import length_lines
from .lock import folder_held
from .losses import compute_reference_losses
from .note import leave_page
from .publishing import Publisher
from .run_losses import reference_losses_of
from .specialists import require_specialists, train_specialists
from .start import STAGES, check_recipe, describe_plan


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
        recipe, inputs, folder = settings.recipe, settings.inputs, settings.folder
        given, stages = stages, _stages_of(recipe, stages)
    with (
        interruption.caught(training_args.save_on_signal),
        folder_held(folder.path, _tasks_alone(recipe, stages)),
        _disk_errors_told(folder.path),
    ):
        with main_first():
            check_recipe(settings, stages)
        rehearse_stages(recipe, inputs, stages)
        plan = from_main(lambda: describe_plan(settings, stages))
        makes_something = set(stages) - {"eval"}  # else `max_length` has been told of
        _say("\n".join([*plan, *(length_lines(recipe, inputs) if makes_something else [])]))
        with time_limit():
            publisher = Publisher(settings, stages, user)
            results = _run_stages(settings, publisher, stages)
        if recipe.pipeline_args.only_tasks:
            _say(_what_is_left(recipe, inputs, folder, given))
        publisher.finish()
    return results


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def _stages_of(recipe: Recipe, stages: Sequence[str]) -> Sequence[str]:
    """The stages that a run with `only_tasks` can do, of those that it was asked for."""
    if not recipe.pipeline_args.only_tasks:
        return stages
    own = [stage for stage in stages if stage in ("specialists", "losses")]
    if not own:
        raise AMAError(
            f"only_tasks {recipe.pipeline_args.only_tasks} chooses specialists and reference losses, but this command makes "
            "neither: generalist and evaluation are of all tasks. Leave it out."
        )
    return own


def _what_is_left(recipe: Recipe, inputs: RunInputs, folder: RunFolder, stages: Sequence[str]) -> str:
    there = {*tasks_in(folder.losses), *inputs.shared_tasks}
    missing = [task for task in recipe.task_names if task not in there]
    left = f"reference losses are still missing of {missing}" if missing else "all reference losses are there"
    ended = ", so there is no generalist" if "train" in stages else ""
    return (
        f"only_tasks was {recipe.chosen_tasks}{ended}; {left}. `trl ama --config …` without only_tasks makes what is missing, "
        "the generalist and the page."
    )


def _tasks_alone(recipe: Recipe, stages: Sequence[str]) -> list[str] | None:
    """The tasks of a run that writes nothing but theirs, and shares its folder with others like it; `None` for any other."""
    tasks = recipe.pipeline_args.only_tasks
    if not tasks:
        tasks = recipe.task_names if set(stages) <= {"specialists", "losses"} else []
    return list(tasks) if 0 < len(tasks) <= _MOST_LOCKS else None


@contextlib.contextmanager
def _disk_errors_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or str(folder)
        if is_full(error):
            raise AMAError(
                f"The disk of '{place}' is full ({first_line(error)}). What was finished is intact: make room, and run the "
                "same command again to go on."
            ) from error
        inside = error.filename is not None and Path(error.filename).absolute().is_relative_to(folder.absolute())
        if not inside or error.strerror is None:
            raise
        raise AMAError(
            f"'{place}' can be neither read nor written as a run needs it ({error.strerror}). What was finished is intact: mend that, "
            "and run the same command again to go on."
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
        for strategy in settings.recipe.strategies:
            train_generalist(settings, strategy, publisher.generalist_id)
            _leave_page(settings, publisher)
    results = None
    if "eval" in stages:
        if "test" in settings.inputs.data:
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
    if not settings.recipe.pipeline_args.only_tasks:
        leave_page(settings, publisher.published)


def evaluate(settings: RunSettings, published: dict[str, str] | None = None) -> dict[str, Any]:
    """Evaluate the generalists, unless that was done; write results, table, plot, card and page, and print the table.

    Args:
        settings ([`RunSettings`]): The run.
        published (`dict[str, str]`, *optional*): Hub ids of what the run publishes, for the card's links.
    """
    recipe, folder = settings.recipe, settings.folder
    policies = {strategy: str(folder.generalist(strategy)) for strategy in recipe.strategies}
    made_from = evaluation_fingerprint(recipe, settings.inputs, reference_losses_of(settings), policies)
    path = folder.results
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
    recipe, folder = settings.recipe, settings.folder
    if results is not None:
        table = result_table(results)
        folder.result_table.write_text(table, encoding="utf-8")
        print(f"\n{table}\nResults: {folder.result_table}")
    generalists = {strategy: folder.generalist(strategy) for strategy in recipe.strategies}
    plot_mixture(generalists, recipe.task_names, folder.plot)
    print(f"Plot:    {folder.plot}")
    print(f"Card:    {write_card(settings, results, folder.plot, published)}")
    print(f"Page:    {leave_page(settings, published)}")
