"""Signing a release with the model-signing library, offline, by a local key.

Every file is signed, nothing is ignored, and `model.sig` itself stands apart. What the library
writes is brought into one form: canonical JSON, inside and out, and the signature that needs no
chance, so that the same files signed again by the same key give the same bytes.
"""

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError
from dinov3.publish.private_key import PrivateKey
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, parse_json
from dinov3.release.signature import PAYLOAD_TYPE, SIGNATURE_NAME, Signer, verify_signature


def sign_release(folder: Path, key: PrivateKey) -> Signer:
    """Writes `model.sig` over every file of a folder; both verifiers have accepted it.

    Args:
        folder: The finished release. Its name is part of what is signed and is never checked.
        key: Signs it; an encrypted key is never written in the clear.

    Raises:
        DinoError: The folder holds a signature already, a link or a special file.
        Refused: What was just signed does not verify: the folder changed meanwhile.
    """
    target = folder / SIGNATURE_NAME
    if target.exists() or target.is_symlink():
        msg = f"{target}: already there. Build the release anew, or remove it."
        raise DinoError(msg)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / SIGNATURE_NAME
        _sign(folder, written, key)
        bundle = parse_json(written.read_bytes())
        payload = _in_our_form(bundle, key)
        data = canonical_json(bundle)
        written.write_bytes(data)
        check_with_library(folder, written, key.public)
    atomic_write(target, data)
    listed = parse_json(payload)["predicate"]["resources"]
    return verify_signature(folder, {one["name"]: one["digest"] for one in listed}, key.public)


def check_with_library(folder: Path, signature: Path, public: bytes) -> None:
    """Lets the library's own verifier hash the folder and check a signature over it.

    Args:
        folder: The release.
        signature: The bundle; when it lies in the folder, it is the one file not hashed.
        public: The key in PEM.

    Raises:
        DinoError: It refuses.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    with tempfile.TemporaryDirectory() as scratch:
        pem = Path(scratch) / "key.pub"
        pem.write_bytes(public)
        config = verifying.Config().use_elliptic_key_verifier(public_key=pem)
        config.set_hashing_config(
            _hashing(ignored=[signature] if signature.is_relative_to(folder) else [])
        )
        try:
            config.verify(folder, signature)
        except (ValueError, InvalidSignature) as error:
            msg = f"{folder}: model-signing refuses the signature: {error}. Sign it again."
            raise DinoError(msg) from error


def _sign(folder: Path, target: Path, key: PrivateKey) -> None:
    from model_signing import signing

    config = signing.Config().set_hashing_config(_hashing(ignored=[]))
    secret: Any = key.passphrase  # announced as text, which the library then cannot use
    config.use_elliptic_key_signer(private_key=key.path, password=secret)
    try:
        config.sign(folder, target)
    except ValueError as error:
        msg = f"{folder}: cannot be signed: {error}. Keep plain files only."
        raise DinoError(msg) from error


def _hashing(ignored: list[Path]) -> Any:
    """Each file whole by sha256, `.git*` included, in as many threads as this machine has cores."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(max_workers=os.cpu_count())
    return config.set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _in_our_form(bundle: dict[str, Any], key: PrivateKey) -> bytes:
    """Makes the statement canonical and signs it anew; returns the statement.

    The library writes fields in an order that changes from run to run, and signs by chance.
    """
    envelope = bundle["dsseEnvelope"]
    payload = canonical_json(parse_json(base64.b64decode(envelope["payload"])))
    signature = key.sign(PAYLOAD_TYPE, payload)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    return payload
