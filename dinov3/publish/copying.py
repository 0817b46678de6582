"""Releases on their way into a store and out of it: hashed, in chunks, whole or not at all."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from dinov3.errors import LineageBroken, StoreError
from dinov3.publish.entry import Entry, OnBytes, Release, check_name, ignore
from dinov3.release.files import check_sums, read_file, release_digest
from dinov3.release.opening import open_below
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible

CHUNK = 1 << 20  # bytes held in memory while a file is copied
_MAX_HEAD = 1 << 20  # bytes of release.json


def read_release(folder: Path) -> Release:
    """Hashes every file of a release directory and reads its name; memory stays flat.

    Raises:
        Refused: A file is changed, absent, unlisted or special, or release.json is malformed.
        StoreError: Its model or version is malformed.
    """
    try:
        hashes = check_sums(folder)
        head = _head(folder)
    except CannotCheck as error:
        why = visible(str(error))
        msg = f"{folder}: cannot be read as a release: {why}. Name a release directory."
        raise StoreError(msg) from error
    model, version = head.get("model"), head.get("version")
    if not isinstance(model, str) or not isinstance(version, str):
        raise Refused("json-malformed", "release.json", "names no model or no version")
    check_name(model, version)
    return Release(
        model,
        version,
        release_digest(hashes),
        {path: found.sha256 for path, found in hashes.items()},
    )


def check_fetched(folder: Path, entry: Entry) -> Release:
    """Refuses a fetched folder that is not the release its entry names.

    Raises:
        LineageBroken: Bytes, names or the digest differ.
    """
    try:
        found = read_release(folder)
    except (Refused, StoreError) as error:
        why = visible(str(error))
        msg = f"{entry.name}: the store's copy is damaged: {why}. Restore the store."
        raise LineageBroken(msg) from error
    if (found.model, found.version, found.digest) != (entry.model, entry.version, entry.digest):
        msg = (
            f"{entry.name}: the store holds another release, got {found.model}@{found.version} "
            f"{found.digest}, its entry says {entry.digest}. Restore the store."
        )
        raise LineageBroken(msg)
    return found


def _head(folder: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_file(folder, "release.json", limit=_MAX_HEAD))
    except RecordError as error:
        raise Refused("json-malformed", "release.json", str(error)) from error
    if not isinstance(found, dict):
        raise Refused("json-malformed", "release.json", "not an object")
    return found


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """The name of a hidden folder to make; it becomes the target once the block has ended well.

    Raises:
        StoreError: The target is there already, or cannot be written.
    """
    if os.path.lexists(target) and not _is_empty(target):
        msg = f"{target}: already there. Name a folder that is not."
        raise StoreError(msg)
    hidden = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        _remove_left(target)
        shutil.rmtree(hidden, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        sync_tree(hidden)
        hidden.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        msg = f"{target}: cannot be written: {error}. Free the disk or name another folder."
        raise StoreError(msg) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    """Whether it is a folder that may be replaced: no link, nor the one we stand in."""
    try:
        return bool(folder.name) and not folder.is_symlink() and not any(folder.iterdir())
    except OSError:
        return False


def _remove_left(target: Path) -> None:
    """Removes what fetches to this target left that were killed, never what a live one uses."""
    left = re.compile(rf"\.+{re.escape(target.name)}\.partial-(\d+)(\.partial-\1)?")
    for path in target.parent.glob(".*"):
        named = left.fullmatch(path.name)
        if named and not _is_alive(int(named[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; of no process
        pass
    return True


def copy_stream(source: BinaryIO | FileIO, target: BinaryIO, on_bytes: OnBytes = ignore) -> str:
    """Copies in chunks; returns the sha256 of what passed."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        target.write(chunk)
        digest.update(chunk)
        on_bytes(len(chunk))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes the names in a folder and below it durable."""
    for place, _, _ in os.walk(folder):
        sync_folder(Path(place))


def copy_release(folder: Path, release: Release, content: Path, on_bytes: OnBytes) -> None:
    """Copies every file and makes files and folders durable.

    Copies, never hard links: what is edited in place later must stay the user's alone.

    Raises:
        StoreError: The release is changing.
    """
    for name, digest in release.hashes.items():
        with open_published(folder, name) as source:
            found = write_file(source, content / name, on_bytes)
        if found != digest:
            msg = f"{folder / name}: changed while it was published. Run it again."
            raise StoreError(msg)
    sync_tree(content)
    sync_folder(content.parent)


def open_published(folder: Path, name: str) -> FileIO:
    """A file of a release that was hashed a moment ago.

    Raises:
        StoreError: It is gone, or no regular file any more.
    """
    try:
        return open_below(folder, name)
    except (OSError, Refused) as error:
        why = visible(str(error))
        msg = f"{folder}: changed while it was published: {why}. Run it again."
        raise StoreError(msg) from error


def write_file(source: BinaryIO | FileIO, target: Path, on_bytes: OnBytes) -> str:
    """Writes a stream to a new, durable file; returns the sha256 of what passed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as writer:
        digest = copy_stream(source, writer, on_bytes)
        writer.flush()
        os.fsync(writer.fileno())
        if hasattr(os, "posix_fadvise"):  # read back from the disk, not from memory
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest


def check_back(folder: Path, release: Release) -> None:
    """Reads a copy again from the disk.

    Raises:
        StoreError: It is not the release that was copied.
    """
    try:
        found = read_release(folder)
    except Refused as error:
        why = visible(str(error))
        msg = f"{folder}: read back with other bytes: {why}. Run dinov3 releases prune, then again."
        raise StoreError(msg) from error
    if found != release:
        msg = f"{folder}: read back as another release, got {found.digest}. Check the disk."
        raise StoreError(msg)


def link_new(path: Path, data: bytes, beside: Path) -> None:
    """Makes a file appear whole under a name that must be free.

    Raises:
        FileExistsError: The name is taken.
    """
    draft = beside / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with draft.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)
