"""`folder:PATH`: every file below a folder with the suffix of an image; sub-folders are labels.

Links to files are followed. A link to a folder is followed once, and only where the walk does not
come by anyway; a loop is listed. Pipes, sockets and devices are listed and never opened. Names that
begin with a dot and files with other suffixes are passed over and counted.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dinov3.data.sources.entries import Entry, ImageSource, sort_lines, suffix_of
from dinov3.data.sources.paths import (
    IMAGE_SUFFIXES,
    decode_path,
    encode_path,
    read_regular,
    reason_of,
)
from dinov3.errors import DataError

_FOLDER, _LINKED_FOLDER, _FILE, _LINKED_FILE, _SPECIAL, _DANGLING = "dDfFsx"
_SPECIAL_NAMES = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class FolderSource(ImageSource):
    """Images in a tree of folders; the label of an image is the first sub-folder on its way."""

    kind = "folder"

    def __init__(self, root: Path) -> None:
        super().__init__()
        if not root.is_dir():
            msg = f"source: no such folder, got {self.kind}:{root}. Give the path of a folder."
            raise DataError(msg)
        self.root = root.absolute()
        self._real_root = os.path.realpath(root)

    def entries(self) -> Iterator[Entry]:
        """All images below the folder; see `ImageSource.entries`."""
        self.ignored.clear()
        visited: set[tuple[int, int]] = set()  # folders reached through links out of the tree
        pending = [self._list("")]
        while pending:
            line = next(pending[-1], None)
            if line is None:
                pending.pop()
                continue
            path, _, kind = line.partition("\0")
            if kind in (_FOLDER, _LINKED_FOLDER):
                refused = self._refuse_folder(path, kind, visited)
                if refused is None:
                    pending.append(self._list(path))
                else:
                    yield Entry(path, refused=refused)
            elif (entry := self._judge(path, kind)) is not None:
                yield entry

    def read(self, path: str) -> bytes:
        """The bytes of one image file."""
        return read_regular(self.file_of(path))

    def file_of(self, path: str) -> str:
        """Where the image lies."""
        return f"{self.root}/{decode_path(path)}"

    def _list(self, folder: str) -> Iterator[str]:
        """Lines "path NUL kind" of one folder, sorted; folders' paths end in a slash.

        With the slash, siblings sort as the full paths of everything below them do.
        """
        return sort_lines(self._scan(folder))

    def _scan(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self.file_of(folder)) as found:
                for item in found:
                    if item.name.startswith("."):
                        self.ignore("hidden")
                    else:
                        kind = _kind_of(item)
                        slash = "/" if kind in (_FOLDER, _LINKED_FOLDER) else ""
                        yield f"{folder}{encode_path(item.name)}{slash}\0{kind}"
        except OSError as error:
            reason, detail = reason_of(error)
            if not folder:
                msg = f"source: cannot be listed: {detail}, got {self.kind}:{self.root}. Allow it."
                raise DataError(msg) from error
            yield f"{folder}\0{reason}: folder: {detail}"

    def _judge(self, path: str, kind: str) -> Entry | None:
        if len(kind) > 1:  # a folder that could not be listed
            return Entry(path, refused=kind)
        if kind in (_SPECIAL, _DANGLING):
            return Entry(path, refused=self._why_special(path))
        return self._entry(path)

    def _entry(self, path: str) -> Entry | None:
        """The entry of a regular file, or None for one that is passed over."""
        suffix = suffix_of(path)
        if suffix not in IMAGE_SUFFIXES:
            self.ignore(suffix or "no suffix")
            return None
        return Entry(path, label=first_folder(path))

    def _why_special(self, path: str) -> str:
        """Why something that is neither file nor folder, after following links, is no image."""
        try:
            mode = os.stat(self.file_of(path)).st_mode  # noqa: PTH116 - a plain string
        except OSError as error:
            reason, detail = reason_of(error)
            return f"{reason}: link: {detail}"
        return f"not a regular file: {_SPECIAL_NAMES.get(stat.S_IFMT(mode), 'changed meanwhile')}"

    def _refuse_folder(self, path: str, kind: str, visited: set[tuple[int, int]]) -> str | None:
        """Why a folder is not entered, or None."""
        if kind == _FOLDER and not visited:
            return None
        place = self.file_of(path).removesuffix("/")
        real = os.path.realpath(place)
        if kind == _LINKED_FOLDER:
            parent = os.path.realpath(os.path.dirname(place))  # noqa: PTH120 - a plain string
            if f"{parent}/".startswith(f"{real.rstrip('/')}/"):
                return "symlink loop: link to a folder above it"
            if self._is_walked(real):
                return "symlink to a folder of this source: its images are listed there"
        try:
            found = os.stat(place)  # noqa: PTH116
        except OSError as error:
            return f"{reason_of(error)[0]}: folder"
        key = (found.st_dev, found.st_ino)
        if key in visited:
            return "symlink loop: folder reached before through another link"
        if not self._is_walked(real):
            visited.add(key)
        return None

    def _is_walked(self, real: str) -> bool:
        """Whether the walk comes to this folder without any link."""
        if real == self._real_root:
            return True
        below = real.startswith(self._real_root.rstrip("/") + "/")
        return below and "/." not in real[len(self._real_root.rstrip("/")) :]


def first_folder(path: str) -> str | None:
    """The first folder of a relative path; None at the top level."""
    folder, slash, _ = path.partition("/")
    return folder if slash else None


def _kind_of(item: "os.DirEntry[str]") -> str:
    try:
        linked = item.is_symlink()
        if item.is_dir():
            return _LINKED_FOLDER if linked else _FOLDER
        if item.is_file():
            return _LINKED_FILE if linked else _FILE
    except OSError:
        return _DANGLING
    return _DANGLING if linked else _SPECIAL
