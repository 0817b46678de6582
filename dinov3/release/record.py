"""Lineage records: what a stage read, what it was told, what it wrote.

`record.json` holds only what the inputs determine; `run.json` beside it says when and where. An
edge names an input by role, file name, sha256 of its bytes and sha256 of the record that made it:
by the artifact alone, a record with kinder claims over the same bytes would pass.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also integers of too many digits
        msg = f"not readable as JSON: {error}"
        raise RecordError(msg) from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_record(path: Path) -> Record:
    """Reads and checks one `record.json`: every field's presence and kind.

    Raises:
        RecordError: It is not a record of a schema this version knows, or not a regular file.
    """
    if path.exists() and not path.is_file():
        msg = f"{path}: not a regular file"
        raise RecordError(msg)
    try:
        raw = parse_json(path.read_bytes())
    except RecordError as error:
        msg = f"{path}: {error}"
        raise RecordError(msg) from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        shown = reprlib.repr(found)
        msg = f"{path}: schema is not {SCHEMA}, got {shown}. Read it with the version it names."
        raise RecordError(msg)
    try:
        canonical_json(raw)  # lone surrogates, which no digest can be made of
        return _record_from(raw)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"{path}: a field is missing or of the wrong kind: {error}"
        raise RecordError(msg) from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _is_digest_or_none(value: Any) -> bool:
    return value is None or _is_digest(value)


_Kind = tuple[str, Callable[[Any], bool]]
_SHA256 = "a sha256 in lower-case hexadecimal"
_TEXT: _Kind = ("a string", _is_text)
_OBJECT: _Kind = ("an object", _is_object)
_DIGEST: _Kind = (_SHA256, _is_digest)
_DIGEST_OR_NONE: _Kind = (f"{_SHA256} or null", _is_digest_or_none)
_RECORD: dict[str, _Kind] = {
    "schema": _TEXT,
    "stage": _TEXT,
    "inputs": ("a list", _is_list),
    "config": _OBJECT,
    "config_digest": _DIGEST,
    "code": _DIGEST,
    "environment": _DIGEST,
    "outputs": _OBJECT,
    "seeds": _OBJECT,
    "steps": _OBJECT,
    "licences": _OBJECT,
    "facts": _OBJECT,
}
_EDGE = {"role": _TEXT, "name": _TEXT, "sha256": _DIGEST, "record": _DIGEST_OR_NONE}
_OUTPUT: dict[str, _Kind] = {
    "sha256": _DIGEST,
    "bytes": ("a size in bytes", _is_size),
    "tensors": _DIGEST_OR_NONE,
}
_OPTIONAL = {"seeds", "steps", "facts", "tensors"}


def _record_from(raw: dict[str, Any]) -> Record:
    fields = _checked("record", raw, _RECORD)
    inputs = tuple(
        Edge(**_checked(f"inputs[{number}]", edge, _EDGE))
        for number, edge in enumerate(fields["inputs"])
    )
    outputs = {
        name: Output(**_checked(f"outputs[{reprlib.repr(name)}]", output, _OUTPUT))
        for name, output in fields["outputs"].items()
    }
    sides = dict.fromkeys(fields["licences"], ("a list of strings", _is_texts))
    licences = {
        side: tuple(names)
        for side, names in _checked("licences", fields["licences"], sides).items()
    }
    return Record(**{**fields, "inputs": inputs, "outputs": outputs, "licences": licences})


def _checked(where: str, raw: Any, kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    """The object itself, when it has the fields it needs, no others, each of its kind."""
    if not isinstance(raw, dict):
        msg = f"{where}: not an object, got {reprlib.repr(raw)}"
        raise TypeError(msg)
    missing, unknown = kinds.keys() - raw.keys() - _OPTIONAL, raw.keys() - kinds.keys()
    if missing or unknown:
        word, names = ("lacks", missing) if missing else ("unknown field", unknown)
        msg = f"{where}: {word} {reprlib.repr(min(names))}"
        raise TypeError(msg)
    for name, value in raw.items():
        words, fits = kinds[name]
        if not fits(value):
            msg = f"{where}: {name}: not {words}: {reprlib.repr(value)}"
            raise TypeError(msg)
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            msg = f"the key {reprlib.repr(name)} stands twice"
            raise RecordError(msg)
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_constant(text[:40])
    return value


def _refuse_constant(name: str) -> NoReturn:
    msg = f"not a number JSON knows: {name}"
    raise RecordError(msg)
