r"""Names of images as printable text, and reads that can neither hang nor swallow the memory.

A name is bytes to the file system. In tables it is text: what is not UTF-8, control characters and
marks that turn the writing direction appear as `\xNN`, a backslash as `\\`; nothing else changes.
"""

import errno
import os
import re
import stat
from pathlib import Path

MAX_FILE_SIZE = 256 * 2**20  # bytes; a larger image file is listed, never loaded

IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".sgi", ".tga", ".tif",
    ".tiff", ".webp",
})  # fmt: skip

_ESCAPED = re.compile(
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_ESCAPE = re.compile(rb"\\(\\|x[0-9a-f]{2})")

_REASON_OF_ERRNO = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "symlink loop",
    errno.ENXIO: "not a regular file",
    errno.EINVAL: "not a regular file",
    errno.EFBIG: "file too large",
    errno.ENAMETOOLONG: "name too long",
}


def encode_path(name: str | bytes) -> str:
    """The printable form of a file name; equal forms mean equal bytes."""
    text = os.fsencode(name).decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(_escape, text)


def decode_path(text: str) -> str:
    """The file name behind a printable form, as the `os` functions take it."""
    plain = _ESCAPE.sub(_unescape, text.encode("utf-8"))
    return os.fsdecode(plain)


def reason_of(error: OSError) -> tuple[str, str]:
    """Why a read failed, as (reason from a fixed vocabulary, detail without any path)."""
    reason = _REASON_OF_ERRNO.get(error.errno or 0, "cannot be read")
    return reason, error.strerror or type(error).__name__


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; never waits for a pipe and never opens a device for long.

    Raises:
        OSError: Missing, not permitted, not a regular file (EINVAL) or too large (EFBIG).
    """
    if "\0" in os.fspath(path):
        raise OSError(errno.ENOENT, "a name cannot hold a zero byte")
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - opening a device may have effects
        raise OSError(errno.EINVAL, "neither a file nor a link to one")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor, not a path
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # exchanged since
            raise OSError(errno.EINVAL, "neither a file nor a link to one")
        if found.st_size > MAX_FILE_SIZE:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, the limit is {MAX_FILE_SIZE}")
        return stream.read(found.st_size)  # not more: it may be growing


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if character == "\\":
        return "\\\\"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def _unescape(match: re.Match[bytes]) -> bytes:
    escape = match.group(1)
    return escape if escape == b"\\" else bytes([int(escape[1:], 16)])
