"""Forgery with the true key: what an insider, or a key thief, can do to a release.

`settle` makes a changed release agree with itself again: every digest of a changed file is replaced
wherever it is named, records are renamed after their new digests, and the list of files is written
anew. What is left for the verifier to find is the lie itself.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.publish.private_key import PrivateKey
from dinov3.release.files import SIGNATURE_NAME, SUMS_NAME, format_sums
from dinov3.release.record import canonical_json, digest_of, file_sha256
from dinov3.release.signature import MEDIA_TYPE, PAYLOAD_TYPE, PREDICATE_TYPE, STATEMENT_TYPE

_BINARY = (".safetensors", ".bin")

Change = Callable[[Path], None]
Edit = Callable[[Any], None]


def forge(release: Path, target: Path, change: Change, key: PrivateKey, *, settled: bool) -> Path:
    """A copy of a release, changed and signed again.

    Args:
        release: A genuine one.
        target: Becomes the copy.
        change: What is done to it.
        key: Signs it.
        settled: Whether all that names a changed file is changed with it.
    """
    shutil.copytree(release, target)
    before = _hashes(target)
    change(target)
    if settled:
        settle(target, before)
    sign_again(target, key)
    return target


def sign_again(folder: Path, key: PrivateKey, change: Edit = lambda statement: None) -> None:
    """Writes list and signature over the files that are here now.

    Args:
        folder: The release.
        key: Signs it.
        change: Of the statement that is signed.
    """
    list_again(folder)
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    listed = sorted(_hashes(folder).items(), key=lambda item: PurePosixPath(item[0]).parts)
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": folder.name, "digest": {}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest} for name, digest in listed
            ],
        },
    }
    change(statement)
    if statement["subject"]:
        digests = (one["digest"] for one in statement["predicate"]["resources"])
        whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests))
        statement["subject"][0]["digest"] = {"sha256": whole.hexdigest()}
    sign_payload(folder, key, canonical_json(statement))


def sign_payload(
    folder: Path, key: PrivateKey, payload: bytes, payload_type: str = PAYLOAD_TYPE
) -> None:
    """Writes a bundle that this key signed over any payload of any type."""
    hint = hashlib.sha256(key.public).hexdigest()
    signature = key.sign(payload_type, payload)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    material = {"publicKey": {"hint": hint}, "tlogEntries": []}
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": material,
        "dsseEnvelope": envelope,
    }
    (folder / SIGNATURE_NAME).write_bytes(canonical_json(bundle))


def list_again(folder: Path) -> None:
    """Writes `SHA256SUMS` over the files that are here now."""
    (folder / SUMS_NAME).unlink(missing_ok=True)
    (folder / SUMS_NAME).write_bytes(format_sums(_hashes(folder)))


def settle(folder: Path, before: dict[str, str]) -> None:
    """Replaces digests of changed files wherever they are named, until nothing changes."""
    known = dict(before)
    while True:
        now = _hashes(folder)
        changed = [name for name in sorted(now) if name in known and known[name] != now[name]]
        if not changed:
            return
        name = changed[0]
        old, new = known[name], now[name]
        known[name] = new
        swaps = [(old, new)]
        if name.startswith("records/"):
            swaps.append((old[:12], new[:12]))  # in names of files and on the card
        for path in _files(folder):
            if path.suffix not in _BINARY and path.name not in (SUMS_NAME, SIGNATURE_NAME):
                _replace(path, swaps)
        if name.startswith("records/"):
            _rename(folder, known, _stem(name), f"{_stem(name)[:-12]}{new[:12]}")


def edit_json(folder: Path, name: str, change: Edit) -> None:
    """Changes a JSON file of a release, which stays canonical."""
    content = json.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(canonical_json(content))


def edit_record(folder: Path, stage: str, change: Edit) -> None:
    """Changes the record of a stage; the digest of its config is kept right."""

    def keep_right(record: Any) -> None:
        change(record)
        record["config_digest"] = digest_of(record["config"])

    edit_json(folder, record_of(folder, stage), keep_right)


def record_of(folder: Path, stage: str, part: str = "records") -> str:
    """Name of the record of a stage, or of what lies beside it, in a release."""
    (path,) = (folder / part).glob(f"{stage}-*")
    return path.relative_to(folder).as_posix()


def _rename(folder: Path, known: dict[str, str], old: str, new: str) -> None:
    for part, suffix in (("records", "json"), ("runs", "json"), ("events", "jsonl")):
        path = folder / part / f"{old}.{suffix}"
        if path.exists():
            path.rename(path.with_name(f"{new}.{suffix}"))
            known[f"{part}/{new}.{suffix}"] = known.pop(f"{part}/{old}.{suffix}")


def _replace(path: Path, swaps: list[tuple[str, str]]) -> None:
    data = path.read_bytes()
    for old, new in swaps:
        data = data.replace(old.encode(), new.encode())
    if data != path.read_bytes():
        path.write_bytes(data)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
