"""`lakefs://REPO/COMMIT/PREFIX`: the pictures below a prefix in one commit of a lakeFS repository.

A commit id names the same bytes for ever, so its listing alone says what the source holds; branches
and tags move, and are refused. Sub-folders are labels, as in a folder. Nothing is asked of the
server before the first listing or read, and each process has its own connection.
"""

import errno
import hashlib
import re
import time
from collections.abc import Iterator
from typing import Any

from urllib3.exceptions import NewConnectionError, ProtocolError

from dinov3.data.sources.entries import Entry, ImageSource, StoredEntry, sort_lines, suffix_of
from dinov3.data.sources.folder import first_folder
from dinov3.data.sources.paths import IMAGE_SUFFIXES, MAX_FILE_SIZE, decode_path, encode_path
from dinov3.errors import DataError, LineageBroken, StoreError
from dinov3.lake import Lake, parse_address

_LOST = (NewConnectionError, ProtocolError)  # the server is away, or went while it answered
_MD5 = re.compile(r"[0-9a-f]{32}")  # what came in parts through S3 has another kind of checksum
_PAUSES = (0.5, 1.0, 2.0)  # seconds before a read is tried again: a server restarts in less


class LakefsSource(ImageSource):
    """Pictures in lakeFS; `kind` is the whole address, so that tables and records hold the commit.

    Every method raises `StoreError` where the server is away, silent or refuses: a picture that
    could not be fetched is never taken for one that cannot be read.
    """

    is_pinned = True

    def __init__(self, spec: str) -> None:
        """Takes `lakefs://REPO/COMMIT[/PREFIX]`.

        Raises:
            DataError: It is no such address, or names a branch or a tag.
        """
        super().__init__()
        try:
            place = parse_address(spec)
        except StoreError as error:
            msg = f"source: not of the form lakefs://REPO/COMMIT/PREFIX, got {spec!r}. Write it so."
            raise DataError(msg) from error
        folder = place.path.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        self.kind = f"lakefs://{place.repo}/{place.ref}/{self._prefix}"
        if not place.is_pinned:
            branch = f"{place.repo}/{place.ref}/{folder}".rstrip("/")
            msg = (
                f"source: names a branch or a tag, and those move, got {spec}. "
                f"Pin its commit: python -m dinov3 lake pin {branch}."
            )
            raise DataError(msg)
        self._repo, self._commit = place.repo, place.ref
        self._lake: Lake | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lake": None}  # keys stay out of what is sent to workers

    def entries(self) -> Iterator[Entry]:
        """All pictures below the prefix; see `ImageSource.entries`."""
        self.ignored.clear()
        for line in sort_lines(self._lines()):
            path, size, checksum = line.split("\0")
            label = first_folder(path)
            if int(size) > MAX_FILE_SIZE:
                refused = f"file too large: {size} bytes, the limit is {MAX_FILE_SIZE}"
                yield Entry(path, label, refused=refused)
            else:
                address = f"lakefs:{checksum}:{size}"
                yield StoredEntry(path, label, address=address, size=int(size))

    def read(self, path: str) -> bytes:
        """The bytes of one picture, of the length and checksum that the commit holds."""
        for pause in _PAUSES:
            try:
                return self._read(path)
            except StoreError as error:
                if not isinstance(error.__cause__, _LOST):
                    raise
            time.sleep(pause)
        return self._read(path)

    def file_of(self, path: str) -> str:
        """The whole address: it changes with the commit."""
        return f"{self.kind}{path}"

    def _read(self, path: str) -> bytes:
        lake, name = self._connect(), f"{self._prefix}{decode_path(path)}"
        found = lake.stat(self._repo, self._commit, name)
        if found is None:
            raise OSError(errno.ENOENT, "no such object in the commit")
        if found.size > MAX_FILE_SIZE:
            raise OSError(errno.EFBIG, f"{found.size} bytes, the limit is {MAX_FILE_SIZE}")
        with lake.open(self._repo, self._commit, name) as stream:
            data = stream.read()
        checksum = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if _MD5.fullmatch(found.checksum) and checksum != found.checksum:
            msg = (
                f"{self.file_of(path)}: its bytes are not those that were committed, got md5 "
                f"{checksum} instead of {found.checksum}. Restore the server's storage."
            )
            raise LineageBroken(msg)
        return data

    def _lines(self) -> Iterator[str]:
        """Lines "path NUL size NUL checksum" of everything that may be a picture."""
        for found in self._connect().list(self._repo, self._commit, self._prefix):
            name = found.path.removeprefix(self._prefix)
            if name.endswith("/") or not name:
                self.ignore("folder marker")
            elif "/." in f"/{name}":
                self.ignore("hidden")
            elif (suffix := suffix_of(name)) not in IMAGE_SUFFIXES:
                self.ignore(suffix or "no suffix")
            else:
                yield f"{encode_path(name)}\0{found.size}\0{found.checksum}"

    def _connect(self) -> Lake:
        """A connection of this process, made at first use."""
        if self._lake is None:
            lake = Lake.connect()
            found = lake.resolve(self._repo, self._commit)
            if found != self._commit:
                msg = (
                    f"source: a branch or tag is named like a commit, got {self.kind}, which "
                    f"stands for {found}. Write that commit."
                )
                raise DataError(msg)
            self._lake = lake
        return self._lake
