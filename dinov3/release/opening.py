"""Opens regular files only, never through a link and never waiting for a pipe.

What is checked must be what is read, so each function answers with an open descriptor.
"""

import errno
import os
import stat
from io import FileIO
from pathlib import Path

from dinov3.release.refusals import Refused

# Without O_NONBLOCK the mere opening of a pipe waits for its writer.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_regular(
    path: Path | str, *, dir_fd: int | None = None, shown: str | None = None
) -> FileIO:
    """An unbuffered stream of the bytes of a regular file.

    Args:
        path: The file; its last part must not be a link, those above it may be.
        dir_fd: Descriptor of the folder that a relative path starts from.
        shown: The name a refusal speaks of; by default the path.

    Raises:
        Refused: `file-special`, it is a link, a folder, a pipe or a device.
        OSError: It is not there or cannot be read.
    """
    where = str(path) if shown is None else shown
    try:
        descriptor = os.open(path, _FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket, or a device without one
            raise Refused(
                "file-special", where, "a link or a device, not a regular file"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("file-special", where, "not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def open_below(folder: Path, name: str) -> FileIO:
    """An unbuffered stream of a file below a folder, no link on the way from there.

    Raises:
        Refused: `file-special`, a link or no regular file; `name-unsafe`, the name may leave.
        OSError: It is not there or cannot be read.
    """
    *parents, last = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in (*parents, last)):
        raise Refused("name-unsafe", name, "the path leaves its folder")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            below = _open_folder(parent, at, name)
            os.close(at)
            at = below
        return open_regular(last, dir_fd=at, shown=name)
    finally:
        os.close(at)


def _open_folder(part: str, dir_fd: int, shown: str) -> int:
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(part, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Refused("file-special", shown, "a link stands where a folder should") from error
        raise
