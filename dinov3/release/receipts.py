"""The log of receipts: what was published and withdrawn, one signed line each, kept in git.

Each line names the sha256 of the line before it. A line cut out, re-ordered or re-made breaks the
chain; lines cut off at the end do not, which is why the log stands in git and is compared with
the store.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinov3.release.envelope import MAX_BYTES, open_among, read_unchecked
from dinov3.release.refusals import CannotCheck, Refused

RECEIPTS_NAME = "receipts.jsonl"
KEYS_NAME = "keys"


@dataclass(frozen=True)
class Receipt:
    """One line: a release was made visible (`publish`), or its signer took it back (`withdraw`).

    `release` is the release's digest; `audited` names what was read back from the store before it
    became visible, `merged` what made it so. `previous` is the sha256 of the line before (None for
    the first), `signer` a fingerprint: both are filled in on appending.
    """

    kind: str
    model: str
    version: str
    release: str
    audited: str | None = None
    merged: str | None = None
    reason: str | None = None
    previous: str | None = None
    signer: str | None = None

    def payload(self) -> dict[str, Any]:
        """What is signed."""
        return asdict(self)


@dataclass(frozen=True)
class Line:
    """A receipt as it stands in the log: its own sha256, its envelope, what it says."""

    sha256: str
    envelope: bytes
    receipt: Receipt


def read_receipts(path: Path, keys: Iterable[bytes] | None) -> list[Receipt]:
    """Reads the log and checks its chain and every signature; no file is an empty log.

    Args:
        path: `receipts.jsonl`.
        keys: Public keys in PEM, one of which signed each line; None leaves signers unchecked.

    Raises:
        Refused: A line is malformed, not signed by one of the keys, or not in its place.
        CannotCheck: The file or a key is unreadable.
    """
    return [line.receipt for line in read_lines(path, keys)]


def read_lines(path: Path, keys: Iterable[bytes] | None) -> list[Line]:
    """As `read_receipts`, with each line's digest and envelope.

    Raises:
        Refused: A line is malformed, not signed by one of the keys, or not in its place.
        CannotCheck: The file or a key is unreadable.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise CannotCheck(msg) from error
    return parse_lines(data, keys, where=path.name)


def parse_lines(data: bytes, keys: Iterable[bytes] | None, *, where: str) -> list[Line]:
    """The lines of a log's bytes.

    Args:
        data: The whole log.
        keys: As for `read_receipts`.
        where: What to call the log in a refusal.

    Raises:
        Refused: A line is malformed, not signed by one of the keys, or not in its place.
        CannotCheck: A key is unreadable.
    """
    known = None if keys is None else list(keys)
    found: list[Line] = []
    for number, envelope in enumerate(data.splitlines(keepends=True), 1):
        place = f"{where}:{number}"
        try:
            payload = read_unchecked(envelope) if known is None else open_among(envelope, known)
        except Refused as error:
            raise Refused(error.name, place, error.why) from error
        receipt = Receipt(**payload)
        if receipt.previous != (found[-1].sha256 if found else None):
            raise Refused("receipts-broken", place, "does not follow the line before it")
        found.append(Line(hashlib.sha256(envelope).hexdigest(), envelope, receipt))
    return found


def read_keys(folder: Path) -> list[bytes]:
    """The public keys that a log trusts: `keys/*.pub` beside it.

    Raises:
        CannotCheck: One is unreadable or larger than any key.
    """
    keys = []
    for path in sorted((folder / KEYS_NAME).glob("*.pub")):
        try:
            if path.stat().st_size > MAX_BYTES:
                msg = f"{path}: larger than any key"
                raise CannotCheck(msg)
            keys.append(path.read_bytes())
        except OSError as error:
            msg = f"{path}: cannot be read: {error.strerror}"
            raise CannotCheck(msg) from error
    return keys
