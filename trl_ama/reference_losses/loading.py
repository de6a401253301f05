"""Loads reference losses from the Hub or a folder, with all checks, and only what is needed of them."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from ..common.errors import AMAError
from ..common.hub import HUB_ERRORS, check_hub_id, persistently, say, split_revision
from ..common.run_folder import FINGERPRINT_FILE, rows_file
from ..tasks.config import check_config_name
from .card import read_losses_card, specialist_repos
from .dataset import DEFAULT_CONFIG, ReferenceLosses
from .files import SPLITS, read_task, tasks_in


def load_reference_losses(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    tasks: list[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> ReferenceLosses:
    """Load reference losses from the Hub or a local folder, as [`~datasets.load_dataset`] would, and check them.

    Args:
        path (`str`): Hub dataset (`org/losses`, `org/losses@revision`), or a local folder such as `<output_dir>/reference_losses`.
        name (`str`, *optional*): Config (run). May be left out if there is one only, or one called `default`.
        tasks (`list[str]`, *optional*): Tasks to load; all by default.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str`, *optional*): For a private dataset; the login's by default.

    Raises:
        AMAError: If they cannot be found or read, lack a task, or do not pass the checks of [`read_task`].
    """
    losses = load_some_of(path, name, tasks, revision=revision, token=token)
    for task in tasks or ():
        if task not in losses.tasks:
            raise AMAError(
                f"Task '{task}' has no reference losses in '{path}'; found {losses.found}. Choose one of these."
            )
    return losses


def load_some_of(
    path: str | os.PathLike,
    name: str | None,
    among: list[str] | None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> ReferenceLosses:
    """As [`load_reference_losses`], but of the tasks `among` those that there are, possibly none."""
    path = str(path)
    if name is not None:
        check_config_name(name)
    source, folder, name = _local(path, name) if os.path.isdir(path) else _pull(path, name, among, revision, token)
    found = tasks_in(folder)
    if not found:
        raise AMAError(
            f"There are no reference losses in '{path}'. Run `trl ama-losses --config …`, or check the path."
        )
    chosen = [task for task in found if among is None or task in among]
    losses = ReferenceLosses([read_task(folder / task, task, f"'{path}'") for task in chosen], source)
    losses.found = found
    card = folder.parent / "README.md"
    if name is not None and card.is_file():
        losses.specialist_repos = _named_specialists(card, path, name, losses)
    return losses


def _named_specialists(card: Path, path: str, name: str, losses: ReferenceLosses) -> dict[str, str]:
    """Task → Hub id of its specialist, as the card says; a card that cannot be read costs links and nothing more."""
    try:
        named = specialist_repos(read_losses_card(card.read_bytes(), path)[1], name)
    except AMAError:
        return {}
    return {task: repo for task, (_, repo) in named.items() if task in losses.tasks}


def _local(path: str, name: str | None) -> tuple[str, Path, str | None]:
    folder = Path(path)
    if tasks_in(folder):
        return path, folder, name
    return (
        path,
        folder / (_choose(path, name, sorted({file.parts[-3] for file in folder.glob(f"*/*/{FINGERPRINT_FILE}")}))),
        name,
    )


def _choose(path: str, name: str | None, configs: list[str]) -> str:
    if name is not None:
        if name not in configs:
            raise AMAError(
                f"'{path}' has no reference losses of config '{name}'; found {configs}. Choose one of these."
            )
        return name
    if len(configs) == 1:
        return configs[0]
    if DEFAULT_CONFIG in configs:
        return DEFAULT_CONFIG
    if not configs:
        raise AMAError(
            f"There are no reference losses in '{path}'. Run `trl ama-losses --config …`, or check the path."
        )
    raise AMAError(
        f"'{path}' has reference losses of several runs: {configs}. Choose one with losses_config (in Python: name)."
    )


def _pull(
    path: str, name: str | None, tasks: list[str] | None, revision: str | None, token: str | None
) -> tuple[str, Path, str]:
    """Bring what is needed into the cache. Returns `id@commit`, the config's folder and its name."""
    repo_id, pinned = split_revision(path)
    check_hub_id(repo_id, "The source of reference losses")
    revision = pinned or revision

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=patterns)
        )

    try:
        root = persistently(lambda: snapshot([f"*/*/{FINGERPRINT_FILE}", "README.md"]))
        config = _choose(path, name, sorted({file.parts[-3] for file in root.glob(f"*/*/{FINGERPRINT_FILE}")}))
        check_config_name(config)
        wanted = [task for task in tasks_in(root / config) if tasks is None or task in tasks]
        root = persistently(
            lambda: snapshot(
                [f"{config}/{task}/{rows_file(split)}" for task in wanted for split in SPLITS]
                + [f"*/*/{FINGERPRINT_FILE}"]
            )
        )
    except AMAError:
        raise
    except RepositoryNotFoundError:
        raise AMAError(
            f"There is no dataset '{repo_id}' on the Hub, or it is private and your token may not see it. Check "
            "`reference_losses`, or run `hf auth login`."
        ) from None
    except LocalEntryNotFoundError as error:
        raise AMAError(
            f"The reference losses '{path}' are not in the cache, and the Hub cannot be reached: {say(error, token)} Check "
            "your network, or unset HF_HUB_OFFLINE."
        ) from None
    except HUB_ERRORS as error:
        raise AMAError(
            f"The reference losses '{path}' cannot be pulled: {say(error, token)} Check the id and the revision."
        ) from None
    return f"{repo_id}@{root.name}", root / config, config
