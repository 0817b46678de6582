"""One file of weights without its release: which release holds it, by bytes or by tensors."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from dinov3.errors import LineageBroken, StoreError
from dinov3.release.contents import RELEASE_NAME
from dinov3.release.files import (
    SIGNATURE_NAME,
    SUMS_NAME,
    parse_sums,
    read_file,
    release_digest,
)
from dinov3.release.record import MAX_DOCUMENT, RecordError, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.tensors import FileHash, hash_file
from dinov3.release.verdict import LoneFile

_DEEPEST = 6  # folders below the one that is searched
_MAX_BUNDLE = 32 << 20  # bytes of a signature


class _Store(Protocol):
    def entries(self) -> Iterable[Any]: ...

    def open_file(self, model: str, version: str, name: str) -> BinaryIO: ...

    def fetch(self, model: str, version: str, target: Path) -> Any: ...


@dataclass
class Found:
    """The file's identity, what was searched, and the releases that hold it.

    Attributes:
        file: Its identity.
        folders: Releases that hold it, fetched where a store has them.
        searched: Where was looked.
        others: Names of releases that hold it and were not asked for.
        damaged: Releases that may hold it or not, and why that cannot be told.
    """

    file: LoneFile
    folders: list[Path] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


@contextlib.contextmanager
def find_releases(
    path: Path, root: Path | None, store: _Store | None, expect: str | None = None
) -> Iterator[Found]:
    """Searches the folder the file lies in, the releases below a folder, and a store.

    A release that is found in a store is fetched to a temporary folder, which is gone afterwards.

    Args:
        path: The file.
        root: Folder below which releases are looked for.
        store: Of releases.
        expect: `MODEL@VERSION`, where releases of other names are not asked for.

    Raises:
        Refused: `weights-malformed`, `file-special`.
        CannotCheck: The file or the store cannot be read.
    """
    identity = _identify(path)
    found = Found(LoneFile(identity.sha256, identity.bytes, identity.tensors))
    own = path.resolve().parent
    found.searched.append("its folder")
    if (own / RELEASE_NAME).is_file():  # whatever it holds by now, it claims to be of this release
        found.folders.append(own)
        yield found
        return
    search = _Search(identity, expect, found)
    if root is not None:
        found.searched.append(str(root))
        for folder in _release_folders(root):
            search.look_in_folder(folder)
    with tempfile.TemporaryDirectory(prefix="dinov3-verify-") as scratch:
        if store is not None:
            found.searched.append("the store")
            for entry in store.entries():
                search.look_in_store(store, entry, Path(scratch))
        yield found


def _identify(path: Path) -> FileHash:
    try:
        return hash_file(path)
    except RecordError as error:
        raise Refused("weights-malformed", str(path), str(error)) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error}"
        raise CannotCheck(msg) from error


def _release_folders(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob(RELEASE_NAME)):
        parts = path.relative_to(root).parts
        if len(parts) <= _DEEPEST and not any(part.startswith(".") for part in parts):
            yield path.parent


@dataclass(frozen=True)
class _Search:
    identity: FileHash
    expect: str | None
    found: Found

    def look_in_folder(self, folder: Path) -> None:
        """Notes a release directory that holds the file."""
        try:
            lists = [read_file(folder, name, limit=limit) for name, limit in _LISTS.items()]
            is_holder = self._holds(folder.name, lists[0], lists[1])
        except (Refused, CannotCheck) as error:
            self.found.damaged.append(f"{folder}: {error}")
            return
        if is_holder:
            self.found.folders.append(folder)

    def look_in_store(self, store: _Store, entry: Any, scratch: Path) -> None:
        """Fetches a release of a store that holds the file."""
        name = f"{entry.model}@{entry.version}"
        try:
            lists = [_read_stored(store, entry, one, limit) for one, limit in _LISTS.items()]
            _check_stored(store, entry, lists[0])
            if self._holds(name, lists[0], lists[1]):
                target = scratch / f"{entry.model}-{entry.version}"
                store.fetch(entry.model, entry.version, target)
                self.found.folders.append(target)
        except (Refused, LineageBroken) as error:
            self.found.damaged.append(f"{name} in the store: {error}")

    def _holds(self, where: str, sums: bytes, head: bytes) -> bool:
        """Whether a release lists these bytes, or these tensors in another container.

        Raises:
            Refused: The lists are no lists.
        """
        try:
            content = parse_json(head)
        except RecordError as error:
            raise Refused("json-malformed", RELEASE_NAME, str(error)) from error
        content = content if isinstance(content, dict) else {}
        same_bytes = self.identity.sha256 in parse_sums(sums).values()
        tensors = content.get("tensors")
        same_tensors = (
            self.identity.tensors is not None
            and isinstance(tensors, dict)
            and self.identity.tensors in tensors.values()
        )
        if not same_bytes and not same_tensors:
            return False
        name = f"{content.get('model')}@{content.get('version')}"
        if self.expect not in (None, name):
            self.found.others.append(name)
            return False
        return True


_LISTS = {SUMS_NAME: MAX_DOCUMENT, RELEASE_NAME: MAX_DOCUMENT}


def _read_stored(store: _Store, entry: Any, name: str, limit: int = _MAX_BUNDLE) -> bytes:
    with store.open_file(entry.model, entry.version, name) as stream:
        data = bytearray()
        while chunk := stream.read(1 << 20):
            data += chunk
            if len(data) > limit:
                raise Refused("file-changed", name, f"larger than {limit} bytes")
    return bytes(data)


def _check_stored(store: _Store, entry: Any, sums: bytes) -> None:
    """The list of files is the one that the store's index knows.

    Raises:
        Refused: `sums-malformed`, `file-changed`.
    """
    hashes = {**parse_sums(sums), SUMS_NAME: hashlib.sha256(sums).hexdigest()}
    with contextlib.suppress(StoreError):  # unsigned: then the digest is right without it
        bundle = _read_stored(store, entry, SIGNATURE_NAME)
        hashes[SIGNATURE_NAME] = hashlib.sha256(bundle).hexdigest()
    if release_digest({name: FileHash(one, 0) for name, one in hashes.items()}) != entry.digest:
        raise Refused("file-changed", SUMS_NAME, "not the list that the store's index knows")
