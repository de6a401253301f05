"""Reference losses as a Hub dataset: pushed as they lie on disk, pulled into the cache, the same checks on both ways."""

import os
import tempfile
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import AMAError
from .fingerprint import first_difference
from .hub import HUB_ERRORS, HubTarget, check_hub_id, persistently, prepare, say
from .loss_card import OWN_FIELDS, losses_card, read_losses_card, specialist_repos
from .loss_dataset import NOTE_FILE, SPLITS, TaskLosses, read_note, read_task, stack, tasks_in, without_text
from .policy_sources import split_revision
from .tasks import check_config_name


DEFAULT_CONFIG = "default"


class ReferenceLosses(DatasetDict):
    """Reference losses of one or more tasks: a `DatasetDict` of `train` and, if there are held-out pairs, `test`.

    Its rows can be given to [`AMATrainer`] as they are if they hold the texts; otherwise join them with your own pairs by
    [`join_reference_losses`].

    Args:
        parts (`list[TaskLosses]`): The tasks, read and checked.
        source (`str`, *optional*): Where they come from: `org/losses@commit`, or a folder.
    """

    def __init__(self, parts: list[TaskLosses], source: str | None = None):
        super().__init__(stack(parts))
        self.parts = {part.task: part for part in parts}
        self.source = source
        self.found = self.tasks  # in the place they come from
        self.specialist_repos: dict[str, str] = {}  # that the place they come from names, for links
        self._rows = dict(self)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the recipe that made them."""
        return list(self.parts)

    @property
    def public_source(self) -> str:
        """`source` without the way to a local folder."""
        if self.source is None or os.path.isdir(self.source):
            return f"local files: {Path(self.source or '.').resolve().name}"
        return self.source

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Task → everything that decided its log-probs."""
        return {task: part.fingerprint for task, part in self.parts.items()}

    def push_to_hub(
        self,
        repo_id: str,
        config_name: str = DEFAULT_CONFIG,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        include_text: bool = True,
        specialists: dict[str, str] | None = None,
    ) -> CommitInfo:
        """Push the losses as Parquet, with a dataset card, in one commit.

        A task that the config holds already is replaced, others are left as they are. Pushing again what is there makes no
        commit.

        Args:
            repo_id (`str`): `namespace/name`.
            config_name (`str`): Config (run): losses of one base model under one set of settings.
            private, token, revision, commit_message: As in [`~datasets.DatasetDict.push_to_hub`].
            include_text (`bool`): `False` pushes ids and numbers only.
            specialists (`dict[str, str]`, *optional*): Task → Hub id of its specialist, for the card.

        Raises:
            AMAError: If the config there was made by another base model or other settings.
        """
        check_hub_id(repo_id, "repo_id")
        check_config_name(config_name)
        if set(self) != set(self._rows) or any(self[split] is not rows for split, rows in self._rows.items()):
            raise AMAError(
                "The rows were changed after they were loaded, and what is pushed are the files that they were loaded from. Compute "
                "losses of the pairs that you want to publish, or push a plain `DatasetDict(losses)`."
            )
        target = HubTarget(repo_id, "dataset", private, revision, token)
        prepare(target)
        with tempfile.TemporaryDirectory() as temporary:
            folders = {}
            for task, part in self.parts.items():
                folders[task] = part.folder
                if part.has_text and not include_text:
                    without_text(part, Path(temporary))
                    folders[task] = Path(temporary) / task
            return persistently(lambda: _commit(target, config_name, folders, specialists or {}, commit_message))


def _commit(
    target: HubTarget,
    config_name: str,
    folders: dict[str, Path],
    specialists: dict[str, str],
    message: str | None,
) -> CommitInfo:
    """One commit on top of what the repository holds now; somebody else's commit in between makes it fail, and start anew."""
    info = target.api.dataset_info(target.repo_id, revision=target.revision)
    present_files = {file.rfilename for file in info.siblings or ()}
    notes = {task: read_note(folder) for task, folder in folders.items()}
    runs = _present_notes(target, info.sha, present_files)
    others = {task: note for task, note in runs.get(config_name, {}).items() if task not in notes}
    _check_same_run(f"config '{config_name}' of '{target.repo_id}'", notes, others)
    runs[config_name] = {**others, **notes}
    body, data = "", {}
    if "README.md" in present_files:
        path = target.api.hf_hub_download(target.repo_id, "README.md", repo_type="dataset", revision=info.sha)
        body, data = read_losses_card(Path(path).read_bytes(), target.repo_id)
    # A specialist that the card names stays there, as long as the numbers are its own
    repos = {
        config: {
            task: repo
            for task, (identity, repo) in specialist_repos(data, config).items()
            if task in tasks and tasks[task]["fingerprint"].get("specialist") == identity
        }
        for config, tasks in runs.items()
    }
    repos[config_name] |= specialists
    place = f"{target.repo_id}@{target.revision}" if target.revision else target.repo_id
    operations = [CommitOperationAdd("README.md", losses_card(place, runs, repos, body, data).encode())]
    for task, folder in folders.items():
        names = {f"{config_name}/{task}/{name}": folder / name for name in (NOTE_FILE, *notes[task]["files"])}
        operations += [CommitOperationAdd(name, path) for name, path in names.items()]
        operations += [
            CommitOperationDelete(name)
            for name in sorted(present_files)
            if name.startswith(f"{config_name}/{task}/") and name not in names
        ]
    return target.api.create_commit(
        target.repo_id,
        operations,
        repo_type="dataset",
        revision=target.revision,
        parent_commit=info.sha,
        commit_message=message or f"Reference losses of {', '.join(folders)} ({config_name})",
    )


def _present_notes(target: HubTarget, head: str, files: set[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Config → task → note, of what the repository holds; the card is for people and may say anything."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for name in sorted(files):
        parts = name.split("/")
        if len(parts) != 3 or parts[2] != NOTE_FILE:
            continue
        path = target.api.hf_hub_download(target.repo_id, name, repo_type="dataset", revision=head)
        note = read_note(Path(path).parent, f"'{target.repo_id}' ({name})")
        runs.setdefault(parts[0], {})[parts[1]] = note
    return {
        config: dict(sorted(notes.items(), key=lambda item: (item[1]["order"], item[0])))
        for config, notes in runs.items()
    }


def _check_same_run(where: str, ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """Raise an `AMAError` unless all tasks of a config were made under one set of settings and have the same columns."""

    def common(note: dict[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in note["fingerprint"].items() if field not in OWN_FIELDS}

    first, reference = next(iter(ours.items()))
    everyone = [(f"task '{task}'", note) for task, note in ours.items()]
    everyone += [(f"task '{task}' in {where}", note) for task, note in theirs.items()]
    for who, note in everyone:
        difference = first_difference(common(reference), common(note))
        if difference is not None:
            field, value, other = difference
            raise AMAError(
                f"The reference losses of task '{first}' were made with {field}={value!r}, those of {who} with {field}={other!r}, "
                "and one config holds one run. Push to another config (losses_config) or repository."
            )
        if note["texts"] != reference["texts"]:
            raise AMAError(
                f"The reference losses of task '{first}' have the texts {reference['texts'] or 'left out'}, those of {who} "
                f"{note['texts'] or 'left out'}, and readers need the same columns everywhere in a config. Bring both into one format "
                "(`include_text`, `format`), or push to another config (losses_config)."
            )


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
        folder / (_choose(path, name, sorted({file.parts[-3] for file in folder.glob(f"*/*/{NOTE_FILE}")}))),
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
        root = persistently(lambda: snapshot([f"*/*/{NOTE_FILE}", "README.md"]))
        config = _choose(path, name, sorted({file.parts[-3] for file in root.glob(f"*/*/{NOTE_FILE}")}))
        check_config_name(config)
        wanted = [task for task in tasks_in(root / config) if tasks is None or task in tasks]
        root = persistently(
            lambda: snapshot(
                [f"{config}/{task}/{split}.parquet" for task in wanted for split in SPLITS] + [f"*/*/{NOTE_FILE}"]
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
