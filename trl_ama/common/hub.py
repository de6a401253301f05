"""The Hub as trl-ama sees it: names, tokens, and pushes that a bad network delays but never breaks."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_session, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import _http, validate_repo_id

from .errors import AMAError, first_line, sentence
from .secrets import redact


# The client waits for ever otherwise. Longer than the Hub takes for a large commit.
TIMEOUT = 300.0  # seconds without a byte
RETRIES = 3
_WAIT = 1.0  # seconds before the first retry, doubled after each
_MAX_WAIT = 60.0
_HUB = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What a call of the Hub's client raises: its HTTP library's error, whichever that is (no `OSError`); `ValueError` of an answer
# that is no JSON; `RuntimeError` of an upload of large files
HUB_ERRORS = (HfHubHTTPError.__mro__[1], OSError, ValueError, RuntimeError)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubTarget:
    """A repository to push to.

    Args:
        repo_id (`str`): `namespace/name`.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): Whether a repository that is created here is private; `None`: the namespace's default.
        revision (`str`, *optional*): Branch; `None`: the main one.
        token (`str`, *optional*): `None`: the one of the login.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool | None = None
    revision: str | None = None
    token: str | None = None

    def __repr__(self) -> str:  # without the token, which a dataclass would show
        return f"HubTarget({self.repo_id!r}, {self.repo_type!r})"

    @property
    def url(self) -> str:
        """Address for people."""
        kind = "datasets/" if self.repo_type == "dataset" else ""
        branch = f"/tree/{self.revision}" if self.revision else ""
        return f"{constants.ENDPOINT}/{kind}{self.repo_id}{branch}"

    @property
    def api(self) -> HfApi:
        """A client that carries the token."""
        return HfApi(token=self.token, library_name="trl-ama")


def hub_link(repo_id: str, repo_type: str = "model", revision: str | None = None) -> str:
    """Markdown link to a repository."""
    kind = "datasets/" if repo_type == "dataset" else ""
    tail = f"/tree/{revision}" if revision else ""
    text = f"{repo_id}@{revision[:12]}" if revision else repo_id
    return f"[{text}]({_HUB}/{kind}{repo_id}{tail})"


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a Hub id (`name` or `namespace/name`) and is nothing local."""
    if os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_hub_id(name: str, key: str) -> None:
    """Raise an `AMAError` unless `name` can be a Hub id; `key` is where the user set it."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise AMAError(f"{key} is {name!r}, which cannot be a Hub id: {sentence(error)}") from error


def say(error: BaseException, token: str | None = None) -> str:
    """One line about an error of the network or the Hub."""
    if isinstance(error, (HfHubHTTPError, AMAError)):
        return redact(first_line(error), token)
    text = " ".join(str(error).split()) if isinstance(error, ValueError) else first_line(error)  # the Hub's, on a card
    return redact(f"{type(error).__name__}: {text}", token)


def _limit_request(request: Any) -> None:
    """Some requests, such as those for what is in a repository, say that they have no limit, whatever the client's is."""
    limits = request.extensions.get("timeout", {})
    if all(limit is None for limit in limits.values()):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT)


def _with_hooks(client: Any, hooks: list[Any]) -> None:
    client.event_hooks = {**client.event_hooks, "request": hooks}


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Give every request of the Hub's client one of `TIMEOUT` seconds without a byte, unless it has a limit of its own."""
    before, make = get_session().timeout, _http._GLOBAL_CLIENT_FACTORY
    hooks = get_session().event_hooks["request"]

    def limit(client: Any) -> Any:
        unlimited = type(client.timeout)(None)
        if client.timeout == unlimited:
            client.timeout = TIMEOUT
        if _limit_request not in client.event_hooks["request"]:
            _with_hooks(client, [*client.event_hooks["request"], _limit_request])
        return client

    # The client is made anew after a failure to connect and in a forked process, and background pushes use it too
    _http._GLOBAL_CLIENT_FACTORY = lambda: limit(make())
    limit(get_session())
    try:
        yield
    finally:
        _http._GLOBAL_CLIENT_FACTORY = make
        get_session().timeout = before
        _with_hooks(get_session(), hooks)


def _response(error: BaseException) -> Any:
    """The Hub's answer that an error is about, if there was one."""
    response = getattr(error, "response", None)
    if response is None:  # that a card is invalid is a `ValueError` on top of the answer's
        response = getattr(error.__cause__, "response", None)
    return response


def _seconds_to_wait(error: BaseException, attempt: int) -> float | None:
    """How long to wait before trying again; `None` if that is no use."""
    response = _response(error)
    status = getattr(response, "status_code", None)
    lost = (
        isinstance(error, LocalEntryNotFoundError) and not is_offline_mode()
    )  # the client's word for no answer and no cache
    hopeless = (AMAError, HFValidationError, FileNotFoundError, PermissionError)
    if (isinstance(error, hopeless) and not lost) or (
        status is not None and status < 500 and status not in (408, 409, 412, 429)
    ):
        return None
    wait = _WAIT * 2**attempt
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(max(wait, float(asked)) if asked.isdigit() else wait, _MAX_WAIT)


def persistently(call: Callable[[], _Result]) -> _Result:
    """Call until it succeeds, up to `RETRIES` times more for what may pass: server errors, rate limits, lost connections.

    The call has to look at the repository anew each time: a lost answer does not say whether the request was carried out.
    """
    for attempt in range(RETRIES + 1):
        try:
            with time_limit():
                return call()
        except HUB_ERRORS as error:
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == RETRIES:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def check_login(token: str | None) -> dict[str, Any]:
    """Who the token belongs to.

    Returns:
        What the Hub's `whoami` says.

    Raises:
        AMAError: If there is no token, the Hub refuses it or it may only read; or if the Hub cannot be asked.
    """
    if is_offline_mode():
        raise AMAError("push_to_hub is on, but HF_HUB_OFFLINE=1 forbids it. Unset it, or set push_to_hub: false.")
    if (token or get_token()) is None:
        raise AMAError(
            "push_to_hub is on, but there is no Hugging Face token. Run `hf auth login`, set HF_TOKEN, or set push_to_hub: "
            "false."
        )
    try:
        user = persistently(lambda: HfApi(token=token).whoami())
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise AMAError(
                f"push_to_hub is on, but the Hub at {constants.ENDPOINT} refuses the token: it is wrong or was revoked. Run "
                "`hf auth login`, set HF_TOKEN to a valid one, or set push_to_hub: false."
            ) from None
        raise AMAError(
            f"push_to_hub is on, but the Hub at {constants.ENDPOINT} cannot be asked who the token belongs to: "
            f"{say(error, token)} Try again, or set push_to_hub: false and push later."
        ) from None
    access = (user.get("auth") or {}).get("accessToken") or {}
    scopes = access.get("fineGrained") or {}
    granted = {name for scope in scopes.get("scoped", []) for name in scope.get("permissions", [])}
    granted |= set(scopes.get("global", []))
    if access.get("role") == "read" or (access.get("role") == "fineGrained" and "repo.write" not in granted):
        raise AMAError(
            f"push_to_hub is on, but the token of '{user.get('name')}' may only read. Use a token with the write role, or set "
            "push_to_hub: false."
        )
    return user


def full_id(name: str, user: dict[str, Any], key: str) -> str:
    """`name` with its namespace, which is the user's if it has none.

    Raises:
        AMAError: If it cannot be a Hub id, or the user may not write to the namespace.
    """
    check_hub_id(name, key)
    if "/" not in name:
        return f"{user['name']}/{name}"
    writable = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    namespace = name.split("/")[0]
    if namespace not in writable:
        raise AMAError(
            f"{key} is '{name}', but the token of '{user['name']}' can write to {writable} only. Set {key} to one of these, or "
            "use another token."
        )
    return name


def prepare(target: HubTarget) -> None:
    """Create the repository and the branch, if they are not there.

    Raises:
        AMAError: If the Hub refuses.
    """
    try:
        persistently(
            lambda: target.api.create_repo(
                target.repo_id, repo_type=target.repo_type, private=target.private, exist_ok=True
            )
        )
        if target.revision is not None:
            persistently(
                lambda: target.api.create_branch(
                    target.repo_id, branch=target.revision, repo_type=target.repo_type, exist_ok=True
                )
            )
    except Exception as error:
        raise AMAError(
            f"push_to_hub is on, but the {target.repo_type} repository '{target.repo_id}' cannot be created or written: "
            f"{say(error, target.token)} Choose another id, use another token, or set push_to_hub: false."
        ) from None


def split_revision(source: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into its parts; a local folder is left whole."""
    if os.path.isdir(source) or "@" not in source:
        return source, None
    name, revision = source.rsplit("@", 1)
    return name, revision or None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's full hash, which never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None
