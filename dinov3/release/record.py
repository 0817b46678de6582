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

MAX_DOCUMENT = 16 << 20  # bytes of one JSON document

_MAX_DEPTH = 64
_MAX_CONTAINERS = 1 << 18  # lists and objects of a document; each takes 60 bytes and more
_MAX_ITEMS = 1 << 20
_MAX_DIGITS = 18  # any such integer fits in 64 bits with its sign
_MAX_FLOAT = 40  # characters; the longest that Python writes has 24
_HEX = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")


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


def parse_json(data: bytes, *, max_bytes: int = MAX_DOCUMENT) -> Any:
    """Reads JSON that every reader understands alike, of bounded size, depth and digits.

    Refused are a key that stands twice, numbers that are not finite, integers of more than 18
    digits or written `-0`, lone surrogates, a byte order mark, and anything after the value.

    Raises:
        RecordError: The bytes are not such JSON.
    """
    try:
        _check_extent(data, max_bytes)
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short_integer,
        )
        if _SURROGATE.search(data):
            canonical_json(value)  # an escaped half of a pair alone cannot be encoded
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        msg = f"not readable as JSON: {error}"
        raise RecordError(msg) from error
    return value


def parse_object(data: bytes, *, max_bytes: int = MAX_DOCUMENT) -> dict[str, Any]:
    """Reads such JSON whose value is an object.

    Raises:
        RecordError: The bytes are not such JSON, or the value is another.
    """
    value = parse_json(data, max_bytes=max_bytes)
    if not isinstance(value, dict):
        msg = f"not a JSON object but a {type(value).__name__}"
        raise RecordError(msg)
    return value


def parse_canonical(data: bytes, *, max_bytes: int = MAX_DOCUMENT) -> Any:
    """Reads JSON whose bytes are the only ones that `canonical_json` gives for its value.

    Raises:
        RecordError: The bytes are not such JSON, or say the same in another form.
    """
    value = parse_json(data, max_bytes=max_bytes)
    if canonical_json(value) != data:
        msg = "not canonical JSON: sorted keys, no space, one newline at the end"
        raise RecordError(msg)
    return value


def read_bounded(path: Path) -> bytes:
    """The bytes of a JSON document; of one that is too large only enough to refuse it."""
    with path.open("rb") as stream:
        return stream.read(MAX_DOCUMENT + 1)


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
    return parse_record(read_bounded(path), str(path))


def parse_record(data: bytes, where: str) -> Record:
    """The record of the bytes of a `record.json`; `where` names them in an error.

    Raises:
        RecordError: It is not a record of a schema this version knows.
    """
    try:
        raw = parse_json(data)
    except RecordError as error:
        msg = f"{where}: {error}"
        raise RecordError(msg) from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        shown = reprlib.repr(found)
        msg = f"{where}: schema is not {SCHEMA}, got {shown}. Read it with the version it names."
        raise RecordError(msg)
    try:
        canonical_json(raw)  # lone surrogates, which no digest can be made of
        return _record_from(raw)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"{where}: a field is missing or of the wrong kind: {error}"
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


def _check_extent(data: bytes, max_bytes: int) -> None:
    """Size, depth and number, before any of it is built in memory or recursed into.

    Brackets and commas within strings are counted too: no document of ours comes near.
    """
    if len(data) > max_bytes:
        msg = f"not readable as JSON: larger than {max_bytes} bytes, got {len(data)}"
        raise RecordError(msg)
    num_containers = data.count(b"[") + data.count(b"{")
    if num_containers <= _MAX_DEPTH and len(data) <= _MAX_ITEMS:
        return
    if num_containers > _MAX_CONTAINERS or data.count(b",") > _MAX_ITEMS:
        msg = f"not readable as JSON: more than {_MAX_CONTAINERS} lists or {_MAX_ITEMS} values"
        raise RecordError(msg)
    brackets = _STRING.sub(b"", data).translate(_AS_SQUARE, _NO_BRACKET)
    for _ in range(_MAX_DEPTH):  # each round takes the innermost pairs away
        if b"[]" not in brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or brackets.count(b"[") > _MAX_DEPTH:
        msg = f"not readable as JSON: nested deeper than {_MAX_DEPTH}"
        raise RecordError(msg)


def _short_integer(text: str) -> int:
    if text == "-0" or len(text.lstrip("-")) > _MAX_DIGITS:
        _refuse_number(text)
    return int(text)


def _finite(text: str) -> float:
    if len(text) > _MAX_FLOAT:
        _refuse_number(text)
    value = float(text)
    if not math.isfinite(value):
        _refuse_constant(text[:40])
    return value


def _refuse_number(text: str) -> NoReturn:
    msg = f"not readable as JSON: a number not every reader knows: {text[:_MAX_FLOAT]}"
    raise RecordError(msg)


def _refuse_constant(name: str) -> NoReturn:
    msg = f"not a number JSON knows: {name}"
    raise RecordError(msg)
