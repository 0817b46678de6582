"""The signature of a release: a bundle of model-signing, checked with `cryptography` alone.

One DSSE envelope over an in-toto statement that lists every file with its sha256. The bundle is
taken in one form only (canonical JSON and base64, the lower of the two equal ECDSA values), so
that nobody but the signer can change a byte of it; any list of ignored files is refused.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.release.envelope import has_fields, open_dsse, parse_canonical
from dinov3.release.opening import open_below
from dinov3.release.public_key import check_bytes, fingerprint_of, key_hint, load_public_key
from dinov3.release.public_key import fingerprint as fingerprint
from dinov3.release.refusals import CannotCheck, Refused

SIGNATURE_NAME = "model.sig"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
_MAX_BYTES = 32 << 20  # about 200 000 files


@dataclass(frozen=True)
class Signer:
    """Who signed: the fingerprint of the key that was checked, and the bundle's own hint.

    `fingerprint` is None where no key was given to check with, `hint` where nothing is signed.
    `sha256` is of the bytes of the bundle that was checked.
    """

    fingerprint: str | None
    hint: str | None
    sha256: str | None = field(default=None, compare=False)


def verify_signature(folder: Path, hashes: Mapping[str, str], key: bytes | None) -> Signer:
    """Checks that a key signed exactly these files; without a key, all but the signer.

    Args:
        folder: The release.
        hashes: sha256 of every file by its path in the release; that of `model.sig` is passed over.
        key: A public key in PEM.

    Raises:
        Refused: It did not, or the bundle is of another form than ours.
        CannotCheck: The bundle or the key is unreadable.
    """
    public = None if key is None else load_public_key(key)
    data = _read(folder)
    if data is None:
        if public is not None:
            raise Refused("signature-missing", SIGNATURE_NAME, "there is none, but a key was given")
        return Signer(None, None)
    hint, payload, signature = _open_bundle(data)
    if public is None:
        _check_statement(payload, hashes)
        return Signer(None, hint, hashlib.sha256(data).hexdigest())
    if hint != key_hint(public):
        raise _invalid("made with another key than the one given")
    check_bytes(public, PAYLOAD_TYPE, payload, signature, SIGNATURE_NAME)
    _check_statement(payload, hashes)
    return Signer(fingerprint_of(public), hint, hashlib.sha256(data).hexdigest())


def _read(folder: Path) -> bytes | None:
    """The bundle, from one opening that waits for no pipe; None where there is none."""
    try:
        with open_below(folder, SIGNATURE_NAME) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_BYTES:
                raise _invalid(f"larger than any bundle, {size} bytes")
            return stream.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        msg = f"{folder / SIGNATURE_NAME}: cannot be read: {error.strerror}"
        raise CannotCheck(msg) from error


def _open_bundle(data: bytes) -> tuple[str, bytes, bytes]:
    """The key's hint, the payload and the signature over it; nothing of it is trusted yet."""
    bundle = parse_canonical(data, SIGNATURE_NAME)
    if not has_fields(bundle, "dsseEnvelope", "mediaType", "verificationMaterial"):
        raise _invalid("not a bundle of one envelope and one key")
    if bundle["mediaType"] != MEDIA_TYPE:
        raise _type("a bundle of another media type")
    material = bundle["verificationMaterial"]
    is_local = has_fields(material, "publicKey", "tlogEntries") and material["tlogEntries"] == []
    if not is_local or not has_fields(material["publicKey"], "hint"):
        raise _invalid("not made with a local key: certificates and logs are not ours to judge")
    hint = material["publicKey"]["hint"]
    if not _is_sha256(hint):
        raise _invalid("its hint of a key is no sha256")
    keyid, payload, signature = open_dsse(bundle["dsseEnvelope"], PAYLOAD_TYPE, SIGNATURE_NAME)
    if keyid:
        raise _invalid("names its key in two places")
    return hint, payload, signature


def _check_statement(payload: bytes, hashes: Mapping[str, str]) -> None:
    """The statement says: these files, all of them, by their sha256; nothing was ignored."""
    statement = parse_canonical(payload, SIGNATURE_NAME)
    if not has_fields(statement, "_type", "predicate", "predicateType", "subject"):
        raise _type("not a statement of a subject and a predicate")
    if statement["_type"] != STATEMENT_TYPE:
        raise _type("a statement of another type")
    if statement["predicateType"] != PREDICATE_TYPE:
        raise _type("a predicate of another type")
    predicate = statement["predicate"]
    if not has_fields(predicate, "resources", "serialization"):
        raise _type("a predicate of other fields than resources and serialization")
    _check_serialization(predicate["serialization"])
    listed = _resources(predicate["resources"])
    _check_subject(statement["subject"], listed)
    _check_files(listed, hashes)


def _check_serialization(found: Any) -> None:
    if isinstance(found, dict) and "ignore_paths" in found:
        raise _scope("signed with a list of files to ignore")
    if found != _SERIALIZATION or found["allow_symlinks"] is not False:  # 0 equals False
        raise _type("files were hashed in another way than whole, by sha256, without links")


def _resources(found: Any) -> dict[str, str]:
    if not isinstance(found, list) or not found:
        raise _scope("names no file")
    listed: dict[str, str] = {}
    for one in found:
        is_entry = has_fields(one, "algorithm", "digest", "name") and one["algorithm"] == "sha256"
        if not is_entry or not isinstance(one["name"], str) or not _is_sha256(one["digest"]):
            raise _type("lists something else than a file with its sha256")
        if one["name"] in listed:
            raise _scope("lists a file twice")
        listed[one["name"]] = one["digest"]
    if list(listed) != sorted(listed, key=lambda name: PurePosixPath(name).parts):
        raise _invalid("its files are not in order")
    return listed


def _check_subject(found: Any, listed: Mapping[str, str]) -> None:
    """The subject's name is that of the folder when it was signed; a release may be moved."""
    if not isinstance(found, list) or len(found) != 1:
        raise _scope("does not name exactly one subject")
    subject = found[0]
    if not has_fields(subject, "digest", "name") or not isinstance(subject["name"], str):
        raise _type("its subject is not a name with a digest")
    digests = b"".join(bytes.fromhex(digest) for digest in listed.values())
    if subject["digest"] != {"sha256": hashlib.sha256(digests).hexdigest()}:
        raise _invalid("its subject is not the digest of the files it lists")


def _check_files(listed: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Other bytes mean a signature from elsewhere; only if none differ is something left out."""
    present = {name: digest for name, digest in hashes.items() if name != SIGNATURE_NAME}
    for name, digest in listed.items():
        if present.get(name) != digest:
            fault = "has other bytes" if name in present else "is not there"
            raise _invalid(f"signed for other files: {name!r} {fault}")
    left_out = present.keys() - listed.keys()
    if left_out:
        raise _scope(f"leaves out {min(left_out)!r}")


def _is_sha256(value: Any) -> bool:
    is_text = isinstance(value, str) and len(value) == 64
    return is_text and all(letter in "0123456789abcdef" for letter in value)


def _invalid(why: str) -> Refused:
    return Refused("signature-invalid", SIGNATURE_NAME, why)


def _scope(why: str) -> Refused:
    return Refused("signature-scope", SIGNATURE_NAME, why)


def _type(why: str) -> Refused:
    return Refused("signature-type", SIGNATURE_NAME, why)
