"""What the test Hub keeps: repositories with immutable commits, addressed as git addresses them."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath


# What `.gitattributes` of a new repository on the Hub sends to LFS, and the images that it adds for datasets
LFS_SUFFIXES = (
    ".7z .arrow .avro .bin .bz2 .ckpt .ftz .gguf .gz .h5 .jpeg .jpg .joblib .mlmodel .model .msgpack .npy .npz .onnx "
    ".ot .parquet .pb .pickle .pkl .png .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .webp .xz .zip .zst"
).split()
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """A refusal, as the Hub words it: `code` goes into `X-Error-Code`, by which the client picks the exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


def is_lfs(path: str, size: int) -> bool:
    # An empty file is committed as a regular one, whatever its name
    return size > 0 and (path.lower().endswith(tuple(LFS_SUFFIXES)) or size > LFS_SIZE)


def git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def timestamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


@dataclass(frozen=True)
class File:
    """One file of a commit; `oid` is the oid of the blob that git holds: of the pointer, for an LFS file."""

    data: bytes = field(repr=False)
    oid: str
    sha256: str | None
    pointer_size: int

    @classmethod
    def make(cls, data: bytes, lfs: bool) -> "File":
        if not lfs:
            return cls(data, git_oid("blob", data), None, 0)
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        return cls(data, git_oid("blob", pointer), sha256, len(pointer))

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def tree_oids(files: Mapping[str, File]) -> dict[str, str]:
    """The git oid of every folder; the root is the empty path."""
    folders: dict[str, dict[str, tuple[bytes, str]]] = {"": {}}
    for path, file in files.items():
        parents = [str(parent) for parent in PurePosixPath(path).parents][:-1]
        for parent in parents:
            folders.setdefault(parent, {})
        folders[parents[0] if parents else ""][PurePosixPath(path).name] = (b"100644", file.oid)
    oids = {}
    for folder in sorted(folders, key=lambda path: (-path.count("/"), path == "", path)):
        # git sorts a folder as if its name ended in a slash
        entries = sorted(folders[folder].items(), key=lambda item: item[0] + ("/" if item[1][0] == b"40000" else ""))
        data = b"".join(mode + b" " + name.encode() + b"\0" + bytes.fromhex(oid) for name, (mode, oid) in entries)
        oids[folder] = git_oid("tree", data)
        if folder:
            parent, _, name = folder.rpartition("/")
            folders[parent][name] = (b"40000", oids[folder])
    return oids


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, File] = field(repr=False)


class Repository:
    def __init__(self, repo_type: str, repo_id: str, private: bool, author: str):
        self.type, self.id, self.private, self.author = repo_type, repo_id, private, author
        self.gated: str | bool = False
        self.created = datetime.now(UTC)
        self.history: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[int, str] = {}
        self.pull_titles: dict[int, str] = {}
        self.lfs: dict[str, bytes] = {}  # uploaded objects: a commit may only point to these
        self.parts: dict[tuple[str, int], bytes] = {}  # of uploads in parts that are not complete yet
        attributes = File.make(GITATTRIBUTES.encode(), lfs=False)
        self.branches["main"] = self._add({".gitattributes": attributes}, None, "initial commit", "", "system").oid

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def prefix(self) -> str:
        """What comes before the id in the address of anything but the API."""
        return "" if self.type == "model" else f"{self.type}s/"

    def _add(self, files: Mapping[str, File], parent: str | None, title: str, message: str, author: str) -> Commit:
        date = datetime.now(UTC)
        lines = [f"tree {tree_oids(files)['']}", *([f"parent {parent}"] if parent else [])]
        lines += [f"author {author} {date.isoformat()}", "", title, "", message]
        oid = git_oid("commit", "\n".join(lines).encode())
        self.history[oid] = commit = Commit(oid, parent, title, message, author, date, dict(files))
        return commit

    def refs(self) -> dict[str, str]:
        """Full name of every ref and the commit that it points to."""
        return {
            **{f"refs/heads/{name}": oid for name, oid in self.branches.items()},
            **{f"refs/tags/{name}": oid for name, oid in self.tags.items()},
            **{f"refs/pr/{number}": oid for number, oid in self.pulls.items()},
        }

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref or an oid, which may be shortened."""
        refs = self.refs()
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return self.history[refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid, commit in self.history.items():
                if oid.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        return commit, commit.files[path]

    def log(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.history[commits[-1].parent])
        return commits

    def last_change(self, commits: list[Commit], path: str) -> Commit:
        """The newest of `commits` (newest first) that changed a file or anything in a folder."""

        def content(commit: Commit) -> dict[str, str]:
            return {name: f.oid for name, f in commit.files.items() if name == path or name.startswith(f"{path}/")}

        for commit, parent in zip(commits, commits[1:], strict=False):
            if content(commit) != content(parent):
                return commit
        return commits[-1]

    def apply(
        self,
        operations: Iterable[tuple[str, str, File | None]],
        revision: str,
        title: str,
        message: str = "",
        author: str = "alice",
        parent: str | None = None,
        pull: bool = False,
    ) -> tuple[Commit, int | None]:
        """One commit of `("add" | "delete" | "delete_folder", path, file)` on a branch or as a new pull request."""
        head = self.resolve(revision)
        name = revision.removeprefix("refs/heads/")
        number = re.fullmatch(r"refs/pr/(\d+)", revision)
        if not pull and name not in self.branches and not number:
            raise HubError(400, f"Cannot commit to {revision}: only to a branch or a pull request")
        if parent is not None:
            if pull:
                head = self.resolve(parent)
            elif not re.fullmatch("[0-9a-f]{5,40}", parent) or not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for kind, path, file in operations:
            if kind == "add":
                if not path or path.startswith("/") or ".." in path.split("/"):
                    raise HubError(400, f"Invalid path: {path!r}")
                files[path] = file
            elif kind == "delete":
                if files.pop(path, None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                if not inside:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for inner in inside:
                    del files[inner]
        commit = self._add(files, head.oid, title, message, author)
        if pull:
            number = len(self.pulls) + 1
            self.pulls[number], self.pull_titles[number] = commit.oid, title
            return commit, number
        if number:
            self.pulls[int(number[1])] = commit.oid
        else:
            self.branches[name] = commit.oid
        return commit, None

    def squash(self, branch: str, message: str) -> None:
        """One commit with the content of the branch and no parent; the old commits stay reachable by oid."""
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = self.resolve(branch).files
        self.branches[branch] = self._add(files, None, message, "", self.author).oid
