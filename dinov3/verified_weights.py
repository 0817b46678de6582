"""Weights of a release, taken from the very bytes that were verified.

The release is verified first; then each file is read once into memory, and used only if that copy
has the digest the verification found. What changes on the disk in between changes nothing here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dinov3.errors import CheckpointError, LineageBroken
from dinov3.release.audit import Question
from dinov3.release.contents import CONFIG_NAME
from dinov3.release.opening import open_below
from dinov3.release.record import RecordError, parse_object
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.verify import verify_release


@dataclass(frozen=True)
class VerifiedRelease:
    """A release that held when it was verified; what is read of it is what was verified."""

    folder: Path
    digest: str  # of the release
    hashes: Mapping[str, str]  # name -> sha256

    def config(self) -> dict[str, Any]:
        """Content of config.json.

        Raises:
            LineageBroken: The file changed after it was verified.
            CheckpointError: It is no JSON object.
        """
        try:
            return parse_object(self._read(CONFIG_NAME))
        except RecordError as error:
            msg = f"{self.folder / CONFIG_NAME}: {error}. Fetch the release anew."
            raise CheckpointError(msg) from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of weights; none where the release has no such file.

        Raises:
            LineageBroken: The file changed after it was verified.
        """
        return safetensors.torch.load(self._read(name)) if name in self.hashes else {}

    def _read(self, name: str) -> bytes:
        try:
            with open_below(self.folder, name) as stream:
                data = stream.readall()
            why = "other bytes"
        except (Refused, OSError) as error:
            data, why = b"", str(error)
        if hashlib.sha256(data).hexdigest() != self.hashes[name]:
            msg = f"{self.folder / name}: changed after it was verified, got {why}. "
            raise LineageBroken(f"{msg}Fetch the release anew.")
        return data


def open_verified(folder: Path, key: Path | None, expect: str | None = None) -> VerifiedRelease:
    """Verifies a release, so that its weights may be used.

    Args:
        folder: The release.
        key: Public key of its publisher, got from elsewhere; None leaves open who signed it.
        expect: `MODEL@VERSION` it must be.

    Raises:
        LineageBroken: The release is refused.
        CheckpointError: It cannot be checked, with a key not to the end, or the key lies in it.
    """
    if key is not None and key.resolve().is_relative_to(folder.resolve()):
        msg = f"key: lies in the release itself, got {key}. Give one that you got elsewhere."
        raise CheckpointError(msg)
    try:
        pem = None if key is None else key.read_bytes()
        audit = verify_release(folder, Question(key=pem, expect=expect))
    except Refused as error:
        msg = f"{folder}: refused, {error.name}: {error}. Do not use it."
        raise LineageBroken(msg) from error
    except (CannotCheck, OSError) as error:
        msg = f"{folder}: cannot be verified, got {error}. Give a readable release and key."
        raise CheckpointError(msg) from error
    if key is not None and audit.not_checked:
        left = "; ".join(audit.not_checked)
        msg = f"{folder}: not verified to the end, got {left}. Fetch it whole."
        raise CheckpointError(msg)
    return VerifiedRelease(folder, str(audit.digest), dict(audit.hashes))
