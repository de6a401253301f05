"""A Hub on the loopback interface: the real clients talk to it instead of the Hugging Face Hub.

It answers what `huggingface_hub`, `datasets`, `transformers` and `peft` ask for when they create, fill, list and
download repositories, with the Hub's rules for tokens and its errors, and it can be told to fail. Not covered: Xet
(clients must have `HF_HUB_DISABLE_XET=1`; its LFS uploads run here), copies between repositories, discussions other
than a pull request made by a commit.
"""

import json
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_routes import Call, Reply, find_route
from hub_storage import Commit, File, HubError, Repository, is_lfs


FAULT_KINDS = ("500", "429", "reset", "reset_after", "timeout", "truncated")
# Asked for by the client on its own account, at most once a day; the Hub's answer does not matter
AGENT_HARNESSES = "/api/agent-harnesses"
MULTIPART_THRESHOLD = 50_000_000
MULTIPART_CHUNK = 16_000_000
PAGE_SIZE = 1000


@dataclass
class Token:
    user: str
    role: str
    orgs: tuple[str, ...] = ()
    scopes: dict[str, list[str]] = field(default_factory=dict)  # of a fine-grained token: permissions per namespace

    def can(self, permission: str, namespace: str) -> bool:
        """`permission` is "read" or "write", on private content and on any content."""
        if self.role == "fineGrained":
            name = {"read": "repo.content.read", "write": "repo.write"}[permission]
            return name in self.scopes.get(namespace, ())
        return namespace in (self.user, *self.orgs) and (permission == "read" or self.role == "write")

    def whoami(self) -> dict:
        access: dict[str, Any] = {"displayName": f"{self.user}-{self.role}", "role": self.role}
        if self.role == "fineGrained":
            scoped = [
                {"entity": {"type": "user" if name == self.user else "org", "name": name}, "permissions": permissions}
                for name, permissions in self.scopes.items()
            ]
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in self.orgs]
        auth = {"type": "access_token", "accessToken": access}
        return {"type": "user", "name": self.user, "fullname": self.user, "isPro": False, "orgs": orgs, "auth": auth}


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str  # with the query
    authorization: bool
    route: str | None = None  # "POST /api/{T}/{id}/commit/{rev}"
    status: int | None = None  # None: never answered
    kind_failed: str | None = None  # the fault that was injected
    received: int = 0  # bytes of the two bodies
    sent: int = 0
    user: str | None = None
    error: str | None = None  # traceback of a bug in this server


@dataclass
class Fault:
    kind: str
    index: int
    match: Callable[[str, str], bool] | None
    times: int
    seconds: float
    seen: int = 0

    def due(self, method: str, path: str) -> bool:
        """Counts a request; whether it is one of those to fail."""
        if (self.match and not self.match(method, path)) or (self.kind == "truncated" and method == "HEAD"):
            return False
        self.seen += 1
        return self.seen > self.index


class HubServer:
    WRITE_TOKEN = "hf_FakeWriteTokenOfAliceOnlyForTests"
    READ_TOKEN = "hf_FakeReadTokenOfAliceOnlyForTests"
    OTHER_TOKEN = "hf_FakeWriteTokenOfMalloryOnlyForTests"
    FINE_TOKEN_READ = "hf_FakeFineReadTokenOfAliceOnlyForTests"
    FINE_TOKEN_WRITE = "hf_FakeFineWriteTokenOfAliceOnlyForTests"

    def __init__(self) -> None:
        fine = {"read": ["repo.content.read"], "write": ["repo.content.read", "repo.write"]}
        self.tokens = {
            self.WRITE_TOKEN: Token("alice", "write", ("org",)),
            self.READ_TOKEN: Token("alice", "read", ("org",)),
            self.OTHER_TOKEN: Token("mallory", "write"),
            self.FINE_TOKEN_READ: Token(
                "alice", "fineGrained", ("org",), dict.fromkeys(("alice", "org"), fine["read"])
            ),
            self.FINE_TOKEN_WRITE: Token(
                "alice", "fineGrained", ("org",), dict.fromkeys(("alice", "org"), fine["write"])
            ),
        }
        self._lock = threading.RLock()
        self._httpd: ThreadingHTTPServer | None = None
        self._released = threading.Event()
        self.url = ""
        self.reset()

    def start(self) -> "HubServer":
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        threading.Thread(target=partial(self._httpd.serve_forever, 0.05), name="hub", daemon=True).start()
        return self

    def stop(self) -> None:
        self._released.set()
        if self._httpd:
            self._httpd.shutdown()
            self._httpd.server_close()
            self._httpd = None

    def reset(self) -> None:
        """Forgets all repositories, faults, settings and the log; lets go of connections that are being held."""
        with self._lock:
            self._released.set()
            self._released = threading.Event()
            self.repos: dict[tuple[str, str], Repository] = {}
            self.moved: dict[tuple[str, str], str] = {}
            self.requests: list[Request] = []
            self._all_requests: list[Request] = []
            self._faults: list[Fault] = []
            self.multipart_threshold, self.multipart_chunk = MULTIPART_THRESHOLD, MULTIPART_CHUNK
            self.page_size = PAGE_SIZE

    def clear_log(self) -> None:
        with self._lock:
            self.requests = []

    def problems(self) -> list[Request]:
        """Requests since `reset` that this server did not know or failed at by itself, cleared from the log or not."""
        with self._lock:
            return [
                request
                for request in self._all_requests
                if request.error
                or (request.status or 0) >= 500
                and request.kind_failed is None
                or (request.route is None and urlsplit(request.path).path != AGENT_HARNESSES)
            ]

    def fail(
        self,
        kind: str,
        index: int | None = None,
        match: Callable[[str, str], bool] | None = None,
        times: int = 1,
        seconds: float = 5.0,
    ) -> None:
        """Arms a fault: from the `index`-th request on (of those for which `match(method, path)` is true; the path
        comes with its query), `times` requests fail. Of several faults that are due, the first armed goes first.

        - "500", "429": this status, the latter with `Retry-After: 1`
        - "reset": the connection is reset before any answer; "reset_after": the server does what it was asked to do,
          and resets the connection instead of saying so
        - "timeout": nothing is done and nothing answered for `seconds`, then the connection is closed
        - "truncated": done, but only half of the body of the answer arrives before the connection is closed
        """
        if kind not in FAULT_KINDS:
            raise ValueError(f"unknown kind of fault {kind!r}: one of {', '.join(FAULT_KINDS)}")
        with self._lock:
            self._faults.append(Fault(kind, index or 0, match, times, seconds))

    @property
    def faults_pending(self) -> list[Fault]:
        with self._lock:
            return list(self._faults)

    def _take_fault(self, method: str, path: str) -> Fault | None:
        if urlsplit(path).path == AGENT_HARNESSES:  # may come at any moment, and would put the count off
            return None
        with self._lock:
            due = [fault for fault in self._faults if fault.due(method, path)]
            if not due:
                return None
            due[0].times -= 1
            if not due[0].times:
                self._faults.remove(due[0])
            return due[0]

    # Direct access, for tests

    def _get(self, repo_type: str, repo_id: str) -> Repository:
        repo_id = self.moved.get((repo_type, repo_id), repo_id)
        if (repo_type, repo_id) not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repos[repo_type, repo_id]

    def exists(self, repo_type: str, repo_id: str) -> bool:
        with self._lock:
            return (repo_type, repo_id) in self.repos

    def is_private(self, repo_type: str, repo_id: str) -> bool:
        with self._lock:
            return self._get(repo_type, repo_id).private

    def create(self, repo_type: str, repo_id: str, private: bool = False) -> Repository:
        with self._lock:
            if (repo_type, repo_id) in self.repos:
                raise HubError(409, f"You already created this {repo_type} repo: {repo_id}")
            self.moved.pop((repo_type, repo_id), None)
            self.repos[repo_type, repo_id] = repo = Repository(repo_type, repo_id, private, repo_id.split("/")[0])
            return repo

    def write(
        self,
        repo_type: str,
        repo_id: str,
        files: dict[str, bytes | str],
        revision: str = "main",
        message: str = "Write",
    ) -> str:
        """Commits `files` without a request, to a repository and a branch that are created if need be."""
        with self._lock:
            repo = (
                self._get(repo_type, repo_id) if self.exists(repo_type, repo_id) else self.create(repo_type, repo_id)
            )
            repo.branches.setdefault(revision, repo.branches["main"])
            contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
            made = {path: File.make(data, is_lfs(path, len(data))) for path, data in contents.items()}
            repo.lfs.update({file.sha256: file.data for file in made.values() if file.sha256})
            return repo.apply([("add", path, file) for path, file in made.items()], revision, message)[0].oid

    def tree(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file, of LFS files too; a new repository has a `.gitattributes`, as on the Hub."""
        with self._lock:
            files = self._get(repo_type, repo_id).resolve(revision).files
            return {path: file.data for path, file in sorted(files.items())}

    def commits(self, repo_type: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the "initial commit" that the Hub makes with the repository."""
        with self._lock:
            return self._get(repo_type, repo_id).log(revision)

    # Permissions

    def _user(self, call: Call) -> Token:
        if call.token is None:
            raise HubError(401, "Invalid username or password.")
        return call.token

    def _repo(self, call: Call, write: bool = False) -> Repository:
        """The repository of a request: "not found" to whom may not know of it, "forbidden" to whom may not write."""
        kind = (call.parts.get("T") or call.parts.get("P") or "models").rstrip("s/")
        repo = self._get(kind, call.parts["id"])
        if repo.private and not (call.token and call.token.can("read", repo.namespace)):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not self._user(call).can("write", repo.namespace):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _may_propose(self, call: Call) -> Repository:
        """For a pull request, any token that can write something will do."""
        token = self._user(call)
        writes = token.role == "write" or any("repo.write" in names for names in token.scopes.values())
        return self._repo(call, write=not (call.flag("create_pr") and writes))

    def _paged(self, call: Call, items: list) -> Reply:
        """A page of the items, and where the next one is."""
        size = min(self.page_size, int(call.query.get("limit", [self.page_size])[0]))
        start = int(call.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(items):
            query = "&".join(
                f"{name}={quote(value)}" for name, values in call.query.items() if name != "cursor" for value in values
            )
            headers["Link"] = f'<{self.url}{call.path}?{query}&cursor={start + size}>; rel="next"'
        return Reply(items[start : start + size], headers=headers)

    # Requests

    def handle(self, request: Request, body: bytes, headers: Any) -> Reply:
        """Runs the handler. Never raises: a bug becomes a 500 with its traceback in the log."""
        address = urlsplit(request.path)
        try:
            authorization = headers.get("Authorization", "").removeprefix("Bearer ").strip()
            token = self.tokens.get(authorization)
            request.user = token.user if token else None
            found = find_route(request.method, address.path)
            if not found:
                raise HubError(404, "Sorry, we can't find the page you are looking for.")
            if authorization and token is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            parts = {key: unquote(value or "") for key, value in found[1].groupdict().items()}
            call = Call(address.path, parts, parse_qs(address.query, keep_blank_values=True), body, headers, token)
            with self._lock:
                return found[2](self, call)
        except HubError as error:
            message = error.message.replace("\n", " ")
            codes = {"X-Error-Code": error.code} if error.code else {}
            return Reply(
                {"error": error.message}, error.status, {"X-Error-Message": message, **codes, **error.headers}
            )
        except Exception:
            request.error = traceback.format_exc()
            return Reply({"error": "Internal error of the test Hub"}, 500)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _hang_up(self, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            # No lingering: closing sends RST instead of FIN. Every file object on the socket has to go for that.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def _serve(self) -> None:
        hub = self.hub
        found = find_route(self.command, urlsplit(self.path).path)
        request = Request(self.command, self.path, "Authorization" in self.headers, found[0] if found else None)
        with hub._lock:
            # Before any answer: who has the answer must find the request in the log
            hub.requests.append(request)
            hub._all_requests.append(request)
            fault = hub._take_fault(self.command, self.path)
            released = hub._released
        kind = request.kind_failed = fault.kind if fault else None
        # Also of a request that is to fail: of a client that is still writing, one cannot say what it will notice
        body = self._body()
        request.received = len(body)
        if kind == "reset":
            return self._hang_up(reset=True)
        if fault and kind == "timeout":
            released.wait(fault.seconds)
            return self._hang_up()
        if kind == "500":
            reply = Reply({"error": "Internal Error - We're working hard to fix this as soon as possible!"}, 500)
        elif kind == "429":
            reply = Reply({"error": "Too Many Requests"}, 429, {"Retry-After": "1"})
        else:
            reply = hub.handle(request, body, self.headers)
        if kind == "reset_after":
            return self._hang_up(reset=True)

        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        binary = isinstance(reply.body, bytes)
        headers = {
            "Content-Type": "application/octet-stream" if binary else "application/json; charset=utf-8",
            "Content-Length": str(len(content)),
            "X-Request-Id": f"Root=test-{int(time.time() * 1000):x}",
            **reply.headers,
        }
        request.status = reply.status
        if self.command == "HEAD":
            content = b""
        if kind == "truncated":
            content = content[: len(content) // 2]
            self.close_connection = True
        request.sent = len(content)
        self.send_response_only(reply.status)
        for name, value in headers.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        # One packet for a small answer: two of them would wait for each other
        self._headers_buffer.append(b"\r\n" + content)
        self.flush_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):
            # The client hung up, or we did
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            pass
