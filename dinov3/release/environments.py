"""Which version of a package made a record, as far as anything here tells.

A record holds the digest of the lock file it ran with, not its content. `run.json` may name
versions; else a lock file of that digest must be at hand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinov3.errors import DinoError
from dinov3.release.checks import Node, read_run
from dinov3.release.index import Index
from dinov3.release.record import RecordError, file_sha256, parse_json
from dinov3.release.refusals import Refused

LOCK_NAME = "requirements.lock"
PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


@dataclass
class Versions:
    """Record -> version of one package; records that do not tell, by the digest of their lock."""

    told: dict[str, str] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)


def versions_of(package: str, root: Path, index: Index) -> Versions:
    """The version of a package that each record ran with.

    Args:
        package: Its name.
        root: Folder of the records; a lock file beside it or in the working folder is read.
        index: The records.
    """
    locks = _locks(root)
    versions = Versions()
    for digest, node in index.everywhere().items():
        lock = node.record.environment
        found = _of_run(node, index).get(package) or locks.get(lock, {}).get(package)
        if isinstance(found, str):
            versions.told[digest] = found
        else:
            versions.silent[lock] = versions.silent.get(lock, 0) + 1
    return versions


def is_version(found: str, wanted: str) -> bool:
    """Whether a version is the wanted one or a closer description of it: 2.15 is 2.15.0+cpu."""
    return found == wanted or found.startswith((f"{wanted}.", f"{wanted}+"))


def _of_run(node: Node, index: Index) -> Mapping[str, str]:
    """What `run.json` says of versions, in the folder of a stage, in a release or in a store."""
    try:
        run = read_run(node)
        for release in index.releases:
            if run is None and node in release.nodes and node.run in release.contents.hashes:
                run = parse_json(release.contents.read(node.run))
    except (RecordError, Refused):  # a fault of the node, which the way to the roots names
        return {}
    except DinoError as error:  # of a store
        (index.wrong if error.exit_code == 1 else index.unchecked).append(str(error))
        return {}
    versions = run.get("versions") if isinstance(run, dict) else None
    return versions if isinstance(versions, dict) else {}


def _locks(root: Path) -> dict[str, dict[str, str]]:
    """The lock files at hand by their digest: package -> version."""
    found = {}
    for path in {root.resolve().parent / LOCK_NAME, Path.cwd() / LOCK_NAME}:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            pins = (PINNED.match(line) for line in lines)
            found[file_sha256(path)] = {pin[1]: pin[2] for pin in pins if pin}
    return found
