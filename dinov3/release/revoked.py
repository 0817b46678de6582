"""The list of keys that are no longer to be trusted, kept in git beside the receipts.

    {"revoked":[{"date":"2026-11-21","fingerprint":"sha256:…","reason":"…"}],"schema":"dinov3.revoked/1"}

A list that cannot be read never counts as an empty one.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinov3.release.record import RecordError, canonical_json, parse_json
from dinov3.release.refusals import CannotCheck

REVOKED_NAME = "revoked.json"
SCHEMA = "dinov3.revoked/1"

_FIELDS = {
    "date": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "fingerprint": re.compile(r"sha256:[0-9a-f]{64}"),
    "reason": re.compile(r"[^\x00-\x1f\x7f]{1,500}"),
}


@dataclass(frozen=True)
class Revocation:
    """A key, the day it was revoked (UTC, as the revoker's machine said), and why."""

    fingerprint: str
    reason: str
    date: str


def read_revoked(path: Path) -> dict[str, Revocation]:
    """The revoked keys by their fingerprint.

    Raises:
        CannotCheck: The file is missing, unreadable, or of another form.
    """
    try:
        raw = parse_json(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise CannotCheck(msg) from error
    except (RecordError, RecursionError) as error:
        msg = f"{path}: {error}"
        raise CannotCheck(msg) from error
    if not isinstance(raw, dict) or raw.keys() != {"revoked", "schema"}:
        msg = f"{path}: not a list of revoked keys"
        raise CannotCheck(msg)
    if raw["schema"] != SCHEMA:
        msg = f"{path}: its schema is not {SCHEMA}. Read it with a newer version."
        raise CannotCheck(msg)
    entries = raw["revoked"] if isinstance(raw["revoked"], list) else [None]
    found: dict[str, Revocation] = {}
    for number, entry in enumerate(entries):
        if not _is_entry(entry) or entry["fingerprint"] in found:
            msg = f"{path}: entry {number} is not a fingerprint, a reason and a date, once each"
            raise CannotCheck(msg)
        found[entry["fingerprint"]] = Revocation(**entry)
    return found


def revoked_bytes(revocations: Iterable[Revocation]) -> bytes:
    """The file's bytes, in order of the fingerprints.

    Raises:
        ValueError: A field is not of its form.
    """
    entries = [asdict(one) for one in sorted(revocations, key=lambda one: one.fingerprint)]
    for entry in entries:
        if not _is_entry(entry):
            wrong = next(name for name in _FIELDS if not _fits(name, entry[name]))
            msg = f"{wrong}: not of its form, got {entry[wrong]!r}"
            raise ValueError(msg)
    return canonical_json({"schema": SCHEMA, "revoked": entries})


def _is_entry(entry: Any) -> bool:
    is_object = isinstance(entry, dict) and entry.keys() == _FIELDS.keys()
    return is_object and all(_fits(name, value) for name, value in entry.items())


def _fits(name: str, value: Any) -> bool:
    return isinstance(value, str) and _FIELDS[name].fullmatch(value) is not None
