"""Reference losses as a Hub dataset, pushed as they lie on disk."""

import os
import tempfile
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

from ..common.errors import AMAError
from ..common.fingerprint import first_difference
from ..common.hub import HubTarget, check_hub_id, persistently, prepare
from ..common.run_folder import FINGERPRINT_FILE
from ..tasks.config import check_config_name
from .card import OWN_FIELDS, losses_card, read_losses_card, specialist_repos
from .files import TaskLosses, read_note, stack, without_text


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
        names = {f"{config_name}/{task}/{name}": folder / name for name in (FINGERPRINT_FILE, *notes[task]["files"])}
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
        if len(parts) != 3 or parts[2] != FINGERPRINT_FILE:
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
