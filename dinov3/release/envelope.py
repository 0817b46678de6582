"""Signed statements that are no release: receipts of what was published, and withdrawals.

A DSSE envelope in canonical JSON, one line, with one signature that names its key by fingerprint.
Each kind has a payload type of its own: none can be passed off as another, nor as a release.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dinov3.release.public_key import check_bytes, fingerprint_of, load_public_key
from dinov3.release.record import RecordError, canonical_json, parse_json
from dinov3.release.refusals import Refused

PAYLOAD_TYPES = {
    "publish": "application/vnd.dinov3.publish.v1+json",
    "withdraw": "application/vnd.dinov3.withdraw.v1+json",
}
MAX_BYTES = 1 << 20

_MODEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_TEXT = 2000


def open_envelope(data: bytes, key: bytes, kind: str | None = None) -> dict[str, Any]:
    """The payload of an envelope that this key signed.

    Args:
        data: The envelope: canonical JSON, ended by one line feed.
        key: The public key in PEM.
        kind: The only kind that is taken (`publish`, `withdraw`); None takes either.

    Raises:
        Refused: The key did not sign it, or it is of another form or kind.
        CannotCheck: The key is unreadable.
    """
    return open_among(data, [key], kind)


def open_among(data: bytes, keys: Iterable[bytes], kind: str | None = None) -> dict[str, Any]:
    """As `open_envelope`, signed by whichever of several keys it names.

    Raises:
        Refused: None of the keys signed it, or it is of another form or kind.
        CannotCheck: A key is unreadable.
    """
    where = kind or "envelope"
    loaded = [load_public_key(key) for key in keys]
    payload, raw, signature = _open(data, kind, where)
    known = {fingerprint_of(key): key for key in loaded}
    if payload["signer"] not in known:
        why = f"signed by {payload['signer']}, which is no key that was given"
        raise Refused("signature-invalid", where, why)
    payload_type = PAYLOAD_TYPES[payload["kind"]]
    check_bytes(known[payload["signer"]], payload_type, raw, signature, where)
    return payload


def read_unchecked(data: bytes, kind: str | None = None) -> dict[str, Any]:
    """The payload of a well-formed envelope, whoever signed it.

    Raises:
        Refused: It is of another form or kind.
    """
    return _open(data, kind, kind or "envelope")[0]


def _open(data: bytes, kind: str | None, where: str) -> tuple[dict[str, Any], bytes, bytes]:
    if len(data) > MAX_BYTES:
        raise Refused("json-malformed", where, f"longer than any envelope, {len(data)} bytes")
    envelope = parse_canonical(data, where)
    kinds = {payload_type: name for name, payload_type in PAYLOAD_TYPES.items()}
    payload_type = envelope.get("payloadType") if isinstance(envelope, dict) else None
    found = kinds.get(payload_type) if isinstance(payload_type, str) else None
    if found is None or (kind is not None and found != kind):
        raise Refused("signature-type", where, f"not of kind {kind or ' or '.join(PAYLOAD_TYPES)}")
    keyid, raw, signature = open_dsse(envelope, PAYLOAD_TYPES[found], where)
    payload = parse_canonical(raw, where)
    check_payload(payload, where)
    if payload["kind"] != found:
        raise Refused("signature-type", where, "its payload is of another kind than its type")
    if payload["signer"] != keyid:
        raise Refused("signature-invalid", where, "its payload names another signer than the key")
    return payload, raw, signature


def check_payload(payload: Any, where: str) -> None:
    """Checks that each field is there and of its kind.

    Raises:
        Refused: One is not.
    """
    if not has_fields(payload, *_FIELDS):
        raise Refused("json-malformed", where, f"not an object of {', '.join(_FIELDS)}")
    for name, fits in _FIELDS.items():
        if not fits(payload[name]):
            raise Refused("json-malformed", where, f"{name} is of the wrong kind")
    if (payload["kind"] == "withdraw") != (payload["reason"] is not None):
        raise Refused("json-malformed", where, "a withdrawal has a reason, and nothing else has")


def _matches(pattern: re.Pattern[str], *, optional: bool = False) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if value is None:
            return optional
        return isinstance(value, str) and pattern.fullmatch(value) is not None

    return fits


def _is_kind(value: Any) -> bool:
    return isinstance(value, str) and value in PAYLOAD_TYPES


def _is_text_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and 0 < len(value) <= _MAX_TEXT)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": _is_kind,
    "model": _matches(_MODEL),
    "version": _matches(_VERSION),
    "release": _matches(_SHA256),
    "audited": _is_text_or_none,
    "merged": _is_text_or_none,
    "previous": _matches(_SHA256, optional=True),
    "reason": _is_text_or_none,
    "signer": _matches(_FINGERPRINT),
}


def open_dsse(envelope: Any, payload_type: str, where: str) -> tuple[str, bytes, bytes]:
    """Key id, payload and signature of an envelope with exactly one signature; not yet checked.

    Args:
        envelope: The parsed JSON.
        payload_type: The only type that is taken.
        where: What to call the envelope in a refusal.

    Raises:
        Refused: It is of another form or type.
    """
    if not has_fields(envelope, "payload", "payloadType", "signatures"):
        raise Refused("signature-invalid", where, "not an envelope of payload, type and signatures")
    if envelope["payloadType"] != payload_type:
        raise Refused("signature-type", where, f"the payload is not of type {payload_type}")
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise Refused("signature-invalid", where, "does not carry exactly one signature")
    one = signatures[0]
    if not has_fields(one, "keyid", "sig") or not isinstance(one["keyid"], str):
        raise Refused("signature-invalid", where, "its signature is not a key id and a value")
    return one["keyid"], decode_base64(envelope["payload"], where), decode_base64(one["sig"], where)


def decode_base64(text: Any, where: str) -> bytes:
    """Base64 in its only canonical form.

    Raises:
        Refused: It is another form, or no text.
    """
    if not isinstance(text, str):
        raise Refused("signature-invalid", where, "holds something else than base64")
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error) as error:
        raise Refused("signature-invalid", where, "holds something else than base64") from error
    if base64.b64encode(raw).decode() != text:
        raise Refused("signature-invalid", where, "holds base64 that is not canonical")
    return raw


def parse_canonical(data: bytes, where: str) -> Any:
    """Strict JSON whose bytes are the only ones for its content.

    Raises:
        Refused: They are not.
    """
    parsed = parse_strict(data, where)
    try:
        is_canonical = canonical_json(parsed) == data
    except (ValueError, RecursionError):  # ValueError: also surrogates that UTF-8 cannot hold
        is_canonical = False
    if not is_canonical:
        raise Refused("json-malformed", where, "not in canonical form")
    return parsed


def parse_strict(data: bytes, where: str) -> Any:
    """JSON without doubled keys, huge numbers or deep nesting.

    Raises:
        Refused: It has one, or is no JSON.
    """
    try:
        return parse_json(data)
    except (RecordError, RecursionError) as error:
        raise Refused("json-malformed", where, str(error)) from error


def has_fields(value: Any, *names: str) -> bool:
    """Whether it is an object of exactly these fields."""
    return isinstance(value, dict) and value.keys() == set(names)


def empty_payload(kind: str) -> Mapping[str, Any]:
    """Every field of a payload, those that a kind leaves out as null."""
    return {**dict.fromkeys(_FIELDS), "kind": kind}
