"""The files of a trained policy, from a local folder or from one commit of a Hub repository.

Nothing here runs code from a repository: of an adapter, only `adapter_config.json`, `adapter_model.safetensors` and the pipeline's
note of its training, `stage.json`, are ever fetched, and PEFT reads them from a folder that holds nothing else.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property

import peft
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..common.errors import AMAError, first_line
from ..common.hub import HUB_ERRORS, is_commit, split_revision, time_limit


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of adapters that make PEFT read other files or repositories, or import a module
_REACHES_OUT = ("megatron_config", "corda_config", "prompt_tuning_init_state_dict_path", "shadow_model", "adapters")

_checked: dict[tuple[str, str | None], str] = {}  # what a branch or tag stood for when it was checked last


@dataclass(frozen=True)
class PolicySource:
    """A place to read a policy from: a local folder, or one commit of a Hub repository.

    Args:
        who (`str`): For messages, e.g. `"the specialist of task 'code'"`.
        given (`str`): As the user named it.
        name (`str`): Folder or Hub id.
        commit (`str`, *optional*): `None` for a folder.
    """

    who: str
    given: str
    name: str
    commit: str | None = None

    def file(self, filename: str, *, required: bool = False) -> str | None:
        """Path of one of its files, downloaded if need be; `None` if it has no such file.

        Args:
            filename (`str`): Its name.
            required (`bool`): Whether not knowing is an error: without a network, the cache may hold some files only.

        Raises:
            AMAError: If the Hub does not give it.
        """
        if self.commit is None:
            path = os.path.join(self.name, filename)
            return path if os.path.isfile(path) else None
        known = try_to_load_from_cache(self.name, filename, revision=self.commit)
        if known is not None and not isinstance(known, str):
            return None  # it was asked for before, and a commit stays what it is
        try:
            return hf_hub_download(self.name, filename, revision=self.commit)
        except (
            LocalEntryNotFoundError
        ) as error:  # also an EntryNotFoundError, but it says nothing about the repository
            cached = try_to_load_from_cache(self.name, filename, revision=self.commit)
            if isinstance(cached, str):
                return cached
            if cached is None and (required or not self._in_cache):
                raise _unreachable(self.who, self.given, error) from error
            return None
        except EntryNotFoundError:
            return None
        except HUB_ERRORS as error:
            raise _hub_error(self.who, self.given, self.name, self.commit, error) from error

    @property
    def _in_cache(self) -> bool:
        names = (ADAPTER_CONFIG, "config.json")
        return any(isinstance(try_to_load_from_cache(self.name, name, revision=self.commit), str) for name in names)

    def has(self, *filenames: str) -> bool:
        """Whether it has one of these files; downloads nothing."""
        if self.commit is None:
            return any(os.path.isfile(os.path.join(self.name, name)) for name in filenames)
        cached = (try_to_load_from_cache(self.name, name, revision=self.commit) for name in filenames)
        if any(isinstance(path, str) for path in cached):
            return True
        try:
            return any(HfApi().file_exists(self.name, name, revision=self.commit) for name in filenames)
        except Exception as error:
            raise _hub_error(self.who, self.given, self.name, self.commit, error) from error

    @cached_property
    def adapter_config(self) -> dict | None:
        """Content of `adapter_config.json`; `None` if this is no adapter."""
        return self.json(ADAPTER_CONFIG)

    def json(self, filename: str) -> dict | None:
        """Content of a JSON file; `None` if there is none.

        Raises:
            AMAError: If it is not a JSON object.
        """
        path = self.file(filename)
        if path is None:
            return None
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise AMAError(
                f"{capital(self.who)} ('{self.given}') has a damaged {filename} ({first_line(error)}). Save or download it again."
            ) from error
        return content

    def adapter_folder(self) -> str:
        """A local folder with the adapter's configuration and safetensors weights, for PEFT.

        Raises:
            AMAError: If there are no weights, or only a pickle.
        """
        weights = self.file(ADAPTER_WEIGHTS, required=True)
        if weights is None:
            raise self.without_safetensors("adapter_model.bin")
        return os.path.dirname(weights)

    def check_model_weights(self) -> None:
        """Raise an `AMAError` unless a full model has safetensors weights; downloads nothing."""
        if not self.has("model.safetensors", "model.safetensors.index.json"):
            raise self.without_safetensors("pytorch_model.bin", "pytorch_model.bin.index.json")

    def without_safetensors(self, *pickles: str) -> AMAError:
        """The error that says why nothing else is read."""
        if not self.has(*pickles):
            return AMAError(
                f"{capital(self.who)} ('{self.given}') has a configuration but no safetensors weights. Save it again with "
                "`save_pretrained`, and copy or push the whole folder."
            )
        return AMAError(
            f"{capital(self.who)} ('{self.given}') has its weights in {pickles[0]} only, which is a pickle and can run any "
            "code when it is read, so only safetensors are. Load it where you trust it, and save it with "
            "`save_pretrained(folder, safe_serialization=True)`."
        )

    def peft_config(self) -> PeftConfig:
        """The adapter's configuration as PEFT reads it, for use and not for training.

        Raises:
            AMAError: If PEFT does not know it, or it would make PEFT read more than this adapter.
        """
        content = dict(self.adapter_config)
        outside = [key for key in _REACHES_OUT if content.get(key)]
        if outside:
            raise AMAError(
                f"{capital(self.who)} ('{self.given}') sets {outside[0]} in its adapter_config.json, which would make PEFT "
                "read other files or import modules; only an adapter's own weights are read. Use a plain LoRA adapter."
            )
        if content.get("layer_replication"):
            raise AMAError(
                f"{capital(self.who)} ('{self.given}') was trained with layer_replication, which changes the base model "
                "that all tasks share. Merge it into a model and name that instead."
            )
        try:
            content.pop("runtime_config", None)
            config = PEFT_TYPE_TO_CONFIG_MAPPING[content["peft_type"]].from_peft_type(**content)
        except Exception as error:
            raise AMAError(
                f"{capital(self.who)} ('{self.given}') has an adapter_config.json that PEFT {peft.__version__} cannot read "
                f"({type(error).__name__}: {first_line(error)}). Update PEFT, or save the adapter again."
            ) from error
        if config.is_prompt_learning:
            raise AMAError(
                f"{capital(self.who)} ('{self.given}') is an adapter of the kind {content['peft_type']}, which puts tokens of "
                "its own before every text, so its log-probs cannot be lined up with the pairs. Use a LoRA adapter."
            )
        config.inference_mode = True
        return config


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unreachable(who: str, given: str, error: Exception) -> AMAError:
    name, revision = split_revision(given)
    flag = f" --revision {revision}" if revision else ""
    return AMAError(
        f"{capital(who)} ('{given}') is not on this machine, and the Hub cannot be reached ({first_line(error)}). Run "
        f"`hf download {name}{flag}` where there is a network, unset HF_HUB_OFFLINE, or give a folder."
    )


def _refused(error: Exception) -> bool:
    """Whether the Hub answered, and asking again is no use."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status < 500 and status not in (408, 429)


def _hub_error(who: str, given: str, name: str, revision: str | None, error: Exception) -> AMAError:
    if isinstance(error, GatedRepoError):
        text = f"is gated, and you have no access to it. Ask for access at {constants.ENDPOINT}/{name}, and run `hf auth login`."
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"is no folder here, and the Hub at {constants.ENDPOINT} shows no such repository. Check the name; if it is "
            "private, run `hf auth login` or set HF_TOKEN to a token that may read it."
        )
    elif isinstance(error, RevisionNotFoundError):
        text = (
            f"cannot be read: the repository '{name}' has no branch, tag or commit '{revision}'. Choose one of "
            f"{constants.ENDPOINT}/{name}/commits/main, or leave @{revision} out."
        )
    elif _refused(error):
        text = f"is refused by the Hub ({first_line(error)}). Check the name and your token: `hf auth whoami`."
    else:
        return _unreachable(who, given, error)
    return AMAError(f"{capital(who)} ('{given}') {text}")


def hub_commit(name: str, revision: str | None = None, *, who: str | None = None, check_again: bool = False) -> str:
    """The commit that a revision of a Hub model repository stands for; from the cache if the Hub cannot be reached.

    A branch can move while a run goes on. What [`check_policy_source`] saw is therefore what the fingerprint names and
    what is loaded, until it is checked again.

    Raises:
        AMAError: If there is no such repository or revision, or it can neither be reached nor is cached.
    """
    who = who or f"the model '{name}'"
    given = f"{name}@{revision}" if revision else name
    if is_commit(revision):
        return revision
    if not check_again and (name, revision) in _checked:
        return _checked[name, revision]
    try:
        with time_limit():
            return HfApi().resolve_revision(name, revision=revision).resolved
    except HFValidationError as error:
        raise AMAError(
            f"{capital(who)} ('{given}') is neither an adapter (no adapter_config.json) nor a model: there is no such "
            f"folder, and it cannot be a Hub id. Check the path or Hub id."
        ) from error
    except Exception as error:
        if _refused(error):
            raise _hub_error(who, given, name, revision, error) from error
        raise _unreachable(who, given, error) from error


def policy_source(who: str, source: str, *, check_again: bool = False) -> PolicySource:
    """What a folder, or a Hub id with an optional `@revision`, stands for.

    Raises:
        AMAError: If it cannot be read.
    """
    name, revision = split_revision(source)
    if os.path.isdir(name):
        return PolicySource(who, source, name)
    commit = hub_commit(name, revision, who=who, check_again=check_again)
    if check_again:
        _checked[name, revision] = commit
    return PolicySource(who, source, name, commit)
