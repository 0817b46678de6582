"""What we ask of a lakeFS server: refs, commits, objects, branches, merges, tags."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

from dinov3.errors import StoreError
from dinov3.lake.refusal import refused
from dinov3.lake.sdk import Sdk, make_sdk
from dinov3.lake.wire import Incoming, Outgoing, Pace

ENV_FILE = Path(".dinov3/lakefs/env")  # written by the server that `make lakefs` starts
_VARIABLES = ("LAKEFS_ENDPOINT", "LAKEFS_ACCESS_KEY_ID", "LAKEFS_SECRET_ACCESS_KEY")
_TIMEOUT = "30"  # seconds the server may stay silent
_BUFFER_SIZE = 1 << 20
_PAGE_SIZE = 1000  # the most the server lists at once
_MISSING, _CONFLICT = 404, 409  # HTTP


@dataclass(frozen=True)
class Stat:
    """One object; `checksum` is the server's own and tells only whether bytes changed."""

    path: str
    size: int
    checksum: str
    modified: int  # seconds since 1970


@dataclass(frozen=True)
class Commit:
    """One commit; its metadata is what its author claimed."""

    id: str
    parents: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Lake:
    """One lakeFS server; every method raises `StoreError` where the server fails or refuses.

    May be shared by threads, pickled, and used after a fork: each process has its own connections.
    """

    endpoint: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    timeout: float = float(_TIMEOUT)
    _sdks: dict[int, Sdk] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def connect(
        cls, environment: Mapping[str, str] | None = None, *, timeout: float | None = None
    ) -> "Lake":
        """The server LAKEFS_ENDPOINT names, else the one `make lakefs` started; sends nothing yet.

        Args:
            environment: In place of the process's own.
            timeout: Seconds the server may stay silent; default LAKEFS_TIMEOUT, else 30.
        """
        settings = dict(os.environ if environment is None else environment)
        if not settings.get("LAKEFS_ENDPOINT"):
            settings |= _read_env_file(ENV_FILE)
        missing = [name for name in _VARIABLES if not settings.get(name)]
        if missing:
            msg = f"{missing[0]}: not set. Set {', '.join(_VARIABLES)}, or run make lakefs."
            raise StoreError(msg)
        if timeout is None:
            timeout = _seconds(settings.get("LAKEFS_TIMEOUT", _TIMEOUT))
        endpoint, access_key, secret_key = (settings[name] for name in _VARIABLES)
        return cls(endpoint.rstrip("/").removesuffix("/api/v1"), access_key, secret_key, timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lake, (self.endpoint, self.access_key_id, self.secret_access_key, self.timeout)

    def has_repository(self, repo: str) -> bool:
        """Whether the repository is there."""
        sdk = self._sdk
        found = self._sdk.call(
            repo, sdk.repositories.get_repository, repo, expected={_MISSING: None}
        )
        return found is not None

    def create_repository(self, repo: str, namespace: str) -> bool:
        """Makes a repository with the branch `main`; False where it is there already.

        Args:
            repo: Its name.
            namespace: Where the server puts its bytes, e.g. `s3://bucket/folder`; never used twice.
        """
        wish = self._sdk.model(
            repo,
            "RepositoryCreation",
            name=repo,
            storage_namespace=namespace,
            default_branch="main",
        )
        call = self._sdk.repositories.create_repository
        return self._sdk.call(repo, call, wish, expected={_CONFLICT: None}) is not None

    def storage_kind(self) -> str:
        """Where the server keeps bytes, as `local` or `s3`."""
        found = self._sdk.call(self.endpoint, self._sdk.config.get_config)
        return str(found.storage_config.blockstore_type)

    def find(self, repo: str, ref: str) -> str | None:
        """The commit id a branch, tag or commit id stands for; None where there is no such ref."""
        found = self._sdk.call(
            f"lakefs://{repo}/{ref}",
            self._sdk.commits.get_commit,
            repo,
            ref,
            expected={_MISSING: None},
        )
        return None if found is None else str(found.id)

    def resolve(self, repo: str, ref: str) -> str:
        """The commit id a branch, tag or commit id stands for now."""
        found = self.find(repo, ref)
        if found is None:
            raise refused(f"lakefs://{repo}/{ref}", _MISSING, "no such repository or ref")
        return found

    def list(self, repo: str, ref: str, prefix: str = "") -> Iterator[Stat]:
        """All objects under a prefix (a string, not a folder), by path in order of its bytes."""
        what, call = f"lakefs://{repo}/{ref}/{prefix}", self._sdk.objects.list_objects
        yield from map(_stat_of, self._pages(what, call, repo, ref, prefix=prefix))

    def stat(self, repo: str, ref: str, path: str) -> Stat | None:
        """One object, None where it is not there."""
        found = self._sdk.call(
            f"lakefs://{repo}/{ref}/{path}",
            self._sdk.objects.stat_object,
            repo,
            ref,
            path,
            expected={_MISSING: None},
        )
        return None if found is None else _stat_of(found)

    def open(self, repo: str, ref: str, path: str) -> io.BufferedReader:
        """An object as a seekable stream; a jump costs a request, about 1 MiB is held."""
        what = f"lakefs://{repo}/{ref}/{path}"
        found = self.stat(repo, ref, path)
        if found is None:
            raise refused(what, _MISSING, "no such object")
        url = f"/repositories/{quote(repo, '')}/refs/{quote(ref, '')}/objects?"
        raw = Incoming(self._sdk.wire, url + urlencode({"path": path}), found.size, what)
        return io.BufferedReader(raw, _BUFFER_SIZE)

    def read(self, repo: str, ref: str, path: str, *, max_size: int = 16 << 20) -> bytes:
        """A small object, whole."""
        with self.open(repo, ref, path) as stream:
            data = stream.read(max_size + 1)
        if len(data) > max_size:
            msg = f"lakefs://{repo}/{ref}/{path}: too large to hold, got over {max_size} bytes. "
            raise StoreError(msg + "Was another file put there?")
        return data

    def upload(
        self,
        repo: str,
        branch: str,
        path: str,
        stream: BinaryIO,
        size: int,
        on_bytes: Callable[[int], object] = lambda _: None,
    ) -> str:
        """Stages an object on a branch, sent as it is read; what is there is replaced.

        Args:
            repo: The repository.
            branch: Gets the object staged, not committed.
            path: Of the object.
            stream: Its bytes.
            size: How many bytes; not one more is read.
            on_bytes: Told how many more bytes were sent.

        Returns:
            sha256 of the bytes sent.
        """
        what = f"lakefs://{repo}/{branch}/{path}"
        body = Outgoing(stream, size, Pace(what, self.timeout), what, on_bytes)
        url = f"/repositories/{quote(repo, '')}/branches/{quote(branch, '')}/objects?"
        self._sdk.wire.post(url + urlencode({"path": path}), body, what=what)
        return body.sha256

    def put(self, repo: str, branch: str, path: str, data: bytes) -> None:
        """Stages a small object on a branch."""
        self.upload(repo, branch, path, io.BytesIO(data), len(data))

    def create_branch(self, repo: str, branch: str, source: str) -> bool:
        """Makes a branch at a commit; False where a branch or tag of the name is there already."""
        return self._made(
            f"lakefs://{repo}/{branch}",
            self._sdk.branches.create_branch,
            repo,
            self._sdk.model(branch, "BranchCreation", name=branch, source=source),
        )

    def delete_branch(self, repo: str, branch: str) -> bool:
        """Removes a branch with what is staged on it; False where it is not there."""
        gone = object()
        call = self._sdk.branches.delete_branch
        what = f"lakefs://{repo}/{branch}"
        return self._sdk.call(what, call, repo, branch, expected={_MISSING: gone}) is not gone

    def branches(self, repo: str, prefix: str = "") -> dict[str, str]:
        """Branches whose names begin so, with their commit ids."""
        return self._refs(repo, prefix, self._sdk.branches.list_branches)

    def tags(self, repo: str, prefix: str = "") -> dict[str, str]:
        """Tags whose names begin so, with their commit ids."""
        return self._refs(repo, prefix, self._sdk.tags.list_tags)

    def tag(self, repo: str, name: str, commit: str) -> bool:
        """Names a commit; False where a tag or branch of the name is there already."""
        return self._made(
            f"lakefs://{repo}/{name}",
            self._sdk.tags.create_tag,
            repo,
            self._sdk.model(name, "TagCreation", id=name, ref=commit),
        )

    def commit(
        self, repo: str, branch: str, message: str, metadata: Mapping[str, str] | None = None
    ) -> str:
        """Commits what is staged on a branch; returns the commit id."""
        what = f"lakefs://{repo}/{branch}"
        wish = self._sdk.model(
            what, "CommitCreation", message=message, metadata=dict(metadata or {})
        )
        return str(self._sdk.call(what, self._sdk.commits.commit, repo, branch, wish).id)

    def has_staged(self, repo: str, branch: str) -> bool:
        """Whether a commit of the branch would change anything."""
        what, call = f"lakefs://{repo}/{branch}", self._sdk.branches.diff_branch
        return bool(self._sdk.call(what, call, repo, branch, amount=1).results)

    def merge(
        self,
        repo: str,
        commit: str,
        into: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        *,
        on_conflict: str | None = None,
    ) -> str | None:
        """Merges a commit into a branch.

        Args:
            repo: The repository.
            commit: The commit id to merge.
            into: A branch with nothing staged.
            message: Of the merge commit.
            metadata: Of the merge commit.
            on_conflict: `source-wins` or `dest-wins`; None leaves a conflict unmerged.

        Returns:
            The merge commit's id; None where both sides changed one path.
        """
        what = f"lakefs://{repo}/{into}"
        wish = self._sdk.model(
            what, "Merge", message=message, metadata=dict(metadata or {}), strategy=on_conflict
        )
        call = self._sdk.refs.merge_into_branch
        found = self._sdk.call(what, call, repo, commit, into, wish, expected={_CONFLICT: None})
        return None if found is None else str(found.reference)

    def log(self, repo: str, ref: str) -> Iterator[Commit]:
        """Commits from a ref back to the first, along first parents: a branch's own history."""
        what, call = f"lakefs://{repo}/{ref}", self._sdk.refs.log_commits
        for found in self._pages(what, call, repo, ref, first_parent=True):
            yield Commit(found.id, tuple(found.parents), dict(found.metadata or {}))

    def protect(self, repo: str, branch: str) -> None:
        """Lets a branch change by merges only, some seconds from now; a guard against mistakes."""
        rules = [self._sdk.model(repo, "BranchProtectionRule", pattern=branch)]
        call = self._sdk.repositories.set_branch_protection_rules
        self._sdk.call(f"lakefs://{repo}/{branch}", call, repo, rules)

    def _refs(self, repo: str, prefix: str, call: Callable[..., Any]) -> dict[str, str]:
        found = self._pages(f"lakefs://{repo}", call, repo, prefix=prefix)
        return {ref.id: ref.commit_id for ref in found}

    def _pages(
        self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Iterator[Any]:
        """All results of a call that lists, asked for page by page."""
        after = ""
        while True:
            page = self._sdk.call(what, call, *arguments, after=after, amount=_PAGE_SIZE, **options)
            yield from page.results
            if not page.pagination.has_more:
                return
            after = page.pagination.next_offset

    def _made(self, what: str, call: Callable[..., Any], *arguments: Any) -> bool:
        taken = object()
        return self._sdk.call(what, call, *arguments, expected={_CONFLICT: taken}) is not taken

    @property
    def _sdk(self) -> Sdk:
        found = self._sdks.get(os.getpid())
        if found is None:
            keys = self.access_key_id, self.secret_access_key
            found = self._sdks[os.getpid()] = make_sdk(self.endpoint, *keys, self.timeout)
        return found


def _stat_of(found: Any) -> Stat:
    return Stat(found.path, found.size_bytes or 0, found.checksum, found.mtime)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        msg = f"LAKEFS_TIMEOUT: not a number of seconds above 0, got {text!r}. Write e.g. 60."
        raise StoreError(msg)
    return value


def _read_env_file(path: Path) -> dict[str, str]:
    """`NAME=value` lines; empty where there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines]
    return {name: value for name, equals, value in pairs if equals and name in _VARIABLES}
