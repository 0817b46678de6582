"""What records and releases there are: in folders of stages, in release directories, in a store.

Of a release in a store only small files are read, each checked against the release digest of its
entry, so that nothing need be fetched to tell what it is made of.
"""

import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError
from dinov3.release.chain import stem_of
from dinov3.release.checks import Node, load
from dinov3.release.contents import MODEL_NAME, RELEASE_NAME, Contents
from dinov3.release.events import EVENTS_NAME
from dinov3.release.files import (
    SIGNATURE_NAME,
    SUMS_NAME,
    parse_sums,
    read_file,
    release_digest,
)
from dinov3.release.head import Head, read_head
from dinov3.release.record import MAX_DOCUMENT, RECORD_NAME, RecordError, parse_record
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.tensors import FileHash


@dataclass(frozen=True)
class Released:
    """One release: its identity, its head and the records in it; `where` says where it was found.

    `contents` reads its small files; `folder` is None in a store. `is_signed` tells that there is a
    signature, not whose nor of what: no key is at hand.
    """

    digest: str
    where: str
    head: Head
    nodes: tuple[Node, ...]
    contents: Contents
    folder: Path | None
    withdrawn: str | None = None
    is_signed: bool = False

    @property
    def signature(self) -> str:
        """What is known of who signed it, in words."""
        if not self.is_signed:
            return "none: anybody may have made it"
        return "there, but not checked: dinov3 verify does that, with a key"

    @property
    def name(self) -> str:
        """`MODEL@VERSION`."""
        return self.head.name

    @property
    def by_digest(self) -> dict[str, list[Node]]:
        """Its records."""
        return {node.digest: [node] for node in self.nodes}


@dataclass
class Index:
    """All that was found; `wrong` and `unchecked` tell what could not be believed or read."""

    nodes: dict[str, list[Node]] = field(default_factory=dict)
    releases: list[Released] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def everywhere(self) -> dict[str, Node]:
        """Each record once, of stages before those of releases."""
        found = {digest: copies[0] for digest, copies in self.nodes.items()}
        for release in self.releases:
            for node in release.nodes:
                found.setdefault(node.digest, node)
        return found

    def copies(self) -> Iterator[Node]:
        """Each record wherever it lies, in folders of stages before releases."""
        for found in (*self.nodes.values(), *(release.nodes for release in self.releases)):
            yield from found

    def add(self, release: Released) -> None:
        """Adds a release; copies of one in several places are one, withdrawn where any is."""
        for number, known in enumerate(self.releases):
            if known.digest == release.digest:
                where = f"{known.where}; {release.where}"
                withdrawn = known.withdrawn or release.withdrawn
                self.releases[number] = replace(known, where=where, withdrawn=withdrawn)
                return
        self.releases.append(release)

    def add_release(self, folder: Path) -> Released | None:
        """Reads a release directory, once; None when it cannot be believed."""
        for known in self.releases:
            if known.folder is not None and known.folder.resolve() == folder.resolve():
                return known
        try:
            release = read_release(folder)
        except (Refused, RecordError) as error:
            self.wrong.append(f"{folder}: {error}")
            return None
        except (CannotCheck, OSError) as error:
            self.unchecked.append(f"{folder}: {error}")
            return None
        self.add(release)
        return release


def read_index(root: Path) -> Index:
    """All records and release directories below a folder.

    Hidden folders are passed over: what lies beside resumable state is a copy.
    """
    index = Index()
    for folder, names in _folders(root):
        if RECORD_NAME in names:
            try:
                node = load(folder)
            except RecordError as error:
                index.wrong.append(str(error))
                continue
            if node is not None:
                index.nodes.setdefault(node.digest, []).append(node)
        if RELEASE_NAME in names and is_release(folder):
            index.add_release(folder)
    return index


def collect(root: Path) -> tuple[dict[str, list[Node]], list[str]]:
    """All records of stages below a folder by their digest, and what is wrong with the others."""
    index = read_index(root)
    return index.nodes, index.wrong


def is_release(folder: Path) -> bool:
    """Whether a folder says it is a release directory."""
    return (folder / RELEASE_NAME).is_file() and (folder / SUMS_NAME).is_file()


def add_store(index: Index, spec: str) -> None:
    """Adds the visible releases of a store, withdrawn ones too."""
    # By name: what reads a release never needs what writes one, but for this.
    stores = importlib.import_module("dinov3.publish.store")
    views = importlib.import_module("dinov3.publish.releases")
    try:
        store = stores.open_store(spec)
        entries = store.entries()
    except (DinoError, OSError) as error:
        index.unchecked.append(f"{spec}: {error}")
        return
    for entry in entries:
        try:
            index.add(_read_stored(spec, views.View(store, entry), entry))
        except (Refused, RecordError) as error:
            index.wrong.append(f"{spec}: {entry.name}: {error}")
        except DinoError as error:
            found = index.wrong if error.exit_code == 1 else index.unchecked
            found.append(f"{spec}: {error}")
        except (CannotCheck, OSError) as error:
            index.unchecked.append(f"{spec}: {entry.name}: {error}")


def read_release(folder: Path) -> Released:
    """Reads the head and the records of a release directory; its weights are not hashed.

    Raises:
        Refused: A file that is read differs from SHA256SUMS, or is malformed.
        RecordError: A record is malformed.
        CannotCheck: Something cannot be read.
    """
    own = {SUMS_NAME: read_file(folder, SUMS_NAME, limit=MAX_DOCUMENT)}
    if (folder / SIGNATURE_NAME).exists():
        own[SIGNATURE_NAME] = read_file(folder, SIGNATURE_NAME, limit=MAX_DOCUMENT)
    hashes = {name: FileHash(sha256, 0) for name, sha256 in parse_sums(own[SUMS_NAME]).items()}
    for name, data in own.items():
        hashes[name] = FileHash(hashlib.sha256(data).hexdigest(), len(data))
    contents = Contents(folder, hashes)
    head = read_head(contents)
    nodes = tuple(_nodes(folder, contents, head, is_here=True))
    _check_ends(contents, head, nodes)
    return Released(
        release_digest(hashes),
        str(folder),
        head,
        nodes,
        contents,
        folder,
        is_signed=SIGNATURE_NAME in hashes,
    )


@dataclass(frozen=True)
class Stored(Contents):
    """The files of a release in a store, read through a view of it."""

    view: Any

    def read(self, name: str) -> bytes:
        """The bytes of a small file, checked against the release digest."""
        if name not in self.hashes:
            raise Refused("file-missing", name, "a release needs it")
        return bytes(self.view.read(name))


def _read_stored(spec: str, view: Any, entry: Any) -> Released:
    folder = Path(entry.name)
    hashes = {name: FileHash(sha256, 0) for name, sha256 in view.digests.items()}
    contents = Stored(folder, hashes, view)
    head = read_head(contents)
    if head.name != entry.name:
        raise Refused("wrong-release", RELEASE_NAME, f"is of {head.name}, not of {entry.name}")
    nodes = tuple(_nodes(Path(spec) / entry.name, contents, head, is_here=False))
    _check_ends(contents, head, nodes)
    return Released(
        entry.digest,
        spec,
        head,
        nodes,
        contents,
        None,
        entry.withdrawn,
        is_signed=SIGNATURE_NAME in hashes,
    )


def _nodes(folder: Path, contents: Contents, head: Head, *, is_here: bool) -> Iterator[Node]:
    named = {known.sha256: name for name, known in contents.hashes.items()} if is_here else {}
    for stage, digest in head.records:
        stem = stem_of(stage, digest)
        name, run = f"records/{stem}.json", f"runs/{stem}.json"
        data = contents.read(name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused("record-missing", name, "another record stands in its place")
        record = parse_record(data, name)
        outputs = record.outputs.items()
        places = {one: named[output.sha256] for one, output in outputs if output.sha256 in named}
        if f"events/{stem}.jsonl" in contents.hashes:
            places[EVENTS_NAME] = f"events/{stem}.jsonl"
        yield Node(folder, digest, record, name, run, places)


def _check_ends(contents: Contents, head: Head, nodes: Iterable[Node]) -> None:
    """Both ends of the chain are here, and the weights are those of the one."""
    records = {node.digest: node.record for node in nodes}
    for digest in (head.final, head.evaluation):
        if digest not in records:
            raise Refused("record-missing", RELEASE_NAME, f"does not list record {digest[:16]}")
    weights = contents.hashes.get(MODEL_NAME)
    wrote = {output.sha256 for output in records[head.final].outputs.values()}
    if weights is None or weights.sha256 not in wrote:
        raise Refused("weights-differ", MODEL_NAME, f"{records[head.final].stage} never wrote it")


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(folder), [*names, *below]
