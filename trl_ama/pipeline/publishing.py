"""What a run publishes with `push_to_hub`: specialists, reference losses, the generalist; each its own repository.

Everything is computed and saved before it is pushed, and a push that fails is reported and passed over: the same command
pushes again, computing nothing.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint

from ..common.errors import AMAError
from ..common.hub import HUB_ERRORS, HubTarget, check_login, full_id, persistently, prepare, say
from ..common.processes import from_main
from ..common.run_folder import STATE_FILE
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..recipe.settings import RunSettings
from ..reference_losses.dataset import DEFAULT_CONFIG, ReferenceLosses
from .run_losses import reference_losses_of
from .specialist_card import write_specialist_card


# As the Trainer's own pushes, but for the training's log, which holds local paths
_LEFT_OUT = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", STATE_FILE, ".*"]
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl"]
_COMMANDS = {("specialists",): "trl ama-specialists", ("losses",): "trl ama-losses", ("eval",): "trl ama-eval"}


class Publisher:
    """Pushes what a run makes, if `push_to_hub` is on.

    Args:
        settings ([`RunSettings`]): The run.
        stages (`Iterable[str]`): The stages that will run; only what they make is pushed.
        user (`dict`, *optional*): What [`~trl_ama.common.hub.check_login`] returned, if the token was checked already.

    Raises:
        AMAError: Before anything is trained: without a token that may write, or if a repository cannot be created.
    """

    def __init__(self, settings: RunSettings, stages: Iterable[str], user: dict[str, Any] | None = None):
        self.settings = settings
        recipe, inputs = settings.recipe, settings.inputs
        self.command = _COMMANDS.get(tuple(stages), "trl ama")  # a part of it would leave out links between the cards
        self.failures: list[str] = []
        self.targets: dict[str, HubTarget] = {}  # by task (or "" for the generalist, "/losses")
        # Places of what this run publishes, or has published by an earlier command, for links: `org/name[@branch]`
        self.published: dict[str, str] = {}
        if not recipe.training_args.push_to_hub:
            return
        pushed = set(repository_ids(recipe, inputs, settings.folder.path, stages))
        if recipe.pipeline_args.only_tasks:  # the losses are one dataset of all tasks
            pushed &= set(recipe.chosen_tasks)
        self.targets, self.published = from_main(lambda: self._prepare(pushed, user))

    def _prepare(self, pushed: set[str], user: dict[str, Any] | None) -> tuple[dict[str, HubTarget], dict[str, str]]:
        """Create the repositories of the keys in `pushed`; return targets and places of what is published."""
        settings, args = self.settings, self.settings.recipe.training_args
        user = user or check_login(args.hub_token)
        seen: dict[tuple[str, str], str] = {}
        all_stages = ("specialists", "losses", "train")
        ids = repository_ids(settings.recipe, settings.inputs, settings.folder.path, all_stages)
        for key, (name, field) in ids.items():
            repo_type = "dataset" if key == "/losses" else "model"
            target = HubTarget(
                full_id(name, user, field), repo_type, args.hub_private_repo, args.hub_revision, args.hub_token
            )
            other = seen.setdefault((repo_type, target.repo_id.lower()), key)
            if other != key:
                raise AMAError(
                    f"{_what(key)} and {_what(other)} would both go to '{target.repo_id}'. Set hub_model_id, "
                    "hub_specialist_id and hub_losses_id so that they differ."
                )
            if key in pushed:
                self.targets[key] = target
            elif not _exists(target):
                continue
            self.published[key] = f"{target.repo_id}@{target.revision}" if target.revision else target.repo_id
        for target in self.targets.values():
            prepare(target)
        return self.targets, self.published

    @property
    def generalist_id(self) -> str | None:
        """Where the generalist goes; `None` if it is not pushed."""
        return self.targets[""].repo_id if "" in self.targets else None

    def specialist(self, task: str, result: dict[str, Any]) -> None:
        """Push one task's specialist, with its card."""
        target = self.targets.get(task)
        if target is None:
            return
        folder = self.settings.folder.specialist(task)

        def push():
            write_specialist_card(self.settings, task, result, self.published[task])
            self._push_folder(target, folder, f"Specialist of task {task}", [*_LEFT_OUT, *_PICKLES, "runs/*"])

        self._attempt(task, folder, push)

    def losses(self) -> None:
        """Push the reference losses that were computed here; those of others are theirs to publish."""
        target = self.targets.get("/losses")
        if target is None:
            return
        settings, recipe, inputs = self.settings, self.settings.recipe, self.settings.inputs
        own = [task for task in recipe.task_names if task not in inputs.shared_tasks]
        specialists = {task: self.published[task] for task in own if task in self.published}

        def push():
            ReferenceLosses(reference_losses_of(settings, own)).push_to_hub(
                target.repo_id,
                recipe.pipeline_args.losses_config or DEFAULT_CONFIG,
                private=target.private,
                token=target.token,
                revision=target.revision,
                include_text=recipe.pipeline_args.include_text,
                specialists=specialists,
            )

        self._attempt("/losses", settings.folder.losses, push)

    def generalist(self) -> None:
        """Push the recipe's own generalist, and its checkpoints if `hub_strategy` asks for them."""
        target = self.targets.get("")
        if target is None:
            return
        args = self.settings.recipe.training_args
        folder = self.settings.folder.generalist(args.mixing)

        def push():
            self._push_folder(target, folder, "End of training", _LEFT_OUT)
            for checkpoint, place in _checkpoints(folder, args.hub_strategy):
                # PEFT's empty card names a local base model by its path, which the Hub refuses
                self._push_folder(target, checkpoint, f"Checkpoint {checkpoint.name}", ["README.md"], place)

        self._attempt("", folder, push)

    def _push_folder(
        self, target: HubTarget, folder: Path, message: str, left_out: list[str], place: str | None = None
    ) -> None:
        persistently(
            lambda: target.api.upload_folder(
                repo_id=target.repo_id,
                repo_type=target.repo_type,
                folder_path=folder,
                path_in_repo=place,
                revision=target.revision,
                commit_message=message,
                ignore_patterns=left_out,
                # What pushes during training left of another checkpoint, whichever of them succeeded
                delete_patterns=None if place is None else "*",
            )
        )

    def _attempt(self, key: str, folder: Path, push: Callable[[], None]) -> None:
        if not PartialState().is_main_process:
            return
        target = self.targets[key]
        try:
            push()
        except Exception as error:  # whatever it is, what was computed is saved and the run goes on
            self.failures.append(
                f"{_what(key)} could not be pushed to {target.url}: {say(error, target.token)} It is complete in '{folder}'. "
                f"Run `{self.command} --config …` again to push it; nothing is computed again."
            )
            print(f"trl-ama: {self.failures[-1]}", flush=True)
            return
        print(f"{_what(key)}: pushed to {target.url}", flush=True)

    def finish(self) -> None:
        """Raise an `AMAError` at the end of a run of which a push failed."""
        if self.failures:
            raise AMAError(" ".join(["Everything was computed and saved, but not everything pushed.", *self.failures]))


def _exists(target: HubTarget) -> bool:
    """Whether a repository is there; not knowing costs a link and nothing more."""
    try:
        return persistently(lambda: target.api.repo_exists(target.repo_id, repo_type=target.repo_type))
    except HUB_ERRORS:
        return False


def _what(key: str) -> str:
    names = {"": "The generalist", "/losses": "The reference losses"}
    return names.get(key, f"The specialist of task '{key}'")


def _checkpoints(folder: Path, strategy: HubStrategy) -> list[tuple[Path, str]]:
    """Checkpoints to push, and their place in the repository, as the Trainer pushes them while it trains."""
    last = get_last_checkpoint(str(folder))
    if last is None or strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        return []
    if strategy == HubStrategy.CHECKPOINT:
        return [(Path(last), "last-checkpoint")]
    return [(path, path.name) for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if path.is_dir()]


def repository_ids(
    recipe: Recipe, inputs: RunInputs, output_dir: Path, stages: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Key → the Hub id that the recipe gives or implies, and the field that decides it."""
    args, pipeline_args = recipe.training_args, recipe.pipeline_args
    base = args.hub_model_id or output_dir.resolve().name
    ids = {}
    pattern = pipeline_args.hub_specialist_id or base + "-{task}"
    own = [task for task in recipe.task_names if inputs.needs_specialist(task)]
    if "specialists" in stages:
        field = "hub_specialist_id" if pipeline_args.hub_specialist_id else "hub_model_id"
        ids = {task: (pattern.replace("{task}", task), field) for task in own}
    if "losses" in stages and any(task not in inputs.shared_tasks for task in recipe.task_names):
        field = "hub_losses_id" if pipeline_args.hub_losses_id else "hub_model_id"
        ids["/losses"] = (pipeline_args.hub_losses_id or f"{base}-reference-losses", field)
    if "train" in stages or "eval" in stages:
        ids[""] = (base, "hub_model_id")
    return ids
