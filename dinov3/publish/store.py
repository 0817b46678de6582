"""Stores of releases: what every kind promises.

A version is either visible whole or not at all, never changes once visible, and is written down in
a signed receipt outside the store. Kinds: `directory:PATH` (embedded, the default) and
`lakefs://REPO`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from dinov3.errors import StoreError, StoreMissing
from dinov3.publish.copying import CHUNK, appearing, copy_stream, read_release
from dinov3.publish.entry import (
    Entry,
    OnBytes,
    OnStep,
    Release,
    check_name,
    find_entry,
    ignore,
    split_name,
    version_key,
)
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.store_receipts import is_of, log_keys, read_log
from dinov3.release.receipts import Receipt

__all__ = [
    "CHUNK",
    "STEPS",
    "Entry",
    "OnBytes",
    "OnStep",
    "Release",
    "Store",
    "appearing",
    "check_name",
    "copy_stream",
    "entries_if_made",
    "find_entry",
    "held_versions",
    "ignore",
    "is_of",
    "log_keys",
    "open_store",
    "read_log",
    "read_release",
    "split_name",
    "version_key",
]

STEPS = ("staged", "uploaded", "read_back", "merged", "tagged", "receipted")


class Store(Protocol):
    """A place of releases; all methods raise `StoreError` where the place cannot be used."""

    @property
    def identity(self) -> str:
        """What receipts call this store; it stays when the store is moved."""

    def publish(
        self,
        folder: Path,
        *,
        log: Path,
        key: PrivateKey,
        on_step: OnStep = ignore,
        on_bytes: OnBytes = ignore,
    ) -> Entry:
        """Makes a release visible, and leaves a receipt; the same release again is no change.

        Args:
            folder: A release directory.
            log: Folder of the log of releases.
            key: Signs the receipt.
            on_step: Told each of STEPS once it is durable.
            on_bytes: Told how many more bytes have been copied.

        Raises:
            AlreadyPublished: The version is there with another digest.
        """

    def entries(self) -> list[Entry]:
        """All visible releases, oldest first."""

    def fetch(self, model: str, version: str, target: Path, *, on_bytes: OnBytes = ignore) -> Entry:
        """Copies a release to a folder that appears only once its digest was found right.

        Raises:
            LineageBroken: The store's bytes are not those of the release.
        """

    def open_file(self, model: str, version: str, name: str) -> BinaryIO:
        """A file of a release as a stream; the reader checks what it reads."""

    def file_names(self, model: str, version: str) -> list[str]:
        """Every file that stands in a release's place, listed by it or not."""

    def withdraw(self, model: str, version: str, envelope: bytes) -> None:
        """Attaches a signed withdrawal to a visible release; the first one stays."""

    def withdrawals(self) -> list[bytes]:
        """The envelopes of all withdrawals that can be read; `entries` tells of the others."""

    def unfinished(self) -> list[Entry]:
        """Versions that are not visible, yet held by a publisher who is at work or was stopped.

        Publishing the same release again finishes one; no other release can take its version.
        """

    def prune(self) -> list[str]:
        """Removes what killed publishers left, never what a live one uses; says what it removed."""

    def audit(self, receipts: Sequence[Receipt]) -> list[str]:
        """How the store contradicts the receipts or itself; empty when it does not."""


def open_store(spec: str) -> Store:
    """The store of `directory:PATH` or `lakefs://REPO`.

    Raises:
        StoreError: No such kind, or the store cannot be used.
    """
    kind, _, rest = spec.partition(":")
    if kind == "directory" and rest:
        from dinov3.publish.directory_store import DirectoryStore

        return DirectoryStore(Path(rest))
    if spec.startswith("lakefs://"):
        from dinov3.publish.lakefs_store import open_lakefs_store

        return open_lakefs_store(spec)
    msg = f"store: no kind of store, got {spec!r}. Use directory:PATH or lakefs://REPO."
    raise StoreError(msg)


def held_versions(store: Store) -> list[Entry]:
    """Releases whose versions no other bytes can have any more, visible or not."""
    try:
        return [*store.unfinished(), *store.entries()]  # what is finished in between is in both
    except StoreMissing:
        return []


def entries_if_made(store: Store) -> list[Entry]:
    """All visible releases; none where the first publication is yet to make the store."""
    try:
        return store.entries()
    except StoreMissing:
        return []
