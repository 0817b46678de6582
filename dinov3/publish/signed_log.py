"""Signing what is no release: envelopes of receipts and withdrawals, and the log they stand in."""

import base64
import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError, LineageBroken
from dinov3.publish.private_key import PrivateKey
from dinov3.release.envelope import PAYLOAD_TYPES, check_payload, empty_payload, open_envelope
from dinov3.release.receipts import RECEIPTS_NAME, Line, Receipt, parse_lines, read_lines
from dinov3.release.record import canonical_json
from dinov3.release.refusals import CannotCheck, Refused


def sign_envelope(payload: Mapping[str, Any], key: PrivateKey) -> bytes:
    """An envelope of a receipt or a withdrawal, as `open_envelope` takes it.

    Args:
        payload: `kind` (`publish`, `withdraw`), `model`, `version`, `release` (its digest), and of
            the others what there is; the signer is filled in.
        key: Signs it.

    Raises:
        DinoError: A field is unknown, absent or of the wrong kind.
    """
    whole = {**empty_payload(str(payload.get("kind"))), **payload, "signer": key.fingerprint}
    try:
        check_payload(whole, "receipt")
    except Refused as error:
        msg = f"{error}, got {dict(payload)!r}. Correct it."
        raise DinoError(msg) from error
    raw = canonical_json(whole)
    payload_type = PAYLOAD_TYPES[whole["kind"]]
    signature = {"keyid": key.fingerprint, "sig": _base64(key.sign(payload_type, raw))}
    envelope = {"payload": _base64(raw), "payloadType": payload_type, "signatures": [signature]}
    data = canonical_json(envelope)
    open_envelope(data, key.public, whole["kind"])
    return data


def append_receipt(log: Path, receipt: Receipt, key: PrivateKey) -> Line:
    """Adds a signed line to the log; one that says the same already is returned as it stands.

    A second process waits for the first. The log is replaced whole, so that a process killed at
    any moment leaves the old log or the new one.

    Args:
        log: The folder of the release log.
        receipt: What happened; `previous` and `signer` are filled in.
        key: Signs it.

    Raises:
        LineageBroken: The log as it stands does not hold together.
        DinoError: A field is of the wrong kind, or the log cannot be written.
    """
    path = log / RECEIPTS_NAME
    try:
        log.mkdir(parents=True, exist_ok=True)
        with locked(log):
            lines = _standing(path)
            for line in lines:
                if _says(line.receipt) == _says(receipt):
                    return line
            following = replace(receipt, previous=lines[-1].sha256 if lines else None)
            data = sign_envelope(asdict(following), key)
            before = b"".join(line.envelope for line in lines)
            replace_whole(path, before + data)
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}. Free the disk, or mend its rights."
        raise DinoError(msg) from error
    return parse_lines(before + data, None, where=path.name)[-1]


def _standing(path: Path) -> list[Line]:
    try:
        return read_lines(path, None)
    except (Refused, CannotCheck) as error:
        msg = f"{error}. Restore the log from git."
        raise LineageBroken(msg) from error


def _says(receipt: Receipt) -> Receipt:
    """A receipt without what depends on its place in the log and on who signed."""
    return replace(receipt, previous=None, signer=None)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the lock is on the folder itself, so that no file is left in git.

    Raises:
        BlockingIOError: Another process has it, and it is not to be waited for.
        OSError: There is no such folder, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def replace_whole(path: Path, data: bytes) -> None:
    """Temporary name, fsync, rename, fsync of the folder: called under the lock."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
