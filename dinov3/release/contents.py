"""The files of a release after they were hashed: read again only as the bytes that were hashed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.release.files import read_file
from dinov3.release.record import RecordError, canonical_json, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.tensors import FileHash

RELEASE_NAME = "release.json"
MODEL_NAME = "model.safetensors"
HEADS_NAME = "heads.safetensors"
CONFIG_NAME = "config.json"
EVALS_NAME = "evals.json"
CHECKS_NAME = "checks.json"
PROVENANCE_NAME = "provenance.intoto.json"
BOM_NAME = "mlbom.cdx.json"
CARD_NAME = "README.md"
_MAX_BYTES = 16 << 20  # of a file that is parsed: values take many times their bytes
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
REQUIRED = (
    RELEASE_NAME,
    MODEL_NAME,
    CONFIG_NAME,
    EVALS_NAME,
    CHECKS_NAME,
    PROVENANCE_NAME,
    BOM_NAME,
    CARD_NAME,
)


@dataclass(frozen=True)
class Contents:
    """A release directory and the identity of each of its files."""

    folder: Path
    hashes: Mapping[str, FileHash]

    def read(self, name: str) -> bytes:
        """The bytes of a small file, which are those that were hashed.

        Raises:
            Refused: `file-missing`, or `file-changed` since.
        """
        known = self.hashes.get(name)
        if known is None:
            raise Refused("file-missing", name, "a release needs it")
        return read_file(self.folder, name, limit=_MAX_BYTES, sha256=known.sha256)

    def read_object(self, name: str, *, canonical: bool = True) -> dict[str, Any]:
        """A JSON object.

        Raises:
            Refused: `json-malformed`, or as `read`.
        """
        data = self.read(name)
        try:
            value = parse_json(data)
            is_canonical = not canonical or canonical_json(value) == data
        except RecordError as error:
            raise Refused("json-malformed", name, str(error)) from error
        if not isinstance(value, dict) or not is_canonical:
            raise Refused("json-malformed", name, "not an object in canonical JSON")
        return value


def check_schema(found: Any, known: str, where: str) -> None:
    """Lets the known schema through; a newer one cannot be judged, any other is refused.

    Args:
        found: What the file says.
        known: Such as `dinov3.release/1`.
        where: The file.

    Raises:
        CannotCheck: It is newer.
        Refused: `schema-unknown`.
    """
    if found == known:
        return
    kind, _, number = known.rpartition("/")
    other, _, newer = found.rpartition("/") if isinstance(found, str) else ("", "", "")
    if other == kind and _NUMBER.fullmatch(newer) and int(newer) > int(number):
        msg = f"{where}: its schema is newer than {known}. Verify it with a newer dinov3."
        raise CannotCheck(msg)
    raise Refused("schema-unknown", where, f"its schema is not {known}")
