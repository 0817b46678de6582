"""One picture by its sha256: its source, licence and cluster, and why it was left out.

`images.bin` tells its role with the standard library alone. The rest stands in two tables of
parquet, read with polars where it is installed: one column is scanned for the digest. Each file is
hashed against its record before it is believed.
"""

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dinov3.errors import DinoError
from dinov3.release.checks import Node
from dinov3.release.head import KEYED, PLAIN
from dinov3.release.images import IMAGES_NAME, read_images
from dinov3.release.index import Index, Released, Stored
from dinov3.release.record import RecordError, file_sha256
from dinov3.release.refusals import Refused

MANIFEST_NAME = "manifest.parquet"
CURATED_NAME = "curated.parquet"
_TABLES = (CURATED_NAME, MANIFEST_NAME)
_OF_MANIFEST = ("path", "source", "licence", "label", "caption", "split", "width", "height")
_OF_CURATED = ("path", "kept", "reason", "duplicate_of", "similarity", "cluster")
_SHOWN_AS = {"reason": "left out because", "duplicate_of": "duplicate of"}


@dataclass(frozen=True)
class Picture:
    """What one table or list says of the picture, and the record that wrote it."""

    title: str
    facts: dict[str, Any]
    node: Node


@dataclass
class Pictures:
    """What all of them say.

    Attributes:
        found: One of each list and each row of a table.
        roles: In releases that tell, by release digest; empty where the picture is not in it.
        silent: Why the other releases do not tell.
        wrong: Files that are not what their record says.
        unchecked: Files that cannot be read here.
    """

    found: list[Picture] = field(default_factory=list)
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        """The records that say something, without those that others of them are made from."""
        distinct = {one.node.digest: one.node for one in self.found}
        above = {edge.record for node in distinct.values() for edge in node.record.inputs}
        return [node for digest, node in distinct.items() if digest not in above]


def find_picture(digest: bytes, index: Index) -> Pictures:
    """Looks a picture up in every list and table of the records and releases there are."""
    seen = Pictures()
    lists: dict[str, tuple[str, ...]] = {}  # roles by sha256 of the list
    nodes = list(index.copies())
    for node, path in _present(nodes, IMAGES_NAME, seen):
        try:
            roles = roles_in(path, digest)
        except Refused as error:
            seen.wrong.append(f"{path}: {error}")
            continue
        lists[node.record.outputs[IMAGES_NAME].sha256] = roles
        if roles:
            facts = {"role": ", ".join(roles), "record": node.digest}
            seen.found.append(Picture(f"a picture of {node.record.stage}", facts, node))
    _look_in_tables(digest.hex(), nodes, seen)
    for release in index.releases:
        _look_in_release(digest, release, lists, seen)
    return seen


def tells_role(facts: Mapping[str, Any]) -> bool:
    """Whether what is said of a picture tells if it was trained on; an image table does not."""
    return "role" in facts or "kept" in facts


def roles_in(path: Path, digest: bytes) -> tuple[str, ...]:
    """What an `images.bin` says of a picture.

    Raises:
        Refused: `images-malformed`.
        OSError: It cannot be read.
    """
    with read_images(path) as images:
        return tuple(images.roles[role] for role in images.find(digest))


def _present(nodes: Sequence[Node], name: str, seen: Pictures) -> list[tuple[Node, Path]]:
    """The records that wrote such a file, each once, with bytes of it that are here and unchanged.

    They may lie beside another copy of the record, or another record of the same bytes.
    """
    here: dict[str, Path] = {}
    wrote = [
        (node, node.record.outputs[name].sha256) for node in nodes if name in node.record.outputs
    ]
    for node, sha256 in wrote:
        path = None if sha256 in here else _find_unchanged(node, name, sha256, seen)
        if path is not None:
            here[sha256] = path
    found: dict[str, tuple[Node, Path]] = {}
    for node, sha256 in wrote:
        if sha256 in here:
            found.setdefault(node.digest, (node, here[sha256]))
    return list(found.values())


def _find_unchanged(node: Node, name: str, sha256: str, seen: Pictures) -> Path | None:
    try:
        path = node.find(name)
        found = None if path is None else file_sha256(path)
    except RecordError as error:
        seen.wrong.append(str(error))
        return None
    except OSError as error:
        seen.unchecked.append(f"{node.folder / name}: {error}")
        return None
    if found not in (None, sha256):
        why = f"changed, its sha256 is {found}, the record says {sha256}"
        seen.wrong.append(f"{path}: {why}")
        return None
    return path


def _look_in_tables(digest: str, nodes: Sequence[Node], seen: Pictures) -> None:
    tables = [(name, *pair) for name in _TABLES for pair in _present(nodes, name, seen)]
    if not tables:
        return
    try:
        polars = importlib.import_module("polars")  # by name: an auditor has none, and is told
    except ImportError:
        msg = "source, licence and cluster are in parquet, which is read with polars"
        seen.unchecked.append(f"{tables[0][2]}: {msg}. Install it: pip install polars.")
        return
    for name, node, path in tables:
        try:
            seen.found.extend(_rows(polars, digest, name, node, path))
        except (polars.exceptions.PolarsError, OSError) as error:
            seen.unchecked.append(f"{path}: not a table of pictures: {error}")


def _rows(polars: ModuleType, digest: str, name: str, node: Node, path: Path) -> Iterator[Picture]:
    """Scans the column of digests; the other columns are needed of the rows that match alone."""
    table = polars.scan_parquet(path)
    present = table.collect_schema().names()
    wanted = _OF_MANIFEST if name == MANIFEST_NAME else _OF_CURATED
    columns = [column for column in wanted if column in present]
    rows = table.filter(polars.col("sha256") == digest).select(columns).collect()
    for row in rows.iter_rows(named=True):
        title = f"a picture of {node.record.stage}: {row.pop('path', digest)}"
        facts = {
            _SHOWN_AS.get(fact, fact): _told(value)
            for fact, value in row.items()
            if value is not None
        }
        yield Picture(title, {**facts, "record": node.digest}, node)


def _told(value: Any) -> str | int | list[int]:
    """A value as JSON holds it exactly, whatever type the table chose."""
    is_path = isinstance(value, list) and all(isinstance(one, int) for one in value)
    return value if isinstance(value, int) or is_path else str(value)


def _look_in_release(
    digest: bytes, release: Released, lists: dict[str, tuple[str, ...]], seen: Pictures
) -> None:
    """By a list that is here already, else by the release's own, where that one is public."""
    images = release.head.images
    if images is None:
        seen.silent.append(f"{release.name}: says nothing of pictures")
        return
    if images.sha256 not in lists:
        if images.mode != PLAIN:
            how = "keyed by a salt" if images.mode == KEYED else "given by its digest alone"
            seen.silent.append(f"{release.name}: its list of pictures is {how}")
            return
        try:
            lists[images.sha256] = _roles_in_contents(digest, release)
        except Refused as error:
            seen.wrong.append(f"{release.name}: {error}")
            return
        except DinoError as error:
            (seen.wrong if error.exit_code == 1 else seen.unchecked).append(str(error))
            return
    roles = lists[images.sha256]
    seen.roles[release.digest] = roles
    if roles:
        node = _writer(release)
        facts = {"role": ", ".join(roles), "where": release.where}
        if release.withdrawn is not None:
            facts["withdrawn"] = release.withdrawn
        seen.found.append(Picture(f"a picture of release {release.name}", facts, node))


def _roles_in_contents(digest: bytes, release: Released) -> tuple[str, ...]:
    """A list in a store is copied first: it is searched back and forth, and hashed on the way."""
    if not isinstance(release.contents, Stored):
        raise Refused("images-differ", IMAGES_NAME, "not the list of the curated dataset")
    with tempfile.TemporaryDirectory(prefix="dinov3-lineage-") as scratch:
        path = release.contents.view.copy(IMAGES_NAME, Path(scratch) / IMAGES_NAME)
        return roles_in(path, digest)


def _writer(release: Released) -> Node:
    """The record that wrote a release's list."""
    wrote = (node for node in release.nodes if IMAGES_NAME in node.record.outputs)
    return next(wrote, release.by_digest[release.head.final][0])
