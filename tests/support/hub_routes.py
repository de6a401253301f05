"""The requests that the test Hub answers, one handler for each."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml
from hub_storage import Commit, File, HubError, Repository, is_lfs, timestamp, tree_oids


if TYPE_CHECKING:
    from hub_server import HubServer, Token


@dataclass
class Call:
    """What a handler gets to know about a request."""

    path: str
    parts: dict[str, str]  # of the route's template
    query: dict[str, list[str]]
    body: bytes
    headers: Any
    token: "Token | None"

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


@dataclass
class Reply:
    body: Any = field(default_factory=dict)  # bytes go out as they are, all else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, str, re.Pattern, Callable]] = []


def route(method: str, template: str) -> Callable:
    """Registers a handler; earlier routes win. `{name?}` stands for an optional last segment."""
    groups = {
        "T": "models|datasets|spaces",
        "P": "datasets/|spaces/|",
        "id": "[^/]+(?:/[^/]+)??",  # lazy: the namespace is optional, and what follows is not part of the id
        "path": ".+",
    }
    pattern = re.sub(r"/\{(\w+)\?\}", r"(?:/(?P<\1>.*))?", template)
    pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{groups.get(m[1], '[^/]+')})", pattern)

    def register(handler: Callable) -> Callable:
        for verb in method.split("|"):
            ROUTES.append((verb, f"{verb} {template}", re.compile(pattern), handler))
        return handler

    return register


def find_route(method: str, path: str) -> tuple[str, re.Match, Callable] | None:
    """The template, the match and the handler of a request."""
    for verb, template, pattern, handler in ROUTES:
        if verb == method and (found := pattern.fullmatch(path)):
            return template, found, handler
    return None


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def _whoami(hub: "HubServer", call: Call) -> Reply:
    return Reply(hub._user(call).whoami())


def _owner(hub: "HubServer", call: Call, repo_type: str, namespace: str) -> None:
    if not hub._user(call).can("write", namespace):
        raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')


@route("POST", "/api/repos/create")
def _create(hub: "HubServer", call: Call) -> Reply:
    kind, token = call.json.get("type") or "model", hub._user(call)
    repo_id = f"{call.json.get('organization') or token.user}/{call.json['name']}"
    _owner(hub, call, kind, repo_id.split("/")[0])
    url = f"{hub.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
    if hub.exists(kind, repo_id):
        error = f"You already created this {kind} repo"
        return Reply({"error": error, "url": url}, 409, {"X-Error-Message": error})
    hub.create(kind, repo_id, call.json.get("visibility") == "private" or bool(call.json.get("private")))
    return Reply({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def _delete(hub: "HubServer", call: Call) -> Reply:
    name = call.json["name"]
    repo_id = f"{call.json.get('organization') or hub._user(call).user}/{name}"
    call.parts.update(T=f"{call.json.get('type') or 'model'}s", id=repo_id)
    repo = hub._repo(call, write=True)
    del hub.repos[repo.type, repo.id]
    return Reply()


@route("POST", "/api/repos/move")
def _move(hub: "HubServer", call: Call) -> Reply:
    kind, new = call.json["type"], call.json["toRepo"]
    call.parts.update(T=f"{kind}s", id=call.json["fromRepo"])
    repo = hub._repo(call, write=True)
    _owner(hub, call, kind, new.split("/")[0])
    if hub.exists(kind, new):
        raise HubError(409, f"There is already a {kind} repo with the name {new}")
    # The old name keeps leading to the repository. The Hub redirects; here it is just another name.
    hub.moved[kind, repo.id] = new
    hub.moved.pop((kind, new), None)
    hub.repos[kind, new] = hub.repos.pop((kind, repo.id))
    repo.id = new
    return Reply()


@route("PUT", "/api/{T}/{id}/settings")
def _settings(hub: "HubServer", call: Call) -> Reply:
    repo, wanted = hub._repo(call, write=True), call.json
    if "visibility" in wanted or "private" in wanted:
        repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    repo.gated = wanted.get("gated", repo.gated)
    return Reply({"private": repo.private, "gated": repo.gated})


@route("GET", "/api/{T}/{id}/auth-check")
def _auth_check(hub: "HubServer", call: Call) -> Reply:
    hub._repo(call)
    return Reply()


@route("GET", "/api/{T}/{id}/auth-check/write")
def _auth_check_write(hub: "HubServer", call: Call) -> Reply:
    hub._repo(call, write=True)
    return Reply()


# Model and dataset cards


def _card(content: str) -> tuple[dict | None, list[str], list[str]]:
    """The front matter of a README, and the errors and the warnings that the Hub has about it."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    if not found or not found[1].strip():
        return None, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.load(found[1], _StrictLoader)
    except yaml.YAMLError as error:
        return None, [f"YAML metadata: {error}"], []
    if not isinstance(data, dict):
        return None, ['"value" must be of type object'], []
    errors = []
    for key, what in {"base_model": "a model id from https://hf.co/models", "datasets": "a dataset id"}.items():
        values = data.get(key)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use {what}.')
    for key in ("tags", "language", "license", "library_name", "pipeline_tag"):
        values = data.get(key)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not isinstance(value, str):
                errors.append(f'"{key}" must be a string')
    return data, errors + _model_index_errors(data.get("model-index")), []


def _model_index_errors(index: Any) -> list[str]:
    """What is missing in a `model-index`, in the Hub's words."""
    errors = []

    def need(owner: Any, key: str, name: str, kind: type | tuple[type, ...] = object) -> Any:
        value = owner.get(key) if isinstance(owner, dict) else None
        if value is None or value == "":
            errors.append(f'"{name}.{key}" is required')
        elif not isinstance(value, kind):
            errors.append(f'"{name}.{key}" must be of another type than {type(value).__name__}')
        else:
            return value
        return [] if kind is list else {}

    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    for i, model in enumerate(index):
        need(model, "name", f"model-index[{i}]", str)
        for j, result in enumerate(need(model, "results", f"model-index[{i}]", list)):
            name = f"model-index[{i}].results[{j}]"
            need(need(result, "task", name, dict), "type", f"{name}.task", str)
            dataset = need(result, "dataset", name, dict)
            need(dataset, "type", f"{name}.dataset", str)
            need(dataset, "name", f"{name}.dataset", str)
            for k, metric in enumerate(need(result, "metrics", name, list)):
                need(metric, "type", f"{name}.metrics[{k}]", str)
                need(metric, "value", f"{name}.metrics[{k}]")
    return errors


class _StrictLoader(yaml.SafeLoader):
    """The Hub refuses a key that is given twice; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(problem="duplicated mapping key", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


@route("POST", "/api/validate-yaml")
def _validate_yaml(hub: "HubServer", call: Call) -> Reply:
    _, errors, warnings = _card(call.json["content"])
    messages = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return Reply(messages, 400 if errors else 200)


# Uploads


@route("POST", "/api/{T}/{id}/preupload/{rev}")
def _preupload(hub: "HubServer", call: Call) -> Reply:
    here = hub._may_propose(call).resolve(call.parts["rev"]).files
    files = []
    for wanted in call.json["files"]:
        path = wanted["path"]
        mode = "lfs" if is_lfs(path, wanted["size"]) else "regular"
        # By this the client leaves out what has not changed
        known = {"oid": here[path].etag} if path in here else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Reply({"files": files})


@route("POST", "/{P}{id}.git/info/lfs/objects/batch")
def _lfs_batch(hub: "HubServer", call: Call) -> Reply:
    repo, objects = hub._repo(call), []
    if not hub._user(call).can("write", repo.namespace) and "refs/pr" not in str(call.json.get("ref")):
        raise HubError(403, "You are not allowed to upload to this repository")
    for wanted in call.json["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        # The address is all the authority that an upload needs, as with the Hub's signed ones
        address = f"{hub.url}/_lfs/{repo.type}/{quote(repo.id, safe='')}/{oid}"
        upload: dict[str, Any] = {"href": address}
        if size > hub.multipart_threshold and "multipart" in call.json["transfers"]:
            chunk = min(hub.multipart_chunk, hub.multipart_threshold)
            parts = {str(n + 1): f"{address}/{n + 1}" for n in range(-(-size // chunk))}
            upload["header"] = {"chunk_size": str(chunk), **parts}
        verify = {"href": f"{hub.url}/{repo.prefix}{repo.id}.git/info/lfs/verify"}
        known = oid in repo.lfs
        objects.append(
            {"oid": oid, "size": size} | ({} if known else {"actions": {"upload": upload, "verify": verify}})
        )
    return Reply({"transfer": "basic", "objects": objects})


def _store(hub: "HubServer", call: Call, data: bytes) -> Reply:
    if hashlib.sha256(data).hexdigest() != call.parts["oid"]:
        raise HubError(400, "The content does not have the sha256 that was announced")
    hub._get(call.parts["kind"], call.parts["repo"]).lfs[call.parts["oid"]] = data
    return Reply(b"")


@route("PUT", "/_lfs/{kind}/{repo}/{oid}")
def _lfs_put(hub: "HubServer", call: Call) -> Reply:
    return _store(hub, call, call.body)


@route("PUT", "/_lfs/{kind}/{repo}/{oid}/{part}")
def _lfs_part(hub: "HubServer", call: Call) -> Reply:
    repo = hub._get(call.parts["kind"], call.parts["repo"])
    repo.parts[call.parts["oid"], int(call.parts["part"])] = call.body
    return Reply(b"", headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", "/_lfs/{kind}/{repo}/{oid}")
def _lfs_complete(hub: "HubServer", call: Call) -> Reply:
    repo, oid = hub._get(call.parts["kind"], call.parts["repo"]), call.parts["oid"]
    chunks = []
    for part in call.json["parts"]:
        chunk = repo.parts.get((oid, part["partNumber"]))
        if chunk is None or hashlib.md5(chunk).hexdigest() != part["etag"].strip('"'):
            raise HubError(400, f"Part {part['partNumber']} was not uploaded")
        chunks.append(chunk)
    return _store(hub, call, b"".join(chunks))


@route("POST", "/{P}{id}.git/info/lfs/verify")
def _lfs_verify(hub: "HubServer", call: Call) -> Reply:
    data = hub._repo(call).lfs.get(call.json["oid"])
    if data is None or len(data) != call.json["size"]:
        raise HubError(404, "The object was not uploaded")
    return Reply()


@route("POST", "/api/{T}/{id}/commit/{rev}")
def _commit(hub: "HubServer", call: Call) -> Reply:
    repo, pull = hub._may_propose(call), call.flag("create_pr")
    header: dict[str, str] = {}
    operations: list[tuple[str, str, File | None]] = []
    for line in filter(None, call.body.splitlines()):
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            data = value["content"].encode()
            data = base64.b64decode(data) if value.get("encoding") == "base64" else data
            operations.append(("add", value["path"], File.make(data, lfs=False)))
            if value["path"] == "README.md" and (errors := _card(data.decode(errors="replace"))[1]):
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            operations.append(("add", value["path"], File.make(repo.lfs[value["oid"]], lfs=True)))
        elif key in ("deletedFile", "deletedFolder"):
            operations.append(("delete" if key == "deletedFile" else "delete_folder", value["path"], None))
        else:
            raise HubError(400, f"Unknown operation {key!r}")
    if not header.get("summary"):
        raise HubError(400, "A commit needs a summary")
    title, message, user = header["summary"], header.get("description", ""), hub._user(call).user
    commit, number = repo.apply(
        operations, call.parts["rev"], title, message, user, header.get("parentCommit"), pull=pull
    )
    base = f"{hub.url}/{repo.prefix}{repo.id}"
    made = {"pullRequestUrl": f"{base}/discussions/{number}"} if number else {}
    return Reply({"success": True, "commitUrl": f"{base}/commit/{commit.oid}", "commitOid": commit.oid, **made})


# Content


@route("GET|HEAD", "/{P}{id}/resolve/{rev}/{path}")
def _resolve(hub: "HubServer", call: Call) -> Reply:
    commit, file = hub._repo(call).file(call.parts["rev"], call.parts["path"])
    size = len(file.data)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(size)}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not wanted or wanted[0] == "bytes=-":
        return Reply(file.data, headers=headers)
    first, last = wanted.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
    return Reply(file.data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _entries(repo: Repository, commit: Commit, expand: bool) -> dict[str, dict]:
    """Every file and every folder of a commit, as the API shows them."""
    entries: dict[str, dict] = {}
    for path, oid in tree_oids(commit.files).items():
        if path:
            entries[path] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    for path, file in commit.files.items():
        entries[path] = {"type": "file", "oid": file.oid, "size": len(file.data), "path": path}
        if file.sha256:
            entries[path]["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": file.pointer_size}
    if expand:
        log = repo.log(commit.oid)
        for path, entry in entries.items():
            last = repo.last_change(log, path)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": timestamp(last.date)}
    return dict(sorted(entries.items()))


@route("GET", "/api/{T}/{id}/tree/{rev}/{path?}")
def _tree(hub: "HubServer", call: Call) -> Reply:
    repo = hub._repo(call)
    commit, folder = repo.resolve(call.parts["rev"]), call.parts["path"].strip("/")
    entries = _entries(repo, commit, call.flag("expand"))
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise HubError(404, f"{folder} does not exist on {call.parts['rev']}", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    inside = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
    if not call.flag("recursive"):
        inside = {path: entry for path, entry in inside.items() if "/" not in path.removeprefix(prefix)}
    return hub._paged(call, list(inside.values()))


@route("POST", "/api/{T}/{id}/paths-info/{rev}")
def _paths_info(hub: "HubServer", call: Call) -> Reply:
    repo, form = hub._repo(call), parse_qs(call.body.decode())
    expand = form.get("expand", [""])[0].lower() in ("1", "true")
    entries = _entries(repo, repo.resolve(call.parts["rev"]), expand)
    return Reply([entries[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in entries])


# History


@route("GET", "/api/{T}/{id}/refs")
def _refs(hub: "HubServer", call: Call) -> Reply:
    repo = hub._repo(call)

    def show(prefix: str) -> list[dict]:
        found = {ref: oid for ref, oid in repo.refs().items() if ref.startswith(prefix)}
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

    reply = {"branches": show("refs/heads/"), "converts": [], "tags": show("refs/tags/")}
    return Reply(reply | ({"pullRequests": show("refs/pr/")} if call.flag("include_prs") else {}))


@route("GET", "/api/{T}/{id}/commits/{rev}")
def _commits(hub: "HubServer", call: Call) -> Reply:
    log = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in hub._repo(call).log(call.parts["rev"])
    ]
    return hub._paged(call, log)


@route("POST", "/api/{T}/{id}/branch/{name}")
def _create_branch(hub: "HubServer", call: Call) -> Reply:
    repo, name = hub._repo(call, write=True), call.parts["name"]
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.resolve(call.json.get("startingPoint") or "main").oid
    return Reply()


@route("DELETE", "/api/{T}/{id}/branch/{name}")
def _delete_branch(hub: "HubServer", call: Call) -> Reply:
    repo, name = hub._repo(call, write=True), call.parts["name"]
    if name == "main":
        raise HubError(403, "Cannot delete refs/heads/main")
    if repo.branches.pop(name, None) is None:
        raise HubError(404, f"Reference does not exist: refs/heads/{name}", "RevisionNotFound")
    return Reply()


@route("POST", "/api/{T}/{id}/tag/{rev}")
def _create_tag(hub: "HubServer", call: Call) -> Reply:
    repo, name = hub._repo(call, write=True), call.json["tag"]
    commit = repo.resolve(call.parts["rev"])
    if name in repo.tags:
        raise HubError(409, f"Reference already exists: refs/tags/{name}")
    repo.tags[name] = commit.oid
    return Reply()


@route("DELETE", "/api/{T}/{id}/tag/{name}")
def _delete_tag(hub: "HubServer", call: Call) -> Reply:
    if hub._repo(call, write=True).tags.pop(call.parts["name"], None) is None:
        raise HubError(404, f"Reference does not exist: refs/tags/{call.parts['name']}", "RevisionNotFound")
    return Reply()


@route("POST", "/api/{T}/{id}/super-squash/{branch}")
def _squash(hub: "HubServer", call: Call) -> Reply:
    hub._repo(call, write=True).squash(call.parts["branch"], call.json.get("message") or "Super-squash")
    return Reply()


@route("GET", "/api/{T}/{id}/discussions")
def _discussions(hub: "HubServer", call: Call) -> Reply:
    repo = hub._repo(call)
    found = [
        {
            "num": number,
            "title": repo.pull_titles[number],
            "author": {"name": repo.author},
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": repo.type},
            "createdAt": timestamp(repo.history[oid].date),
        }
        for number, oid in sorted(repo.pulls.items())
    ]
    first = call.query.get("p", ["0"])[0] == "0"
    return Reply({"discussions": found if first else [], "count": len(found), "start": 0 if first else len(found)})


# What there is


def _info(repo: Repository, commit: Commit, siblings: bool, blobs: bool = False) -> dict:
    readme = commit.files.get("README.md")
    card = (readme and _card(readme.data.decode(errors="replace"))[0]) or {}
    as_list = {key: value if isinstance(value, list) else [value] for key, value in card.items() if value}
    tags = [*map(str, as_list.get("tags", [])), *as_list.get("library_name", [])]
    for key, name in {"license": "license", "datasets": "dataset", "base_model": "base_model"}.items():
        tags += [f"{name}:{value}" for value in as_list.get(key, [])]
    info = {
        "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(tags)),
        "createdAt": timestamp(repo.created),
        "lastModified": timestamp(commit.date),
        "cardData": json.loads(json.dumps(card, default=str)),
    }
    if repo.type == "model":
        info["modelId"] = repo.id
        info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        try:
            config = json.loads(commit.files["config.json"].data)
            info["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
        except (KeyError, ValueError, TypeError):
            pass
    if siblings:
        info["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
        for entry in info["siblings"] if blobs else ():
            file = commit.files[entry["rfilename"]]
            entry |= {"size": len(file.data), "blobId": file.oid}
            if file.sha256:
                entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": file.pointer_size}
    return info


@route("GET", "/api/{T}")
def _list(hub: "HubServer", call: Call) -> Reply:
    found = []
    for (kind, repo_id), repo in sorted(hub.repos.items()):
        if f"{kind}s" != call.parts["T"] or (
            repo.private and not (call.token and call.token.can("read", repo.namespace))
        ):
            continue
        info = _info(repo, repo.resolve("main"), call.flag("full"))
        searched = " ".join(call.query.get("search", [])).lower()
        author = call.query.get("author", [repo.namespace])[0]
        tags = call.query.get("filter", [])
        if author == repo.namespace and searched in repo_id.lower() and set(tags) <= set(info["tags"]):
            found.append(info)
    return hub._paged(call, found)


@route("GET", "/api/{T}/{id}/revision/{rev}")
@route("GET", "/api/{T}/{id}")
def _repo_info(hub: "HubServer", call: Call) -> Reply:
    repo = hub._repo(call)
    commit = repo.resolve(call.parts.get("rev") or "main")
    return Reply(_info(repo, commit, siblings=True, blobs=call.flag("blobs")))
