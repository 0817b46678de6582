"""Weights of a release, taken from the very bytes that were verified.

The release is verified first; then each file is read once into memory, and used only if that copy
has the digest the verification found. What changes on the disk in between changes nothing here.
"""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dinov3.errors import CheckpointError, LineageBroken
from dinov3.release.audit import Audit, Question
from dinov3.release.opening import open_below
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.verify import verify_release


def read_verified(
    folder: Path, key: Path, expect: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a release's backbone.

    Args:
        folder: The release.
        key: Public key of its publisher, got from elsewhere.
        expect: `MODEL@VERSION` it must be.

    Raises:
        LineageBroken: The release is refused, or a file changed after it was verified.
        CheckpointError: It cannot be checked to the end, or the key lies in the release.
    """
    audit = _verify(folder, key, expect)
    try:
        config = parse_json(_checked_bytes(folder, "config.json", audit))
    except RecordError as error:
        msg = f"{folder / 'config.json'}: {error}. Fetch the release anew."
        raise CheckpointError(msg) from error
    return config, safetensors.torch.load(_checked_bytes(folder, "model.safetensors", audit))


def _verify(folder: Path, key: Path, expect: str | None) -> Audit:
    if key.resolve().is_relative_to(folder.resolve()):
        msg = f"key: lies in the release itself, got {key}. Give one that you got elsewhere."
        raise CheckpointError(msg)
    try:
        audit = verify_release(folder, Question(key=key.read_bytes(), expect=expect))
    except Refused as error:
        msg = f"{folder}: refused, {error.name}: {error}. Do not use it."
        raise LineageBroken(msg) from error
    except (CannotCheck, OSError) as error:
        msg = f"{folder}: cannot be verified, got {error}. Give a readable release and key."
        raise CheckpointError(msg) from error
    if audit.not_checked:
        left = "; ".join(audit.not_checked)
        msg = f"{folder}: not verified to the end, got {left}. Fetch it whole."
        raise CheckpointError(msg)
    return audit


def _checked_bytes(folder: Path, name: str, audit: Audit) -> bytes:
    with open_below(folder, name) as stream:
        data = stream.readall()
    if hashlib.sha256(data).hexdigest() != audit.hashes[name]:
        msg = f"{folder / name}: changed after it was verified. Fetch the release anew."
        raise LineageBroken(msg)
    return data
