"""The files of a release: what may stand there, their list `SHA256SUMS`, and the release digest.

A release comes from anywhere. Its names are judged before anything is opened, only regular files
are read, none through a link, and each file once.
"""

import hashlib
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov3.release.opening import open_below
from dinov3.release.record import RecordError, digest_of
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.tensors import WEIGHTS_SUFFIX, FileHash, hash_stream

SUMS_NAME = "SHA256SUMS"
SIGNATURE_NAME = "model.sig"
UNLISTED = frozenset({SUMS_NAME, SIGNATURE_NAME})  # a list cannot name itself, nor what signs it

_MAX_FILES = 10_000  # and folders
_MAX_PATH = 512  # bytes
_MAX_SUMS = 8 << 20  # bytes of SHA256SUMS
_MAX_DOCUMENT = 16 << 20  # bytes of a file that is parsed whole
_MAX_DOCUMENTS = 64 << 20  # bytes of all of them
_MAX_LOGS = 2 << 30  # bytes of all logs, which are read line by line
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_FORBIDDEN = frozenset('\\:*?"<>|')  # a path, a stream or a pattern to some system
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def list_files(folder: Path) -> dict[str, int]:
    """Size of every file below a folder by its relative path, sorted by the path's UTF-8 bytes.

    Raises:
        Refused: `file-special`, a link, hard link, pipe, socket or device; `name-unsafe`, a name
            that some system reads otherwise or two that differ by case or Unicode form alone;
            `file-unlisted`, a folder without files, or files without end.
        CannotCheck: The folder is not there, or cannot be read.
    """
    found: dict[str, int] = {}
    folders: set[str] = set()
    try:
        for name, entry in _entries(folder):
            check_name(name)
            if len(found) + len(folders) >= _MAX_FILES:
                raise Refused("file-unlisted", name, f"more than {_MAX_FILES} files and folders")
            if entry is None:
                folders.add(name)
                continue
            found[name] = entry
    except OSError as error:
        msg = f"{folder}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    check_collisions([*found, *folders])
    _check_no_empty(folders, found)
    return {name: found[name] for name in sorted(found)}


def _entries(folder: Path) -> Iterator[tuple[str, int | None]]:
    """Relative path and size of each file, None of each folder; whatever else is refused."""
    pending = [""]
    while pending:
        above = pending.pop()
        with os.scandir(folder / above) as entries:
            some = itertools.islice(entries, _MAX_FILES + 1)  # more are refused by their number
            for entry in sorted(some, key=lambda entry: os.fsencode(entry.name)):
                name = f"{above}/{entry.name}" if above else entry.name
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    pending.append(name)
                    yield name, None
                    continue
                if not stat.S_ISREG(facts.st_mode):
                    raise Refused("file-special", name, "a link, pipe, socket or device")
                if facts.st_nlink > 1:
                    why = f"a hard link: the same file has {facts.st_nlink} names"
                    raise Refused("file-special", name, why)
                yield name, facts.st_size


def _check_no_empty(folders: Iterable[str], files: Iterable[str]) -> None:
    """A folder that holds nothing is in no list and under no signature."""
    full = {
        "/".join(name.split("/")[:depth]) for name in files for depth in range(name.count("/") + 1)
    }
    for name in sorted(set(folders) - full):
        raise Refused("file-unlisted", name, "a folder without files")


def check_name(name: str) -> None:
    """Lets a relative path through that means the same file on every system.

    Raises:
        Refused: `name-unsafe`.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise Refused("name-unsafe", ascii(name), "the name is not UTF-8") from error
    if size > _MAX_PATH:
        raise Refused("name-unsafe", name[:80], f"longer than {_MAX_PATH} bytes, got {size}")
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise Refused("name-unsafe", name, "the path leaves its folder or is not its own name")
        if part != part.strip() or part.endswith("."):
            raise Refused("name-unsafe", name, "a space at an end or a dot at the end of a name")
        if any(one in _FORBIDDEN or unicodedata.category(one) in _INVISIBLE for one in part):
            raise Refused("name-unsafe", name, "a character that is not shown or has a meaning")


def check_collisions(names: Iterable[str]) -> None:
    """Two names must differ by more than case or Unicode form.

    Raises:
        Refused: `name-unsafe`.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        # Twice: folding the case of a composed letter can leave a decomposed one.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        if folded in seen:
            why = f"differs from {seen[folded]} by case or Unicode form alone"
            raise Refused("name-unsafe", name, why)
        seen[folded] = name


def format_sums(hashes: Mapping[str, str]) -> bytes:
    """The bytes of `SHA256SUMS` for the sha256 of each file by its path."""
    listed = sorted((name, sha256) for name, sha256 in hashes.items() if name not in UNLISTED)
    return "".join(f"{sha256}  {name}\n" for name, sha256 in listed).encode()


def parse_sums(data: bytes) -> dict[str, str]:
    """The sha256 of each file by its path, from the only bytes that say it.

    Raises:
        Refused: `sums-malformed`, or `name-unsafe` of a path in it.
    """
    if data.count(b"\n") > _MAX_FILES:
        raise Refused("sums-malformed", SUMS_NAME, f"more than {_MAX_FILES} lines")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("sums-malformed", SUMS_NAME, "not UTF-8") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise Refused("sums-malformed", SUMS_NAME, f"line {number} is no digest and path")
        sha256, name = match.groups()
        check_name(name)
        listed[name] = sha256
    check_collisions(listed)
    if format_sums(listed) != data:
        why = "not sorted, a path twice, itself or the signature listed, or no newline at the end"
        raise Refused("sums-malformed", SUMS_NAME, why)
    return listed


def read_sums(folder: Path) -> dict[str, str]:
    """What `SHA256SUMS` of a release says.

    Raises:
        Refused: `file-missing`, `file-special`, `sums-malformed` or `name-unsafe`.
        CannotCheck: It cannot be read.
    """
    return parse_sums(read_file(folder, SUMS_NAME, limit=_MAX_SUMS))


def check_sums(folder: Path) -> dict[str, FileHash]:
    """Identity of every file of a release, which are those that `SHA256SUMS` lists, unchanged.

    Returns:
        All files by path, `SHA256SUMS` and the signature too.

    Raises:
        Refused: `file-missing`, `file-unlisted`, `file-changed`, `weights-malformed`, or what
            `list_files` and `read_sums` refuse.
        CannotCheck: Something cannot be read.
    """
    listing = match_sums(folder)
    return {name: check_file(folder, name, listing.sha256s.get(name)) for name in listing.sizes}


@dataclass(frozen=True)
class Listing:
    """What is there and what `SHA256SUMS` says of it, before any file but that one is read.

    Attributes:
        sizes: Bytes of every file.
        sha256s: What each must have; all but that of the signature.
    """

    sizes: Mapping[str, int]
    sha256s: Mapping[str, str]


def match_sums(folder: Path) -> Listing:
    """Holds the names that are there against `SHA256SUMS`, and sizes against what each file may be.

    Raises:
        Refused: `file-missing`, `file-unlisted`, `file-changed` of a file larger than any such
            file, or what `list_files` and `read_sums` refuse.
        CannotCheck: Something cannot be read.
    """
    present = list_files(folder)
    data = read_file(folder, SUMS_NAME, limit=_MAX_SUMS)
    listed = parse_sums(data)
    for name in listed:
        if name not in present:
            raise Refused("file-missing", name, f"{SUMS_NAME} lists it")
    for name, size in present.items():
        if name not in listed and name not in UNLISTED:
            raise Refused("file-unlisted", name, f"{SUMS_NAME} does not list it")
        limit = _most_bytes(name)
        if limit is not None and size > limit:
            raise Refused("file-changed", name, f"larger than {limit} bytes, got {size}")
    _check_total(present)
    return Listing(present, {**listed, SUMS_NAME: hashlib.sha256(data).hexdigest()})


def is_large(name: str) -> bool:
    """Whether a file may be of any size: weights, and the list of images."""
    return name.endswith((WEIGHTS_SUFFIX, ".bin"))


def _most_bytes(name: str) -> int | None:
    """A file that is parsed has its limit; how large the others are stands in the records."""
    if is_large(name) or name == SIGNATURE_NAME:  # whose own check has a limit
        return None
    return _MAX_LOGS if _is_log(name) else _MAX_DOCUMENT


def _check_total(sizes: Mapping[str, int]) -> None:
    """Many files of a size that each may have are too much together."""
    parsed = {name: size for name, size in sizes.items() if _most_bytes(name) is not None}
    logs = sum(size for name, size in parsed.items() if _is_log(name))
    documents = sum(parsed.values()) - logs
    if documents > _MAX_DOCUMENTS or logs > _MAX_LOGS:
        why = f"documents of {documents} bytes in all, logs of {logs}, which no release needs"
        raise Refused("file-changed", max(parsed, key=lambda name: parsed[name]), why)


def _is_log(name: str) -> bool:
    return name.endswith(".jsonl")


def check_file(folder: Path, name: str, sha256: str | None) -> FileHash:
    """Identity of one file below a folder; its bytes must be those of a digest, where given.

    Raises:
        Refused: `file-changed`, `file-missing`, `file-special` or `weights-malformed`.
        CannotCheck: It cannot be read.
    """
    try:
        with open_below(folder, name) as stream:
            try:
                found = hash_stream(stream, weights=name.endswith(WEIGHTS_SUFFIX))
            except RecordError as error:
                found = hash_stream(stream, weights=False)
                _check_digest(name, found.sha256, sha256)  # a changed byte tells more
                raise Refused("weights-malformed", name, str(error)) from error
    except FileNotFoundError as error:
        raise Refused("file-missing", name, "it is not there") from error
    except (OSError, RecordError) as error:
        msg = f"{name}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    _check_digest(name, found.sha256, sha256)
    return found


def read_file(folder: Path, name: str, *, limit: int, sha256: str | None = None) -> bytes:
    """The bytes of one small file below a folder, of a given digest where one is given.

    Raises:
        Refused: `file-missing`, `file-special`, or `file-changed`: larger than the limit, or of
            another digest.
        CannotCheck: It cannot be read.
    """
    try:
        with open_below(folder, name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise Refused("file-changed", name, f"larger than {limit} bytes, got {size}")
            data = stream.read(limit + 1)
    except FileNotFoundError as error:
        raise Refused("file-missing", name, "it is not there") from error
    except OSError as error:
        msg = f"{name}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    _check_digest(name, hashlib.sha256(data).hexdigest(), sha256)
    return data


def release_digest(hashes: Mapping[str, FileHash]) -> str:
    """The identity of a release: one digest over the paths and digests of all its files."""
    return digest_of(sorted([name, found.sha256] for name, found in hashes.items()))


def _check_digest(name: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        why = f"changed: its sha256 is {found}, expected {expected}"
        raise Refused("file-changed", name, why)
