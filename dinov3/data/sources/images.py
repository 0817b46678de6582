"""The images of a table, read back from their source and checked against the table."""

import hashlib

from dinov3.data.sources.entries import ImageSource
from dinov3.data.sources.paths import reason_of
from dinov3.errors import LineageBroken


class SourceImages:
    """Images by row number; the first read of each is compared with its sha256."""

    def __init__(self, source: ImageSource, paths: list[str], sha256: list[str]) -> None:
        self.source = source
        self.paths = paths
        self.sha256 = sha256
        self._checked = bytearray(len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The bytes of one image.

        Raises:
            LineageBroken: The file is gone, or its bytes are not those of the table.
        """
        name = self.paths[index]
        try:
            data = self.source.read(name)
        except OSError as error:
            reason, detail = reason_of(error)
            msg = (
                f"{name}: can no longer be read from the source, got {reason} ({detail}). "
                f"Restore it, or make image_manifest anew."
            )
            raise LineageBroken(msg) from error
        if not self._checked[index]:
            found = hashlib.sha256(data).hexdigest()
            if found != self.sha256[index]:
                msg = (
                    f"{name}: its bytes differ from the image table, got sha256 {found} instead of "
                    f"{self.sha256[index]}. Restore it, or make image_manifest anew."
                )
                raise LineageBroken(msg)
            self._checked[index] = 1
        return data

    def name(self, index: int) -> str:
        """The path of one image inside its source."""
        return self.paths[index]
