"""What a run's page says that the folder would not know by itself: the recipe, the command and where things came from."""

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe_text import recipe_yaml
from .secrets import is_secret, public_name, without_secrets
from .versions import VERSIONS, __version__


if TYPE_CHECKING:
    from .run_settings import RunSettings

NOTE_FILE = "report/run.json"
_ASSIGNS_SECRET = re.compile(r"(?i)(token|secret|passw(or)?d|api_?key|credential)\w*[\"']?\s*[:=]")
_FOLDERS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\",}]+/)+")  # the way to a file, which is this machine's


def run_note(settings: "RunSettings", published: dict[str, str]) -> dict[str, Any]:
    """The note as JSON types, without secrets and without this machine's paths.

    Args:
        settings ([`RunSettings`]): The run.
        published (`dict[str, str]`): Hub ids of what the run publishes.
    """
    from .fingerprint import package_versions

    shared = settings.shared_losses.public_source if settings.shared_losses is not None else None
    return {
        "version": VERSIONS[Path(NOTE_FILE).name],
        "tasks": settings.task_names,
        "mixing": settings.training_args.mixing,
        "strategies": settings.strategies,
        "base_model": settings.base_identity,
        "adapter": bool(settings.model_args.use_peft),
        "data": {task: settings.data_source(task) for task in settings.task_names},
        "specialists": {task: _source(source) for task, source in settings.external_specialists.items()},
        "reference_losses": dict.fromkeys(settings.shared_tasks, shared),
        "held_out": "test" in settings.data,
        "published": published,
        "recipe": recipe_yaml(settings),
        "arguments": public_arguments(sys.argv),
        "versions": {"trl-ama": __version__, **package_versions()},
    }


def _source(source: str) -> str:
    from .hub import is_hub_id

    return source if is_hub_id(source.partition("@")[0]) else public_name(source)


def public_arguments(argv: list[str]) -> str | None:
    """The arguments of one of our scripts as a shell takes them, without secrets and the folders of this machine; `None` if
    another program runs."""
    if not argv or Path(argv[0]).resolve().parent != Path(__file__).resolve().parent / "scripts":
        return None
    shown, skips = [], False
    for item in argv[1:]:
        flag, equals, value = item.partition("=") if item.startswith("--") else ("", "", item)
        if flag:
            skips = is_secret(flag.lstrip("-"))
        if skips:
            continue
        if value:
            value = "…" if _ASSIGNS_SECRET.search(value) else _FOLDERS.sub("", without_secrets(value))
        shown.append(shlex.quote(f"{flag}{equals}{value}"))
    return " ".join(shown)


def leave_page(settings: "RunSettings", published: dict[str, str]) -> Path | None:
    """Write a run's page and the note that it needs, as the run goes along; on the main process.

    Args:
        settings ([`RunSettings`]): The run.
        published (`dict[str, str]`): Hub ids of what the run publishes.

    Returns:
        The page, or `None` if it was not written.
    """
    from accelerate import PartialState

    from .html_page import write_page
    from .safe_files import write_json

    if not PartialState().is_main_process:
        return None
    try:
        write_json(settings.output_dir / NOTE_FILE, run_note(settings, published))
        return write_page(settings.output_dir)
    except Exception as error:  # whatever it is, a page is not worth a run of days
        warnings.warn(f"The run's page was not written ({type(error).__name__}: {error}).", UserWarning, stacklevel=2)
        return None
