"""Lineage records: what a stage read, what it was told, what it wrote.

`record.json` holds only what the inputs determine; `run.json` beside it says when and where. An
edge names an input by role, file name, sha256 of its bytes and sha256 of the record that made it:
by the artifact alone, a record with kinder claims over the same bytes would pass.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "dinov3.record/1"
RECORD_NAME = "record.json"
RUN_NAME = "run.json"

_HEX = re.compile(r"[0-9a-f]{64}")


class RecordError(ValueError):
    """A record that cannot be read: not JSON, another schema, or fields of the wrong kind."""


@dataclass(frozen=True)
class Edge:
    """One input of a stage; `record` is None where the chain begins (a source of images)."""

    role: str
    name: str
    sha256: str
    record: str | None


@dataclass(frozen=True)
class Output:
    """One file a stage wrote; `tensors` is the tensor digest of a safetensors file, else None."""

    sha256: str
    bytes: int
    tensors: str | None = None


@dataclass(frozen=True)
class Record:
    """What one run of a stage is made of; equal inputs give equal bytes of `record.json`."""

    stage: str
    inputs: tuple[Edge, ...]
    config: Mapping[str, Any]
    config_digest: str
    code: str
    environment: str
    outputs: Mapping[str, Output]
    seeds: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    licences: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    def to_bytes(self) -> bytes:
        """The bytes of `record.json`; their sha256 is the record's own digest."""
        return canonical_json(asdict(self))


def canonical_json(value: Any) -> bytes:
    """UTF-8, sorted keys, no insignificant space; NaN and infinities are refused."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8") + b"\n"


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def parse_json(data: bytes) -> Any:
    """Reads JSON, refusing duplicate keys and non-finite numbers.

    Raises:
        RecordError: The bytes are not such JSON.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        msg = f"not readable as JSON: {error}"
        raise RecordError(msg) from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_record(path: Path) -> Record:
    """Reads and checks one `record.json`.

    Raises:
        RecordError: It is not a record of a schema this version knows.
    """
    try:
        raw = parse_json(path.read_bytes())
    except RecordError as error:
        msg = f"{path}: {error}"
        raise RecordError(msg) from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        msg = f"{path}: schema is not {SCHEMA}, got {found!r}. Read it with the version it names."
        raise RecordError(msg)
    try:
        return _record_from(raw)
    except (KeyError, TypeError) as error:
        msg = f"{path}: a field is missing or of the wrong kind: {error}"
        raise RecordError(msg) from error


def _record_from(raw: dict[str, Any]) -> Record:
    inputs = tuple(Edge(**edge) for edge in raw["inputs"])
    outputs = {name: Output(**output) for name, output in raw["outputs"].items()}
    digests = [edge.sha256 for edge in inputs] + [output.sha256 for output in outputs.values()]
    digests += [edge.record for edge in inputs if edge.record is not None]
    for value in digests:
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            msg = f"not a sha256 in lower-case hexadecimal: {value!r}"
            raise TypeError(msg)
    licences = {side: tuple(names) for side, names in raw["licences"].items()}
    return Record(**{**raw, "inputs": inputs, "outputs": outputs, "licences": licences})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"the key {twice!r} stands twice"
        raise RecordError(msg)
    return found


def _refuse_constant(name: str) -> Any:
    msg = f"not a number JSON knows: {name}"
    raise RecordError(msg)
