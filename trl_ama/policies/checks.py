"""What is checked before a trained policy (a specialist, a generalist) from a folder or the Hub is used."""

import os

from safetensors import SafetensorError
from transformers import AutoConfig

from ..common.errors import AMAError, first_line, sentence
from ..common.hub import is_commit, split_revision
from ..common.run_folder import STAGE_FILE
from .adapter_keys import keys_problem, saved_shapes
from .files import ADAPTER_WEIGHTS, PolicySource, capital, hub_commit, policy_source
from .identity import weights_identity


__all__ = ["check_policy_source", "split_revision"]


def check_policy_source(
    base_model: str,
    who: str,
    source: str,
    *,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
) -> bool:
    """Whether `source` is an adapter (of `base_model`), rather than a full model; loads no weights.

    Args:
        base_model (`str`): Path or Hub id of this run's base model.
        who (`str`): For messages, e.g. `"the specialist of task 'code'"`.
        source (`str`): Adapter or model folder, or Hub id with an optional `@revision`.
        base_revision (`str`, *optional*): Revision of `base_model`.
        trust_remote_code (`bool`): Whether the user allows code from the Hub to run.

    Raises:
        AMAError: If it cannot be read, is neither of the two, is an adapter of another base model or revision of it, holds
            weights that do not fit or are a pickle, or needs code of its own.
    """
    place = policy_source(who, source, check_again=True)
    if not check_kind(base_model, place, base_revision=base_revision, trust_remote_code=trust_remote_code):
        return False
    folder = place.adapter_folder()
    config = place.peft_config()
    try:
        shapes = saved_shapes(os.path.join(folder, ADAPTER_WEIGHTS))
    except SafetensorError as error:
        raise damaged(place, error) from error
    problem = keys_problem(config, shapes, base_model, revision=base_revision, trust_remote_code=trust_remote_code)
    if problem is not None:
        raise misfit(place, base_model, problem)
    return True


def check_kind(
    base_model: str, place: PolicySource, *, base_revision: str | None = None, trust_remote_code: bool = False
) -> bool:
    """The part of [`check_policy_source`] that reads only configurations: kind, base model, and whether it needs code."""
    config = place.adapter_config
    if config is None:
        _check_full_model(place, trust_remote_code)
        return False
    theirs = config.get("base_model_name_or_path")
    same = _same_weights(base_model, base_revision, place)
    if same is False and _same_name(base_model, theirs):
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') was trained on other weights than '{base_model}' holds (its stage.json has their hash): "
            "another model stands under that name, or it was trained again. Put back the base that it was trained on, or train it again."
        )
    if same is False or (same is None and not _same_name(base_model, theirs)):
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') is an adapter of '{theirs}', but this run's base model is "
            f"'{base_model}'. Use one of the same base model, or set model_name_or_path to '{theirs}'. If '{base_model}' is "
            "a copy of it, give the folder the same name."
        )
    _check_base_revision(base_model, base_revision, place)
    return True


def misfit(place: PolicySource, base_model: str, problem: str) -> AMAError:
    """The error for an adapter whose weights are not those that the base model has a place for."""
    return AMAError(
        f"{capital(place.who)} ('{place.given}') does not fit the base model '{base_model}': of its weights, {problem}. It "
        "was probably trained on another architecture, or cut off while it was saved; use another one, or save it again."
    )


def damaged(place: PolicySource, error: Exception) -> AMAError:
    """The error for a weights file that is no safetensors file."""
    return AMAError(
        f"{capital(place.who)} ('{place.given}') has a damaged adapter_model.safetensors ({first_line(error)}). Download or "
        "save it again."
    )


def _check_full_model(place: PolicySource, trust_remote_code: bool) -> None:
    config = place.json("config.json")
    if config is None:
        raise AMAError(
            f"{capital(place.who)} at '{place.given}' is neither an adapter (no adapter_config.json) nor a model (no "
            "config.json). Check the path or Hub id."
        )
    if config.get("auto_map") and not trust_remote_code:
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') brings Python code of its own (`auto_map` in its config.json), which is "
            "not run. Read that code; if you trust it, set trust_remote_code: true. If transformers knows the architecture, "
            "a copy without `auto_map` needs no code."
        )
    try:
        AutoConfig.from_pretrained(place.name, revision=place.commit, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise AMAError(
            f"{capital(place.who)} at '{place.given}' is neither an adapter (no adapter_config.json) nor a model that can be "
            f"read: {sentence(error)} Check the path or Hub id."
        ) from error
    place.check_model_weights()


def _same_weights(ours: str, revision: str | None, place: PolicySource) -> bool | None:
    """Whether an adapter was trained on the weights that a base model holds; `None` if that is not known.

    What the pipeline trained notes a hash of its base's weights, or the commit of a Hub repository, in its stage.json. The
    adapters of others have a name of their base and nothing else.
    """
    if place.commit is not None and not os.path.isdir(ours):
        return None  # a commit is in the adapter's configuration, too: no more of the Hub is asked for
    note = place.json(STAGE_FILE)
    fingerprint = note.get("fingerprint") if note is not None else None
    noted = fingerprint.get("base_model") if isinstance(fingerprint, dict) else None
    if not isinstance(noted, str) or not (os.path.isdir(ours) or "@sha256:" in noted):
        return None
    theirs, known = weights_identity(*noted.rpartition("@")[::2]), weights_identity(ours, revision)
    return None if theirs is None or known is None else theirs == known


def _same_name(ours: str, theirs: str | None) -> bool:
    """Whether two names stand for one base model, where there is nothing but names."""
    if not theirs or theirs == ours:
        return True
    if os.path.isdir(theirs) and os.path.isdir(ours) and os.path.samefile(theirs, ours):
        return True
    local_copy = os.path.isdir(ours) != os.path.isdir(theirs)
    return local_copy and os.path.basename(os.path.abspath(ours)) == os.path.basename(theirs.rstrip("/"))


def _check_base_revision(base_model: str, base_revision: str | None, place: PolicySource) -> None:
    """Compare commits where both are known: the same name can stand for other weights after the base was updated."""
    theirs = place.adapter_config.get("revision")
    if not theirs or place.adapter_config.get("base_model_name_or_path") != base_model or os.path.isdir(base_model):
        return
    if theirs == (base_revision or "main"):
        return
    try:
        commits = hub_commit(base_model, base_revision), hub_commit(base_model, theirs)
    except AMAError:  # offline, or a branch that is gone: nothing to compare
        return
    if commits[0] != commits[1]:
        named = f"'{theirs}'" if is_commit(theirs) else f"'{theirs}' ({commits[1]})"
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') was trained on revision {named} of '{base_model}', but this run uses "
            f"'{base_revision or 'main'}' ({commits[0]}). Set model_revision to '{theirs}', or use an adapter of this run's "
            "revision."
        )
