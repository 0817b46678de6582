"""What a lakeFS store writes beside releases: its index, and the hook that guards `main`.

Every publication and withdrawal rewrites the one index file. Two made on top of the same commit
therefore conflict, and exactly one is merged: the server itself compares and sets.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dinov3.errors import LineageBroken
from dinov3.release.record import RecordError, canonical_json, parse_json

SCHEMA = "dinov3.lakefs-index/1"
INDEX = "index.json"
HOOK = "_lakefs_actions/audited.yaml"

# A guard against mistakes, not against a key holder: hooks are read from the commit to be merged.
HOOK_TEXT = b"""\
name: audited
description: main takes commits only that their publisher has read back
on:
  pre-merge:
    branches:
      - main
hooks:
  - id: audited
    type: lua
    properties:
      script: |
        local metadata = action.commit.metadata
        if metadata == nil or metadata["audited_commit"] ~= action.source_ref then
          error("main takes audited commits only: use dinov3 publish")
        end
"""

_NO_TEXTS = {"number", "previous"}


@dataclass(frozen=True)
class Line:
    """The index after one change: what changed, on top of what.

    `base` is the commit of `main` it was written on, `previous` the sha256 of the index there,
    `run` the branch of its publisher: it makes equal changes of two publishers conflict too.
    """

    store: str
    number: int
    kind: str  # setup, publish or withdraw
    model: str
    version: str
    digest: str  # of the release, or of the withdrawal's envelope
    base: str
    previous: str | None
    run: str

    def to_bytes(self) -> bytes:
        """The bytes of the index file."""
        return canonical_json({"schema": SCHEMA, **asdict(self)})


def read_line(data: bytes, where: str) -> Line:
    """The index in the bytes of its file.

    Raises:
        LineageBroken: They are no index of this schema.
    """
    try:
        found = parse_json(data)
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            msg = f"schema is not {SCHEMA}"
            raise RecordError(msg)
        line = Line(**found)
        texts = (line.previous or "", *(found[name] for name in found.keys() - _NO_TEXTS))
        is_index = type(line.number) is int and all(isinstance(text, str) for text in texts)
        if not is_index or line.to_bytes() != data:
            msg = "not written as an index is"
            raise RecordError(msg)
    except (RecordError, TypeError, ValueError) as error:
        msg = f"{where}: no index of releases: {error}. Restore the store, or update dinov3."
        raise LineageBroken(msg) from error
    return line


def sha256_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def claims(line: Line, audited: str) -> dict[str, str]:
    """The metadata of the merge commit of a change; the commit id binds them."""
    return {
        "kind": line.kind,
        "model": line.model,
        "version": line.version,
        "digest": line.digest,
        "audited_commit": audited,
    }


def agrees(line: Line, metadata: Mapping[str, str]) -> bool:
    """Whether the index at a merge commit says what the commit's metadata say."""
    said = claims(line, metadata.get("audited_commit", ""))
    return all(metadata.get(name) == value for name, value in said.items())
