"""The test Hub against the real clients: everything that other tests rely on it for.

The `hub` fixture fails each of these tests if a client asked for something that the server does not know, or if the
server itself failed.
"""

import hashlib
import shutil
import subprocess
import sys
import time

import pytest
from hub_server import FAULT_KINDS, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from surroundings import client_env, server
from tiny_models import make_model
from tiny_pairs import make_dataset
from tiny_runs import QUICK


WEIGHTS = bytes(range(256)) * 40
MODEL_INDEX = """---
library_name: trl
base_model: org/base
tags: [ama, dpo]
license: mit
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {type: org/data, name: Data}
    metrics:
    - {type: accuracy, value: 0.5}
---
# Tiny
"""


@pytest.fixture
def api() -> HfApi:
    return HfApi()


def http_client():
    """The HTTP library of the client: `httpx`, or its successor."""
    return sys.modules[type(get_session()).__module__.split(".")[0]]


def status(call, *args, **kwargs) -> int:
    with pytest.raises(HfHubHTTPError) as info:
        call(*args, **kwargs)
    return info.value.response.status_code


def without_attributes(tree: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in tree.items() if path != ".gitattributes"}


# Accounts


def test_the_token_comes_from_the_environment_at_call_time(hub, api, monkeypatch):
    assert get_token() == hub.WRITE_TOKEN
    assert api.whoami()["name"] == "alice"
    monkeypatch.setenv("HF_TOKEN", hub.OTHER_TOKEN)
    assert api.whoami()["name"] == "mallory"


@pytest.mark.parametrize(
    "token, name, orgs, role",
    [
        ("WRITE_TOKEN", "alice", ["org"], "write"),
        ("READ_TOKEN", "alice", ["org"], "read"),
        ("OTHER_TOKEN", "mallory", [], "write"),
        ("FINE_TOKEN_READ", "alice", ["org"], "fineGrained"),
        ("FINE_TOKEN_WRITE", "alice", ["org"], "fineGrained"),
    ],
)
def test_whoami(hub, api, token, name, orgs, role):
    me = api.whoami(token=getattr(hub, token))
    assert me["name"] == name and [org["name"] for org in me["orgs"]] == orgs
    assert all(org["roleInOrg"] == "admin" for org in me["orgs"])
    access = me["auth"]["accessToken"]
    assert me["auth"]["type"] == "access_token" and access["role"] == role
    scopes = {one["entity"]["name"]: one["permissions"] for one in access.get("fineGrained", {}).get("scoped", [])}
    assert {name for name, permissions in scopes.items() if "repo.write" in permissions} == (
        {"alice", "org"} if token == "FINE_TOKEN_WRITE" else set()
    )


def test_an_unknown_token(hub, api):
    hub.write("model", "alice/public", {"a.txt": "a"})
    assert status(api.whoami, token="hf_unknown") == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as info:
        api.model_info("alice/public", token="hf_unknown")
    assert info.value.response.status_code == 401 and not isinstance(info.value, RepositoryNotFoundError)


@pytest.mark.parametrize("token", ["READ_TOKEN", "FINE_TOKEN_READ", "OTHER_TOKEN"])
def test_who_may_not_write(hub, api, token):
    api, token = HfApi(token=getattr(hub, token)), getattr(hub, token)
    head = hub.write("model", "alice/public", {"a.txt": "a", "w.safetensors": WEIGHTS})
    assert api.model_info("alice/public").sha == head
    with open(api.hf_hub_download("alice/public", "a.txt"), "rb") as file:
        assert file.read() == b"a"
    api.auth_check("alice/public")
    upload = {"path_or_fileobj": b"b", "repo_id": "alice/public"}
    refused = [
        (api.create_repo, ("alice/new",), {}),
        (api.upload_file, (), {**upload, "path_in_repo": "a.txt"}),
        (api.upload_file, (), {**upload, "path_in_repo": "b.safetensors"}),
        (api.delete_file, ("a.txt", "alice/public"), {}),
        (api.create_branch, ("alice/public",), {"branch": "b"}),
        (api.create_tag, ("alice/public",), {"tag": "t"}),
        (api.delete_repo, ("alice/public",), {}),
        (api.update_repo_settings, ("alice/public",), {"private": True}),
        (api.super_squash_history, ("alice/public",), {}),
        (api.auth_check, ("alice/public",), {"write": True}),
    ]
    for call, args, kwargs in refused:
        assert status(call, *args, **kwargs) == 403, call
    assert hub.commits("model", "alice/public")[0].oid == head
    assert not hub.exists("model", "alice/new") and not hub.is_private("model", "alice/public")
    # `create_repo` looks whether there is a repository to use before it complains
    assert api.create_repo("alice/public", exist_ok=True).repo_id == "alice/public"


def test_who_may_write(hub, api):
    for kind, token in {"classic": hub.WRITE_TOKEN, "fine": hub.FINE_TOKEN_WRITE}.items():
        for namespace in ("alice", "org"):
            name = f"{namespace}/{kind}"
            assert api.create_repo(name, token=token, private=True).repo_id == name
            api.upload_file(path_or_fileobj=b"1", path_in_repo="1", repo_id=name, token=token)
            api.auth_check(name, write=True, token=token)
            assert hub.tree("model", name)["1"] == b"1"
        assert status(api.create_repo, "mallory/x", token=token) == 403
    assert status(api.create_repo, "alice/anonymous", token=False) == 401


def test_private_repositories_are_not_there_for_others(hub, api, tmp_path):
    hub.create("dataset", "org/secret", private=True)
    hub.write("dataset", "org/secret", {"a.txt": "a"})
    for token in (hub.WRITE_TOKEN, hub.READ_TOKEN, hub.FINE_TOKEN_READ):
        assert api.dataset_info("org/secret", token=token).private
    for token in (hub.OTHER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            api.dataset_info("org/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "a.txt", repo_type="dataset", token=token, cache_dir=tmp_path)
        assert not api.repo_exists("org/secret", repo_type="dataset", token=token)
        assert [info.id for info in api.list_datasets(author="org", token=token)] == []
    assert [info.id for info in api.list_datasets(author="org")] == ["org/secret"]
    api.update_repo_settings("org/secret", repo_type="dataset", private=False)
    assert not hub.is_private("dataset", "org/secret")
    assert api.dataset_info("org/secret", token=False).id == "org/secret"


def test_missing_things(hub, api):
    started = time.monotonic()
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/nothing", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("gpt2")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/tiny", "a.txt", revision="nothing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/tiny", "nothing.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/tiny", "nothing"))
    assert not api.file_exists("alice/tiny", "nothing.txt") and api.file_exists("alice/tiny", "a.txt")
    assert api.get_paths_info("alice/tiny", ["nothing.txt", "a.txt"])[0].path == "a.txt"
    assert time.monotonic() - started < 5


# Repositories and commits


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_the_life_of_a_repository(hub, api, repo_type):
    kind = {"repo_type": repo_type}
    sdk = {"space_sdk": "static"} if repo_type == "space" else {}
    url = api.create_repo("alice/first", private=True, **kind, **sdk)
    assert url.repo_id == "alice/first" and url.repo_type == repo_type and url.endpoint == hub.url
    assert hub.is_private(repo_type, "alice/first")
    assert status(api.create_repo, "alice/first", **kind, **sdk) == 409
    assert api.create_repo("alice/first", exist_ok=True, **kind, **sdk).repo_id == "alice/first"
    assert [commit.title for commit in hub.commits(repo_type, "alice/first")] == ["initial commit"]
    info = api.upload_file(path_or_fileobj=b"1", path_in_repo="a/1.txt", repo_id="alice/first", **kind)
    assert info.oid == hub.commits(repo_type, "alice/first")[0].oid
    api.move_repo("alice/first", "org/second", **kind)
    assert not hub.exists(repo_type, "alice/first")
    assert api.repo_info("org/second", **kind).sha == api.repo_info("alice/first", **kind).sha == info.oid
    assert api.create_repo("third", **kind, **sdk).repo_id == "alice/third"
    assert status(api.move_repo, "alice/third", "org/second", **kind) == 409
    api.delete_repo("org/second", **kind)
    assert not hub.exists(repo_type, "org/second")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/second", **kind)
    api.delete_repo("org/second", missing_ok=True, **kind)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_oids_are_those_of_git(hub, api, tmp_path):
    """Compared with git itself: the client recognizes unchanged files by them."""
    files = {"b.txt": b"text\n", "sub/x/c.txt": b"", "sub.txt": b"a", "sub-a/z": b"z"}
    hub.write("model", "alice/tiny", files)
    listed = {entry.path: entry for entry in api.list_repo_tree("alice/tiny", recursive=True)}
    for path, data in hub.tree("model", "alice/tiny").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)

    def git(*args: str) -> str:
        command = ["git", "-c", "core.autocrlf=false", *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", "-f", ".")
    tree = git("write-tree").strip()
    for line in git("ls-tree", "-r", "-t", tree).splitlines():
        (_, kind, oid), path = line.split("\t")[0].split(), line.split("\t")[1]
        assert oid == (listed[path].blob_id if kind == "blob" else listed[path].tree_id), path


def test_a_commit_with_every_operation(hub, api):
    hub.write("model", "alice/tiny", {"old.txt": "old", "dir/a.txt": "a", "dir/sub/b.txt": "b", "w.bin": WEIGHTS})
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationAdd("new.safetensors", WEIGHTS[::-1]),
        CommitOperationAdd("empty.bin", b""),
        CommitOperationDelete("old.txt"),
        CommitOperationDelete("dir/"),
        CommitOperationCopy("w.bin", "copy.bin"),
    ]
    info = api.create_commit("alice/tiny", operations, commit_message="All", commit_description="of them")
    assert without_attributes(hub.tree("model", "alice/tiny")) == {
        "new.txt": b"new",
        "new.safetensors": WEIGHTS[::-1],
        "empty.bin": b"",
        "w.bin": WEIGHTS,
        "copy.bin": WEIGHTS,
    }
    commit, parent = hub.commits("model", "alice/tiny")[:2]
    assert (commit.oid, commit.title, commit.message, commit.author) == (info.oid, "All", "of them", "alice")
    assert commit.parent == parent.oid
    # The old content is still there, under its own commit
    assert "old.txt" in hub.tree("model", "alice/tiny", parent.oid)
    with open(hf_hub_download("alice/tiny", "dir/sub/b.txt", revision=parent.oid), "rb") as file:
        assert file.read() == b"b"
    assert [one.commit_id for one in api.list_repo_commits("alice/tiny")][:2] == [commit.oid, parent.oid]
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("old.txt", "alice/tiny")


def test_folders_and_listings(hub, api, tmp_path):
    for path, data in {"a.txt": b"a", "sub/b.txt": b"b", "sub/w.safetensors": WEIGHTS, "sub/c.log": b"c"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    api.create_repo("alice/tiny")
    settings = {"repo_id": "alice/tiny", "folder_path": tmp_path, "ignore_patterns": "*.log"}
    first = api.upload_folder(**settings)
    assert sorted(api.list_repo_files("alice/tiny")) == [".gitattributes", "a.txt", "sub/b.txt", "sub/w.safetensors"]
    hub.clear_log()
    assert api.upload_folder(**settings).oid == first.oid  # nothing has changed: no commit
    assert not [request for request in hub.requests if "/commit/" in request.path or request.method == "PUT"]
    (tmp_path / "a.txt").write_bytes(b"changed")
    api.upload_folder(**settings, path_in_repo="deep", delete_patterns="*.nothing")
    hub.page_size = 2
    entries = {entry.path: entry for entry in api.list_repo_tree("alice/tiny", recursive=True, expand=True)}
    assert len(entries) == 10 and entries["deep/a.txt"].size == 7
    assert entries["sub"].last_commit.oid == entries["sub/b.txt"].last_commit.oid == first.oid
    assert entries["deep"].last_commit.oid == hub.commits("model", "alice/tiny")[0].oid
    weights = entries["sub/w.safetensors"].lfs
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and weights.size == len(WEIGHTS)
    assert {entry.path for entry in api.list_repo_tree("alice/tiny", "deep")} == {"deep/a.txt", "deep/sub"}
    assert len(api.list_repo_commits("alice/tiny")) == 3
    assert [entry.path for entry in api.get_paths_info("alice/tiny", ["sub", "a.txt"])] == ["sub", "a.txt"]
    siblings = {one.rfilename: one for one in api.model_info("alice/tiny", files_metadata=True).siblings}
    assert siblings["sub/w.safetensors"].lfs.sha256 == weights.sha256 and siblings["a.txt"].size == 1
    local = snapshot_download("alice/tiny", local_dir=tmp_path / "down", allow_patterns="sub/*")
    assert api.verify_repo_checksums("alice/tiny", local_dir=local).mismatches == []


def test_branches_tags_and_revisions(hub, api):
    first = hub.write("model", "alice/tiny", {"a.txt": "1"})
    api.create_tag("alice/tiny", tag="v1.0/rc")
    api.create_branch("alice/tiny", branch="step/2", revision=first)
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="alice/tiny", revision="step/2").oid
    expected = {"main": b"1", "v1.0/rc": b"1", first: b"1", first[:8]: b"1", "step/2": b"2", second: b"2"}
    for revision, content in {**expected, "refs/heads/step/2": b"2"}.items():
        with open(hf_hub_download("alice/tiny", "a.txt", revision=revision), "rb") as file:
            assert file.read() == content, revision
        assert hub.tree("model", "alice/tiny", revision)["a.txt"] == content
    refs = api.list_repo_refs("alice/tiny")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "step/2": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0/rc": first}
    assert status(api.create_tag, "alice/tiny", tag="v1.0/rc") == 409
    assert status(api.create_branch, "alice/tiny", branch="main") == 409
    api.create_tag("alice/tiny", tag="v1.0/rc", exist_ok=True)
    api.create_branch("alice/tiny", branch="main", exist_ok=True)
    assert status(api.create_branch, "alice/tiny", branch="b", revision="nothing") == 404
    assert status(api.upload_file, path_or_fileobj=b"", path_in_repo="b", repo_id="alice/tiny", revision="no") == 404
    assert status(api.upload_file, path_or_fileobj=b"", path_in_repo="b", repo_id="alice/tiny", revision=first) == 400
    api.delete_tag("alice/tiny", tag="v1.0/rc")
    api.delete_branch("alice/tiny", branch="step/2")
    assert status(api.delete_branch, "alice/tiny", branch="main") == 403
    assert status(api.delete_tag, "alice/tiny", tag="v1.0/rc") == 404
    hub.write("model", "alice/tiny", {"a.txt": "3"})
    api.super_squash_history("alice/tiny", commit_message="One")
    assert [commit.title for commit in hub.commits("model", "alice/tiny")] == ["One"]
    assert hub.tree("model", "alice/tiny")["a.txt"] == b"3"


def test_the_parent_of_a_commit(hub, api):
    first = hub.write("model", "alice/tiny", {"a.txt": "1"})
    upload = {"path_in_repo": "a.txt", "repo_id": "alice/tiny"}
    second = api.upload_file(path_or_fileobj=b"2", parent_commit=first, **upload).oid
    assert status(api.upload_file, path_or_fileobj=b"3", parent_commit=first, **upload) == 412
    assert hub.commits("model", "alice/tiny")[0].oid == second


def test_pull_requests(hub, api):
    head = hub.write("model", "alice/tiny", {"a.txt": "1"})
    other = HfApi(token=hub.OTHER_TOKEN)
    upload = {"path_or_fileobj": b"2", "path_in_repo": "a.txt", "repo_id": "alice/tiny"}
    info = other.upload_file(**upload, create_pr=True, commit_message="Proposal")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.commits("model", "alice/tiny")[0].oid == head
    assert hub.tree("model", "alice/tiny", "refs/pr/1")["a.txt"] == b"2"
    refs = api.list_repo_refs("alice/tiny", include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.pull_requests] == [("1", info.oid)]
    assert [one.title for one in api.get_repo_discussions("alice/tiny")] == ["Proposal"]
    api.upload_file(**{**upload, "path_or_fileobj": b"3"}, revision="refs/pr/1")
    assert hub.tree("model", "alice/tiny", "refs/pr/1")["a.txt"] == b"3"
    reader = HfApi(token=hub.READ_TOKEN)
    assert status(reader.upload_file, **upload, create_pr=True) == 403


@pytest.mark.parametrize("chunk", [1000, 4096])
def test_an_upload_in_parts(hub, api, chunk):
    hub.multipart_threshold, hub.multipart_chunk = 5000, chunk
    api.create_repo("alice/tiny")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.safetensors", repo_id="alice/tiny")
    parts = [request for request in hub.requests if request.route == "PUT /_lfs/{kind}/{repo}/{oid}/{part}"]
    assert len(parts) == -(-len(WEIGHTS) // chunk) and sum(request.received for request in parts) == len(WEIGHTS)
    assert hub.tree("model", "alice/tiny")["w.safetensors"] == WEIGHTS
    # What is there is not sent again
    hub.clear_log()
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="again.safetensors", repo_id="alice/tiny")
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_content_that_is_not_what_was_announced(hub):
    hub.create("model", "alice/tiny")
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    url = f"{hub.url}/_lfs/model/alice%2Ftiny/{oid}"
    assert get_session().put(url, content=WEIGHTS[:-1]).status_code == 400
    token = {"Authorization": f"Bearer {hub.WRITE_TOKEN}"}
    lines = (
        b'{"key": "header", "value": {"summary": "x"}}\n{"key": "lfsFile", "value": '
        b'{"path": "w.bin", "algo": "sha256", "oid": "%s", "size": 10240}}\n' % oid.encode()
    )
    commit = f"{hub.url}/api/models/alice/tiny/commit/main"
    assert get_session().post(commit, content=lines, headers=token).status_code == 400
    assert get_session().put(url, content=(WEIGHTS[i : i + 99] for i in range(0, 10240, 99))).status_code == 200
    assert get_session().post(commit, content=lines, headers=token).status_code == 200
    assert hub.tree("model", "alice/tiny")["w.bin"] == WEIGHTS


def test_ranges_and_headers(hub):
    head = hub.write("dataset", "alice/data", {"a.txt": "0123456789", "w.parquet": WEIGHTS})
    url = f"{hub.url}/datasets/alice/data/resolve/main"
    for wanted, content, shown in [
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ]:
        answer = get_session().get(f"{url}/a.txt", headers={"Range": wanted})
        assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (206, content, shown)
    assert get_session().get(f"{url}/a.txt", headers={"Range": "bytes=10-"}).status_code == 416
    answer = get_session().head(f"{url}/a.txt")
    assert answer.headers["ETag"] == f'"{hashlib.sha1(b"blob 10" + bytes(1) + b"0123456789").hexdigest()}"'
    assert answer.headers["X-Repo-Commit"] == head and answer.headers["Content-Length"] == "10"
    answer = get_session().head(f"{url}/w.parquet")
    oid = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert answer.headers["ETag"] == answer.headers["X-Linked-Etag"] == oid
    assert answer.headers["X-Linked-Size"] == str(len(WEIGHTS))


def test_lists(hub, api):
    hub.write("model", "alice/card", {"README.md": MODEL_INDEX, "config.json": '{"model_type": "llama"}'})
    hub.write("model", "org/plain", {"a.txt": ""})
    hub.page_size = 1
    assert [info.id for info in api.list_models()] == ["alice/card", "org/plain"]
    assert [info.id for info in api.list_models(author="org")] == ["org/plain"]
    assert [info.id for info in api.list_models(filter=["ama", "base_model:org/base"])] == ["alice/card"]
    assert [info.id for info in api.list_models(search="plai", full=True)] == ["org/plain"]
    assert [info.id for info in api.list_models(limit=1)] == ["alice/card"]
    info = api.model_info("alice/card")
    assert info.card_data.base_model == "org/base" and info.library_name == "trl"
    assert info.config == {"model_type": "llama"} and "license:mit" in info.tags


# Cards


def test_model_cards(hub, api):
    api.create_repo("alice/tiny")
    ModelCard(MODEL_INDEX).push_to_hub("alice/tiny")
    assert hub.tree("model", "alice/tiny")["README.md"].decode() == str(ModelCard(MODEL_INDEX))
    assert ModelCard.load("alice/tiny").data.eval_results[0].metric_value == 0.5
    metadata_update("alice/tiny", {"tags": ["ama", "new"], "pipeline_tag": "text-generation"}, overwrite=True)
    card = ModelCard.load("alice/tiny")
    assert card.data.tags == ["ama", "new"] and card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "tiny" and "# Tiny" in card.text
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No front matter", path_in_repo="README.md", repo_id="alice/tiny")


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("tags: [a", "YAML"),
        ("tags: a\ntags: b", "duplicated mapping key"),
        ("- a\n- b", "must be of type object"),
        ("base_model: /home/alice/model", '"base_model" with value "/home/alice/model" is not valid'),
        ("model-index: {name: x}", '"model-index" must be an array'),
        ("model-index: [{results: []}]", r"model-index\[0\]\.name"),
        ("model-index: [{name: x}]", r"model-index\[0\]\.results"),
        ("model-index: [{name: x, results: [{metrics: []}]}]", r"results\[0\]\.task"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: t}, metrics: []}]}]",
            r"dataset\.name",
        ),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: t, name: n}, metrics: [{type: a}]}]}]",
            r"metrics\[0\]\.value",
        ),
    ],
)
def test_cards_that_the_hub_refuses(hub, api, yaml, message):
    api.create_repo("alice/tiny")
    content = f"---\n{yaml}\n---\n# Text\n".encode()
    with pytest.raises(ValueError, match=message):
        api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="alice/tiny")
    assert "README.md" not in hub.tree("model", "alice/tiny")


# Libraries


def test_datasets(hub, hub_home):
    from datasets import Dataset, get_dataset_config_names, load_dataset

    train, test = make_dataset({"list": 6}), make_dataset({"sort": 3}, seed=1)
    train.push_to_hub("alice/data", "list", private=True)
    test.push_to_hub("alice/data", "sort", split="test")
    Dataset.from_dict({"x": list(range(999))}).push_to_hub("alice/data", "many", split="whole", num_shards=3)
    assert hub.is_private("dataset", "alice/data")
    paths = hub.tree("dataset", "alice/data")
    assert "list/train-00000-of-00001.parquet" in paths and "sort/test-00000-of-00001.parquet" in paths
    assert get_dataset_config_names("alice/data") == ["list", "many", "sort"]
    assert load_dataset("alice/data", "many")["whole"]["x"][:] == list(range(999))
    loaded = load_dataset("alice/data", "list", split="train")
    assert loaded.to_list() == train.to_list()
    assert load_dataset("alice/data", "sort")["test"].to_list() == test.to_list()
    streamed = load_dataset("alice/data", "sort", split="test", streaming=True)
    assert list(streamed) == test.to_list()
    # Pushed anew, in place of the old content; the old one is still there by its revision
    before = hub.commits("dataset", "alice/data")[0].oid
    train.select(range(2)).push_to_hub("alice/data", "list")
    assert len(load_dataset("alice/data", "list", split="train")) == 2
    assert len(load_dataset("alice/data", "list", split="train", revision=before)) == 6
    info = test.push_to_hub("alice/data", "brief", create_pr=True)
    assert info.pr_num == 1
    assert len(load_dataset("alice/data", "brief", revision="refs/pr/1")["train"]) == 3
    # Somebody else, with caches of their own
    code = "from datasets import load_dataset; load_dataset('alice/data', 'list')"
    for token in (hub.OTHER_TOKEN, None):
        done = subprocess.run([sys.executable, "-c", code], env=client_env(hub_home, token), capture_output=True)
        assert done.returncode and b"DatasetNotFoundError" in done.stderr


def test_data_files_of_a_repository(hub):
    from datasets import load_dataset

    hub.write("dataset", "org/rows", {"train.jsonl": '{"x": 1}\n{"x": 2}\n', "more/test.csv": "x\n3\n"})
    assert load_dataset("org/rows", data_files="train.jsonl", split="train").to_list() == [{"x": 1}, {"x": 2}]
    loaded = load_dataset("csv", data_files={"test": "hf://datasets/org/rows/more/test.csv"})
    assert loaded["test"].to_list() == [{"x": 3}]


def weights(model) -> dict:
    return {name: tensor.numpy(force=True).tobytes() for name, tensor in model.state_dict().items()}


def test_transformers(hub, api, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = make_model(len(tokenizer), seed=1), make_model(len(tokenizer), seed=2)
    old = first.push_to_hub("alice/tiny", private=True).oid
    assert hub.is_private("model", "alice/tiny")
    tokenizer.push_to_hub("alice/tiny")
    api.create_tag("alice/tiny", tag="first")
    second.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/tiny")
    second.push_to_hub("alice/tiny", revision="branch", max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub.tree("model", "alice/tiny", "branch")
    assert hub.tree("model", "alice/tiny")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    load = AutoModelForCausalLM.from_pretrained
    for settings, expected in [
        ({}, second),
        ({"revision": "first"}, first),
        ({"revision": old}, first),
        ({"revision": "branch"}, second),
    ]:
        assert weights(load("alice/tiny", **settings)) == weights(expected), settings
    loaded = AutoTokenizer.from_pretrained("alice/tiny")
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    for name in ("alice/nothing", "nothing"):
        with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
            load(name)
    with pytest.raises(OSError, match="is not a valid git identifier"):
        load("alice/tiny", revision="nothing")


def test_peft(hub, api, tokenizer):
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    make_model(len(tokenizer)).push_to_hub("alice/base")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained("alice/base")
        model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
        model.push_to_hub("alice/adapter")
        states.append(weights(model))
    assert states[0] != states[1]
    assert "adapter_model.safetensors" in hub.tree("model", "alice/adapter")
    titles = [commit.oid for commit in hub.commits("model", "alice/adapter")]
    base = AutoModelForCausalLM.from_pretrained("alice/base")
    assert weights(PeftModel.from_pretrained(base, "alice/adapter")) == states[1]
    base = AutoModelForCausalLM.from_pretrained("alice/base")
    assert weights(PeftModel.from_pretrained(base, "alice/adapter", revision=titles[1])) == states[0]
    assert weights(AutoPeftModelForCausalLM.from_pretrained("alice/adapter")) == states[1]
    # transformers finds the base model by itself
    adapted = AutoModelForCausalLM.from_pretrained("alice/adapter")
    assert set(adapted.peft_config) == {"default"}


def test_a_trainer(hub, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **{**QUICK, "save_strategy": "steps"},
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        push_to_hub=True,
        hub_model_id="alice/trained",
        hub_private_repo=True,
        hub_strategy="all_checkpoints",
        hub_always_push=True,  # also while the push before is under way, which a busy machine makes likely
    )
    data = make_dataset({"list": 16}, labelled=False)
    make_model(len(tokenizer)).push_to_hub("alice/base")
    model = AutoModelForCausalLM.from_pretrained("alice/base")
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub(commit_message="Done")
    assert hub.is_private("model", "alice/trained")
    tree = hub.tree("model", "alice/trained")
    assert {"README.md", "model.safetensors", "training_args.bin", "tokenizer.json"} <= set(tree)
    assert {"checkpoint-2/trainer_state.json", "checkpoint-4/optimizer.pt"} <= set(tree)
    titles = [commit.title for commit in hub.commits("model", "alice/trained")]
    assert "Training in progress, step 2" in titles and titles[-1] == "initial commit"
    assert weights(AutoModelForCausalLM.from_pretrained("alice/trained")) == weights(trainer.model)
    assert ModelCard.load("alice/trained").data.base_model == "alice/base"


# Faults


def test_fault_500(hub, api):
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("500", index=1, times=2)
    assert api.model_info("alice/tiny").id == "alice/tiny"
    assert [status(api.model_info, "alice/tiny") for _ in range(2)] == [500, 500]
    assert api.model_info("alice/tiny").id == "alice/tiny"
    assert [request.kind_failed for request in hub.requests] == [None, "500", "500", None]
    assert not hub.faults_pending and not hub.problems()


def test_fault_429(hub, api):
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("429", match=lambda method, path: "/tree/" in path)
    started = time.monotonic()
    assert [entry.path for entry in api.list_repo_tree("alice/tiny")] == [".gitattributes", "a.txt"]
    assert time.monotonic() - started > 1
    assert [request.status for request in hub.requests if "/tree/" in request.path] == [429, 200]


def test_fault_reset(hub, api):
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("reset", match=lambda method, path: "/commit/" in path)
    with pytest.raises(http_client().NetworkError):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="alice/tiny")
    assert hub.tree("model", "alice/tiny")["a.txt"] == b"a"
    assert [request.status for request in hub.requests if "/commit/" in request.path] == [None]


def test_fault_reset_after(hub, api):
    """The client is not told of an upload, and tries again; nor of a commit, and gives up, but there it is."""
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("reset_after", match=lambda method, path: method == "PUT")
    hub.fail("reset_after", match=lambda method, path: "/commit/" in path)
    with pytest.raises(http_client().NetworkError):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="alice/tiny")
    assert hub.tree("model", "alice/tiny")["w.bin"] == WEIGHTS
    assert [request.status for request in hub.requests if request.method == "PUT"] == [None, 200]
    assert len(hub.commits("model", "alice/tiny")) == 3


def test_fault_timeout(hub):
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("timeout", seconds=30, times=2)
    started = time.monotonic()
    with pytest.raises(http_client().TimeoutException):
        HfApi().model_info("alice/tiny", timeout=0.5)
    # A download without a copy to fall back on asks once more
    assert hf_hub_download("alice/tiny", "a.txt", etag_timeout=0.5)
    assert time.monotonic() - started < 10 and not hub.faults_pending
    # For a client without a timeout, the connection is closed in the end
    hub.fail("timeout", seconds=0.5)
    with pytest.raises(http_client().RemoteProtocolError):
        HfApi().model_info("alice/tiny")


def test_fault_truncated(hub, monkeypatch):
    # What is less than such a chunk is thrown away and asked for again
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    hub.write("model", "alice/tiny", {"w.bin": WEIGHTS})
    hub.fail("truncated", match=lambda method, path: "/resolve/" in path)
    with open(hf_hub_download("alice/tiny", "w.bin"), "rb") as file:
        assert file.read() == WEIGHTS
    sent = [(request.method, request.status, request.sent) for request in hub.requests]
    assert sent == [("HEAD", 200, 0), ("GET", 200, len(WEIGHTS) // 2), ("GET", 206, len(WEIGHTS) // 2)]


def test_faults_in_order(hub, api):
    hub.write("model", "alice/tiny", {"a.txt": "a"})
    hub.fail("500")
    hub.fail("reset")
    hub.fail("500", match=lambda method, path: "datasets" in path)
    assert status(api.model_info, "alice/tiny") == 500
    with pytest.raises(http_client().NetworkError):
        api.model_info("alice/tiny")
    assert api.model_info("alice/tiny").id
    assert [fault.kind for fault in hub.faults_pending] == ["500"]
    with pytest.raises(ValueError, match="unknown kind of fault"):
        hub.fail("503")
    assert set(FAULT_KINDS) == {"500", "429", "reset", "reset_after", "timeout", "truncated"}


# The server itself


def test_problems_are_found(api):
    own = HubServer().start()
    try:
        own.write("model", "alice/tiny", {"a.txt": "a"})
        get_session().get(f"{own.url}/api/agent-harnesses")
        get_session().get(f"{own.url}/api/models/alice/tiny")
        assert not own.problems()
        assert get_session().get(f"{own.url}/api/unheard-of").status_code == 404
        del own.repos["model", "alice/tiny"].branches["main"]
        own._get = None  # a bug
        assert get_session().get(f"{own.url}/api/models/alice/tiny").status_code == 500
        own.clear_log()
        unrouted, broken = own.problems()
        assert unrouted.route is None and "TypeError" in broken.error
    finally:
        own.stop()


def test_nothing_of_the_user_leaks_in(hub_home):
    """Neither this process nor its children know of the user's home, token or caches."""
    assert get_token() is None and not constants.HF_HUB_OFFLINE
    assert constants.ENDPOINT == server.url and "trl_ama_tests_" in constants.HF_HUB_CACHE
    code = (
        "import huggingface_hub.constants as hub, datasets.config as data; from huggingface_hub import get_token;"
        "print(hub.ENDPOINT, hub.HF_HUB_CACHE, hub.HF_TOKEN_PATH, data.HF_DATASETS_CACHE, get_token(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=client_env(hub_home), capture_output=True, text=True)
    endpoint, *paths, token = done.stdout.split()
    assert endpoint.startswith("http://127.0.0.1:") and token == "None"
    assert len(paths) == 3 and all(path.startswith(str(hub_home)) for path in paths)
