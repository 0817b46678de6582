"""The lakeFS store: a repository where a release is visible once its merge commit is tagged.

branch run-… at a pinned base -> upload -> commit -> read that commit back -> merge that commit id
into main -> read the merge commit back -> tag release.MODEL.VERSION at it -> receipt

releases/MODEL/VERSION/…       released files
withdrawals/MODEL@VERSION.json signed withdrawals
index.json                     the last change, naming the one before it
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from dinov3.errors import LineageBroken, StoreError, StoreMissing
from dinov3.lake import Commit, Lake
from dinov3.publish.copying import (
    appearing,
    check_fetched,
    open_published,
    read_release,
    write_file,
)
from dinov3.publish.entry import (
    Entry,
    OnBytes,
    OnStep,
    Release,
    already_published,
    check_name,
    ignore,
    not_finished,
    not_published,
)
from dinov3.publish.lakefs_audit import audit_history
from dinov3.publish.lakefs_main import MAIN, Change, Main
from dinov3.publish.lakefs_runs import prune_runs
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.store_receipts import (
    WITHDRAWALS,
    check_withdrawn,
    compare_receipts,
    leave_receipt,
    odd_withdrawals,
    reason_in,
    stored_reason,
    withdrawal_name,
)
from dinov3.release.files import SUMS_NAME, UNLISTED, parse_sums
from dinov3.release.receipts import Receipt
from dinov3.release.refusals import Refused

TAG = re.compile(r"release\.([a-z0-9][a-z0-9_-]*)\.(\d+\.\d+\.\d+)")
_REPO = re.compile(r"[a-z0-9][a-z0-9-]{2,62}")
_MAX_SUMS = 64 << 20  # bytes
_MAX_ENVELOPE = 1 << 20  # bytes
_RESTORE = "Restore the store."


def open_lakefs_store(spec: str) -> "LakefsStore":
    """The store `lakefs://REPO`, on the server that `Lake.connect` finds.

    Raises:
        StoreError: No name of a repository, or no server is named.
    """
    repo = spec.removeprefix("lakefs://").rstrip("/")
    if not _REPO.fullmatch(repo):
        msg = f"store: not lakefs://REPO, got {spec!r}. Name it with 3 to 63 of a-z, 0-9 and -."
        raise StoreError(msg)
    return LakefsStore(Lake.connect(), repo)


class LakefsStore:
    """Releases in a repository of a lakeFS server; the first publication makes it."""

    def __init__(self, lake: Lake, repo: str) -> None:
        self._lake, self._repo = lake, repo
        self._main = Main(lake, repo)
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """`lakefs:` and the id drawn when the store was made."""
        if self._identity is None:
            if not self._main.is_set_up():
                msg = f"lakefs://{self._repo}: no store there. The first dinov3 publish makes it."
                raise StoreMissing(msg)
            self._identity = f"lakefs:{self._main.line(self._main.head()).store}"
        return self._identity

    def publish(
        self,
        folder: Path,
        *,
        log: Path,
        key: PrivateKey,
        on_step: OnStep = ignore,
        on_bytes: OnBytes = ignore,
    ) -> Entry:
        """Uploads, reads back, merges, reads back, tags; see `Store`."""
        release = read_release(folder)
        self._main.set_up()
        tagged = self._lake.find(self._repo, _tag(release.model, release.version))
        if tagged is None:
            entry = self._make_visible(folder, release, on_step, on_bytes)
        else:
            entry = self._published(release.model, release.version)
            if entry.digest != release.digest:
                raise already_published(entry, release.digest)
        leave_receipt(entry, log=log, key=key)
        on_step("receipted")
        return entry

    def entries(self) -> list[Entry]:
        """All visible releases, oldest first."""
        identity, withdrawn = self.identity, self._envelopes()
        tags, history = self._tags_and_history()
        places = {commit: place for place, commit in enumerate(history)}
        found = [
            (places.get(commit, -1), _entry(identity, tag, history.get(commit), withdrawn))
            for tag, commit in tags.items()
        ]
        return [entry for _, entry in sorted(found, key=lambda one: one[0], reverse=True)]

    def unfinished(self) -> list[Entry]:
        """Merged but not tagged; see `Store`."""
        identity = self.identity
        merged: dict[str, Commit] = {}
        for commit in self._main.history():
            said = commit.metadata
            if said["kind"] == "publish":
                merged.setdefault(_tag(said.get("model", ""), said.get("version", "")), commit)
        tags = self._lake.tags(self._repo, "release.")  # after it: what is tagged is finished
        return [
            _entry(identity, tag, commit, {})
            for tag, commit in reversed(merged.items())
            if tag not in tags
        ]

    def fetch(self, model: str, version: str, target: Path, *, on_bytes: OnBytes = ignore) -> Entry:
        """Copies a release out; the target appears once its digest was found right."""
        entry = self._published(model, version)
        with appearing(target) as partial:
            self._copy_out(entry, partial, on_bytes)
            check_fetched(partial, entry)
        return entry

    def open_file(self, model: str, version: str, name: str) -> BinaryIO:
        """A file of a release as a seekable stream; a jump costs a request."""
        entry = self._published(model, version)
        path = f"{_prefix(model, version)}{name}"
        if self._lake.stat(self._repo, _commit(entry), path) is None:
            msg = f"{entry.name}: has no file {name!r}. Its SHA256SUMS lists what it has."
            raise StoreError(msg)
        return self._lake.open(self._repo, _commit(entry), path)

    def file_names(self, model: str, version: str) -> list[str]:
        """Every file that stands in a release's place."""
        return self._names(self._published(model, version))

    def withdraw(self, model: str, version: str, envelope: bytes) -> None:
        """Attaches a withdrawal; the first one stays."""
        entry = self._published(model, version)
        reason = reason_in(entry, envelope)
        if entry.withdrawn is None:
            self._main.land(_withdrawal(entry, envelope), ignore, ignore)
            entry = self._published(model, version)  # another one may have been first
        check_withdrawn(entry, reason)

    def withdrawals(self) -> list[bytes]:
        """The envelopes of all withdrawals that can be read; `entries` tells of the others."""
        if not self._main.is_set_up():
            return []
        found = self._envelopes().values()
        return [envelope for envelope in found if isinstance(envelope, bytes)]

    def prune(self) -> list[str]:
        """Removes branches of dead publishers; what is merged but not tagged is `unfinished`."""
        _ = self.identity
        return prune_runs(self._lake, self._repo)

    def audit(self, receipts: Sequence[Receipt]) -> list[str]:
        """How the store contradicts the receipts or itself."""
        self._identity = None  # another store may have taken its place
        try:
            identity, withdrawn = self.identity, self._envelopes()
        except (StoreMissing, LineageBroken) as error:
            return [str(error)]
        tags, history = self._tags_and_history()
        entries, found = [], audit_history(self._main)
        for tag, commit in tags.items():
            try:
                entries.append(_entry(identity, tag, history.get(commit), withdrawn))
            except StoreError as error:
                found.append(str(error))
        odd = odd_withdrawals(entries, withdrawn)
        return [*compare_receipts(identity, entries, receipts), *odd, *found]

    def _make_visible(
        self, folder: Path, release: Release, on_step: OnStep, on_bytes: OnBytes
    ) -> Entry:
        """Lands and tags, from wherever an earlier publisher of the same bytes was stopped."""
        name = release.model, release.version
        change, tag = _publication(folder, release), _tag(*name)
        landed = self._main.land(change, on_step, on_bytes)
        entry = _entry(self.identity, tag, landed, self._envelopes(withdrawal_name(*name)))
        if entry.digest != release.digest:
            is_visible = self._lake.find(self._repo, tag) is not None
            raise (already_published if is_visible else not_finished)(entry, release.digest)
        self._main.check(_commit(entry), change)
        if not self._lake.tag(self._repo, tag, _commit(entry)):
            entry = self._published(*name)  # an equal publisher's
            if entry.digest != release.digest:
                raise already_published(entry, release.digest)
        on_step("tagged")
        return entry

    def _published(self, model: str, version: str) -> Entry:
        """The entry of a visible version; other versions need not be sound."""
        check_name(model, version)
        identity = self.identity
        commit = self._lake.find(self._repo, _tag(model, version))
        if commit is None:
            raise not_published(model, version)
        found = next((one for one in self._main.history() if one.id == commit), None)
        withdrawn = self._envelopes(withdrawal_name(model, version))
        return _entry(identity, _tag(model, version), found, withdrawn)

    def _tags_and_history(self) -> tuple[dict[str, str], dict[str, Commit]]:
        """In this order: a release that is tagged in between is in the history, else it is odd."""
        tags = self._lake.tags(self._repo, "release.")
        return tags, {commit.id: commit for commit in self._main.history()}

    def _envelopes(self, prefix: str = WITHDRAWALS) -> dict[str, bytes | StoreError]:
        """Withdrawals by name; where one cannot be read, why."""
        head = self._main.head()
        listed = self._lake.list(self._repo, head, prefix)
        return {stat.path: self._envelope(head, stat.path) for stat in listed}

    def _envelope(self, head: str, path: str) -> bytes | StoreError:
        try:
            return self._lake.read(self._repo, head, path, max_size=_MAX_ENVELOPE)
        except StoreError as error:
            self._main.head()  # raises where the server is away: that is nobody's withdrawal
            return error

    def _names(self, entry: Entry) -> list[str]:
        prefix = _prefix(entry.model, entry.version)
        listed = self._lake.list(self._repo, _commit(entry), prefix)
        return [stat.path.removeprefix(prefix) for stat in listed]

    def _copy_out(self, entry: Entry, partial: Path, on_bytes: OnBytes) -> None:
        prefix, commit = _prefix(entry.model, entry.version), _commit(entry)
        there = set(self._names(entry))
        try:
            # what SHA256SUMS does not list is never written: names may lead anywhere
            data = self._lake.read(self._repo, commit, prefix + SUMS_NAME, max_size=_MAX_SUMS)
            sums = parse_sums(data)
        except Refused as error:
            raise _damaged(entry, str(error)) from error
        if odd := (there - UNLISTED) ^ sums.keys():
            raise _damaged(entry, f"{min(odd)!r}: unlisted or missing")
        for name in sorted(there):
            with self._lake.open(self._repo, commit, prefix + name) as source:
                found = write_file(source, partial / name, on_bytes)
            if found != sums.get(name, found):
                raise _damaged(entry, f"{name}: its sha256 is {found}, not {sums[name]}")


def _entry(
    identity: str, tag: str, commit: Commit | None, withdrawn: Mapping[str, bytes | StoreError]
) -> Entry:
    """What a tag makes visible; the commit's metadata are bound by its id."""
    named = TAG.fullmatch(tag)
    said = commit.metadata if commit else {}
    subject = (said.get("kind"), said.get("model"), said.get("version"))
    audited = said.get("audited_commit", "")
    if not (named and commit and subject == ("publish", *named.groups())):
        msg = f"{tag}: tags no publication of it on {MAIN}, made again or {MAIN} rewritten. "
        raise StoreError(msg + _RESTORE)
    if audited not in commit.parents:
        raise StoreError(f"{tag}: its commit did not merge what it calls audited. {_RESTORE}")
    model, version = named.groups()
    check_name(model, version)
    places = f"{identity}#{audited}", f"{identity}#{commit.id}"
    entry = Entry(model, version, said.get("digest", ""), None, *places)
    envelope = withdrawn.get(withdrawal_name(model, version))
    return entry if envelope is None else replace(entry, withdrawn=stored_reason(entry, envelope))


def _publication(folder: Path, release: Release) -> Change:
    prefix = _prefix(release.model, release.version)

    def opened(path: str) -> tuple[BinaryIO, int]:
        stream = open_published(folder, path.removeprefix(prefix))
        return stream, os.fstat(stream.fileno()).st_size

    hashes = {prefix + name: digest for name, digest in release.hashes.items()}
    return Change("publish", release.model, release.version, release.digest, prefix, hashes, opened)


def _withdrawal(entry: Entry, envelope: bytes) -> Change:
    path = withdrawal_name(entry.model, entry.version)
    digest = sha256(envelope).hexdigest()
    return Change(
        "withdraw",
        entry.model,
        entry.version,
        digest,
        path,
        {path: digest},
        lambda _: (io.BytesIO(envelope), len(envelope)),
    )


def _damaged(entry: Entry, why: str) -> LineageBroken:
    return LineageBroken(f"{entry.name}: the store's copy is damaged: {why}. {_RESTORE}")


def _tag(model: str, version: str) -> str:
    return f"release.{model}.{version}"


def _prefix(model: str, version: str) -> str:
    return f"releases/{model}/{version}/"


def _commit(entry: Entry) -> str:
    return entry.merged.rpartition("#")[2]
