"""The branch `main` of a lakeFS store: one merge commit for each publication and withdrawal.

What lands there was read back first, at the very commit that is merged. Of two changes made on top
of the same commit one lands; the other is made again on top of it.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from dinov3.errors import LineageBroken, StoreError
from dinov3.lake import Commit, Lake
from dinov3.publish.entry import OnBytes, OnStep
from dinov3.publish.lakefs_index import (
    HOOK,
    HOOK_TEXT,
    INDEX,
    Line,
    claims,
    read_line,
    sha256_of,
)
from dinov3.publish.lakefs_runs import run_branch

MAIN = "main"
_TRIES = 50  # each lost one is another publisher's success
_MAX_INDEX = 1 << 20  # bytes


@dataclass(frozen=True)
class Change:
    """A publication or withdrawal: the whole content of a prefix, and where its bytes come from."""

    kind: str
    model: str
    version: str
    digest: str
    prefix: str
    hashes: Mapping[str, str]  # object -> sha256
    open: Callable[[str], tuple[BinaryIO, int]]  # object -> its bytes and how many

    @property
    def name(self) -> str:
        """What happens to which release."""
        return f"{self.kind} {self.model}@{self.version}"


class Main:
    """What happens on `main`, and what happened."""

    def __init__(self, lake: Lake, repo: str) -> None:
        self.lake, self.repo = lake, repo

    def head(self) -> str:
        """The commit `main` stands at."""
        return self.lake.resolve(self.repo, MAIN)

    def line(self, commit: str) -> Line:
        """The index at a commit.

        Raises:
            LineageBroken: There is none, or it is malformed.
        """
        return read_line(self._index(commit), f"lakefs://{self.repo}/{commit}/{INDEX}")

    def is_set_up(self) -> bool:
        """Whether the repository is there and is a store of releases."""
        return (
            self.lake.has_repository(self.repo)
            and self.lake.stat(self.repo, MAIN, INDEX) is not None
        )

    def history(self, commit: str = MAIN) -> Iterator[Commit]:
        """Publications and withdrawals up to a commit, newest first."""
        for found in self.lake.log(self.repo, commit):
            if found.metadata.get("kind") in ("publish", "withdraw"):
                yield found

    def set_up(self) -> None:
        """Makes the repository, its index and its guards, unless they are there.

        Raises:
            StoreError: The server keeps bytes where only its owner can choose a place for them, or
                the repository is in use for something else.
        """
        if not self.lake.has_repository(self.repo):
            self._make_repository()
        for _ in range(_TRIES):
            base = self.head()
            has_index = self.lake.stat(self.repo, base, INDEX) is not None
            if has_index and self.lake.stat(self.repo, base, HOOK) is not None:
                return
            if not has_index:
                self._refuse_other_use(base)
            self._land_set_up(base, has_index)

    def land(self, change: Change, on_step: OnStep, on_bytes: OnBytes) -> Commit:
        """Merges a change into `main`, unless one of its kind and version stands there.

        Returns:
            The merge commit of the one that stands there now, whose digest may be another.

        Raises:
            LineageBroken: The server's bytes are not those sent.
            StoreError: The server failed, or others were always faster.
        """
        base = self.head()
        return self._landed(base, change) or self._land_on(base, change, on_step, on_bytes)

    def _landed(self, head: str, change: Change) -> Commit | None:
        """The merge commit of a change of this kind and version, where `main` still holds it."""
        if next(self.lake.list(self.repo, head, change.prefix), None) is None:
            return None
        wanted = (change.kind, change.model, change.version)
        for commit in self.history(head):
            if tuple(commit.metadata.get(name) for name in ("kind", "model", "version")) == wanted:
                return commit
        return None

    def _land_on(self, base: str, change: Change, on_step: OnStep, on_bytes: OnBytes) -> Commit:
        """Whatever lands after `base` makes a conflict with this."""
        with run_branch(self.lake, self.repo, base) as branch:
            on_step("staged")
            self._upload(branch, change, on_bytes)
            for number in range(_TRIES):
                line = self._put_line(branch, base, change)
                audited = self.lake.commit(self.repo, branch, change.name)
                if number == 0:
                    on_step("uploaded")
                self.check(audited, change, line)
                if number == 0:
                    on_step("read_back")
                if self._merge(audited, line) is not None:
                    on_step("merged")
                base = self.head()
                landed = self._landed(base, change)
                if landed is not None:
                    return landed
                self.lake.merge(
                    self.repo, base, branch, "on top of main", on_conflict="source-wins"
                )
        msg = f"{change.name}: others were faster {_TRIES} times. Run it again."
        raise StoreError(msg)

    def check(self, commit: str, change: Change, line: Line | None = None) -> None:
        """Reads a change back at a commit.

        Args:
            commit: Where it must stand whole.
            change: What must stand there.
            line: What the index must say; None where only its subject is known.

        Raises:
            LineageBroken: Something else stands there.
        """
        where = f"lakefs://{self.repo}/{commit}"
        found = {stat.path for stat in self.lake.list(self.repo, commit, change.prefix)}
        if found != change.hashes.keys():
            odd = min(found ^ change.hashes.keys())
            whose = f"{change.model}@{change.version}"
            raise LineageBroken(f"{where}/{odd}: missing, or no part of {whose}. {_RESTORE}")
        for path, sha256 in change.hashes.items():
            with self.lake.open(self.repo, commit, path) as stream:
                read = hashlib.file_digest(stream, "sha256").hexdigest()
            if read != sha256:
                msg = f"{where}/{path}: not the bytes sent, got {read} for {sha256}. {_RESTORE}"
                raise LineageBroken(msg)
        said = self.line(commit)
        subject = (said.kind, said.model, said.version, said.digest)
        wanted = (change.kind, change.model, change.version, change.digest)
        if subject != wanted or (line is not None and said != line):
            msg = f"{where}/{INDEX}: does not say {change.name}, got {' '.join(subject)}. "
            raise LineageBroken(msg + _RESTORE)

    def _index(self, commit: str) -> bytes:
        if self.lake.stat(self.repo, commit, INDEX) is None:
            msg = f"lakefs://{self.repo}/{commit}/{INDEX}: gone from the store. Restore the store."
            raise LineageBroken(msg)
        return self.lake.read(self.repo, commit, INDEX, max_size=_MAX_INDEX)

    def _make_repository(self) -> None:
        kind = self.lake.storage_kind()
        if kind != "local":
            msg = f"lakefs://{self.repo}: no such repository on a server of storage {kind!r}. "
            raise StoreError(msg + "Create it with a storage namespace of your own, then publish.")
        # a namespace is never given out twice, not even after its repository is gone
        self.lake.create_repository(self.repo, f"local://{self.repo}-{secrets.token_hex(8)}")
        self.lake.protect(self.repo, MAIN)

    def _refuse_other_use(self, base: str) -> None:
        """Our hook would stop every merge of whoever else uses the repository."""
        other = next(self.lake.list(self.repo, base), None)
        if other is not None:
            msg = f"lakefs://{self.repo}: not a store of releases, holds {other.path!r}. "
            raise StoreError(msg + "Name a repository of its own.")

    def _land_set_up(self, base: str, has_index: bool) -> None:
        with run_branch(self.lake, self.repo, base) as branch:
            self.lake.put(self.repo, branch, HOOK, HOOK_TEXT)
            line = Line(secrets.token_hex(16), 0, "setup", "", "", "", base, None, branch)
            if not has_index:
                self.lake.put(self.repo, branch, INDEX, line.to_bytes())
            audited = self.lake.commit(self.repo, branch, "store of releases")
            self._merge(audited, line)  # a conflict: another publisher has just done it

    def _upload(self, branch: str, change: Change, on_bytes: OnBytes) -> None:
        for path, sha256 in change.hashes.items():
            stream, size = change.open(path)
            with stream:
                sent = self.lake.upload(self.repo, branch, path, stream, size, on_bytes)
            if sent != sha256:
                msg = f"{path}: changed while it was published. Run it again."
                raise StoreError(msg)

    def _put_line(self, branch: str, base: str, change: Change) -> Line:
        before = self._index(base)
        standing = read_line(before, f"lakefs://{self.repo}/{base}/{INDEX}")
        line = Line(
            standing.store,
            standing.number + 1,
            change.kind,
            change.model,
            change.version,
            change.digest,
            base=base,
            previous=sha256_of(before),
            run=branch,
        )
        self.lake.put(self.repo, branch, INDEX, line.to_bytes())
        return line

    def _merge(self, audited: str, line: Line) -> str | None:
        message = f"{line.kind} {line.model}@{line.version}" if line.model else "store of releases"
        return self.lake.merge(self.repo, audited, MAIN, message, claims(line, audited))


_RESTORE = "Nothing was made visible: restore the store, then run it again."
