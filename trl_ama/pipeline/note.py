"""What a run's page says that the folder would not know by itself: the recipe, the command and where things came from."""

import sys
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..common.files import write_json
from ..common.fingerprint import package_versions
from ..common.hub import is_hub_id
from ..common.run_folder import NOTE_FILE
from ..common.secrets import public_name
from ..common.versions import VERSIONS, __version__
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.settings import RunSettings
from ..recipe.text import public_arguments, recipe_yaml
from ..report.page import write_page


def run_note(recipe: Recipe, inputs: RunInputs, published: dict[str, str]) -> dict[str, Any]:
    """The note as JSON types, without secrets and without this machine's paths.

    Args:
        recipe ([`Recipe`]): What the run is told.
        inputs ([`RunInputs`]): What it reads.
        published (`dict[str, str]`): Hub ids of what the run publishes.
    """
    shared = inputs.shared_losses.public_source if inputs.shared_losses is not None else None
    return {
        "version": VERSIONS[Path(NOTE_FILE).name],
        "tasks": recipe.task_names,
        "mixing": recipe.training_args.mixing,
        "strategies": recipe.strategies,
        "base_model": inputs.base_identity,
        "adapter": recipe.uses_peft,
        "data": {task: inputs.data_source(task) for task in recipe.task_names},
        "specialists": {task: _source(source) for task, source in recipe.external_specialists.items()},
        "reference_losses": dict.fromkeys(inputs.shared_tasks, shared),
        "held_out": "test" in inputs.data,
        "published": published,
        "recipe": recipe_yaml(recipe),
        "arguments": public_arguments(sys.argv),
        "versions": {"trl-ama": __version__, **package_versions()},
    }


def _source(source: str) -> str:
    return source if is_hub_id(source.partition("@")[0]) else public_name(source)


def leave_page(settings: RunSettings, published: dict[str, str]) -> Path | None:
    """Write a run's page and the note that it needs, as the run goes along; on the main process.

    Args:
        settings ([`RunSettings`]): The run.
        published (`dict[str, str]`): Hub ids of what the run publishes.

    Returns:
        The page, or `None` if it was not written.
    """
    if not PartialState().is_main_process:
        return None
    try:
        write_json(settings.folder.note, run_note(settings.recipe, settings.inputs, published))
        return write_page(settings.folder.path)
    except Exception as error:  # whatever it is, a page is not worth a run of days
        warnings.warn(f"The run's page was not written ({type(error).__name__}: {error}).", UserWarning, stacklevel=2)
        return None
