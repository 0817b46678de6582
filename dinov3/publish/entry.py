"""A release as a store names it, and what is a name of one."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dinov3.errors import AlreadyPublished, StoreError

OnStep = Callable[[str], None]
OnBytes = Callable[[int], None]

_MODEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})", re.ASCII)


def ignore(_: object) -> None:
    """What is called after a step or a chunk when nobody wants to know."""


@dataclass(frozen=True)
class Entry:
    """One visible release of a store.

    `audited` names what was read back before it became visible, `merged` what made it so: the
    store's identity, `#`, and an id that cannot be re-made for other content (a commit, the digest
    of an index entry). `withdrawn` is the reason as the store tells it, None where there is none.
    """

    model: str
    version: str
    digest: str
    withdrawn: str | None
    audited: str
    merged: str

    @property
    def name(self) -> str:
        """`MODEL@VERSION`."""
        return f"{self.model}@{self.version}"


@dataclass(frozen=True)
class Release:
    """What a release directory says of itself, its files hashed."""

    model: str
    version: str
    digest: str
    hashes: Mapping[str, str]  # path -> sha256 of every file, SHA256SUMS and model.sig included


def split_name(text: str) -> tuple[str, str]:
    """Model and version of `MODEL@VERSION`.

    Raises:
        StoreError: It is no such name.
    """
    model, _, version = text.partition("@")
    check_name(model, version)
    return model, version


def check_name(model: str, version: str) -> None:
    """Refuses what is no name of a release; such a name is safe in paths, branches and tags.

    Raises:
        StoreError: The model or the version is malformed.
    """
    if not _MODEL.fullmatch(model):
        msg = (
            f"model: not a name of a-z, 0-9, _ and -, got {model!r}. Write MODEL@VERSION, "
            "as in vits@0.1.0."
        )
        raise StoreError(msg)
    if not _VERSION.fullmatch(version):
        msg = f"version: not MAJOR.MINOR.PATCH, got {version!r}. Write it as in 0.1.0."
        raise StoreError(msg)


def version_key(version: str) -> tuple[int, ...]:
    """Sorts versions as numbers."""
    return tuple(int(part) for part in version.split("."))


def find_entry(entries: Iterable[Entry], model: str, version: str) -> Entry:
    """The entry of a version.

    Raises:
        StoreError: It is not there.
    """
    check_name(model, version)
    for entry in entries:
        if (entry.model, entry.version) == (model, version):
            return entry
    raise not_published(model, version)


def already_published(entry: Entry, digest: str) -> AlreadyPublished:
    """The error for other bytes under a version that is taken."""
    return AlreadyPublished(
        f"{entry.name}: already published with other bytes, got release digest {digest}, the "
        f"store has {entry.digest}. Publish under the next version "
        f"(dinov3 releases next {entry.model})."
    )


def not_finished(entry: Entry, digest: str) -> AlreadyPublished:
    """The error for a version that a publisher of other bytes holds but has not made visible."""
    return AlreadyPublished(
        f"{entry.name}: held by a publisher of other bytes who is at work or was stopped, got "
        f"release digest {digest}, the store has {entry.digest}, not visible yet. Publish that "
        f"release again to finish it, or this one under the next version "
        f"(dinov3 releases next {entry.model})."
    )


def not_published(model: str, version: str) -> StoreError:
    """The error for a version that is not visible."""
    return StoreError(
        f"{model}@{version}: not in the store. See what is there with dinov3 releases list."
    )
