"""`python -m dinov3 lake`: pictures and dvc's bytes in lakeFS, for people.

    lake pin pictures/main/cats            the branch's commit becomes the source in params.yaml
    lake put /my/pictures pictures/main    loads a folder and commits it; run again, it goes on
    lake create pictures                   a repository
    lake commit dvc/main                   makes permanent what `dvc push` left on a branch

The server is the one LAKEFS_ENDPOINT names, else the one `make lakefs` started.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dinov3.errors import ConfigError, DataError, DinoError, StoreError

if TYPE_CHECKING:
    from dinov3.lake import Address, Lake

_MESSAGE = "Pictures of a folder"
_REPORT_EVERY = 100  # pictures


def main(arguments: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3 lake", description="Pictures and dvc's bytes in lakeFS."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pin", help="make a branch's commit the source in params.yaml")
    verb.add_argument("place", metavar="REPO/BRANCH[/PREFIX]")
    verb.add_argument("--params", type=Path, default=Path("params.yaml"), help="of the source")
    verb = verbs.add_parser("put", help="load the pictures of a folder and commit them")
    verb.add_argument("folder", type=Path, metavar="FOLDER", help="of pictures")
    verb.add_argument("place", metavar="REPO/BRANCH[/PREFIX]")
    verb.add_argument("--message", default=_MESSAGE, help="of the commit")
    verb = verbs.add_parser("create", help="make a repository")
    verb.add_argument("repo", metavar="REPO")
    verb.add_argument("--namespace", help="where its bytes go; default: beside the server")
    verb = verbs.add_parser("commit", help="commit what is staged on a branch")
    verb.add_argument("place", metavar="REPO/BRANCH")
    verb.add_argument("--message", default="dvc push", help="of the commit")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except DinoError as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("dinov3: interrupted; run the same command again to go on\n")
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.verb == "pin":
        print(pin(options.place, options.params))
    elif options.verb == "put":
        print(put(options.folder, options.place, message=options.message))
    elif options.verb == "create":
        print(create(options.repo, options.namespace))
    else:
        place = _place(options.place)
        print(f"lakefs://{place.repo}/{_commit(_connect(), place, options.message)}/")
    return 0


def pin(place: str, params: Path) -> str:
    """Writes the commit that a branch or tag stands for now into the parameter file.

    Args:
        place: `REPO/BRANCH[/PREFIX]`, with or without `lakefs://`.
        params: The pipeline's parameter file; comments and other parameters stay.

    Returns:
        The source as written.

    Raises:
        StoreError: The server is away, or has no such branch.
        DataError: No picture is there.
        ConfigError: The file cannot be changed.
    """
    from dinov3.data.sources.verb import set_source

    address = _place(place)
    commit = _connect().resolve(address.repo, address.ref)
    source = f"lakefs://{address.repo}/{commit}/{address.path.strip('/')}".rstrip("/")
    set_source(params, source)
    return source


def put(folder: Path, place: str, *, message: str = _MESSAGE) -> str:
    """Loads the pictures of a folder into a branch and commits them.

    What the branch already has with the same bytes is passed over, so a stopped run goes on where
    it stopped. One file at a time is sent as it is read.

    Args:
        folder: Its files with the suffix of an image are taken; sub-folders are kept.
        place: `REPO/BRANCH[/PREFIX]`; the branch is made at `main` where it is missing.
        message: Of the commit.

    Returns:
        The source that names them, pinned.

    Raises:
        DataError: The folder holds no picture, or one that cannot be read or named.
        StoreError: The server is away or refuses.
    """
    address, lake = _place(place), _connect()
    if not lake.has_repository(address.repo):
        msg = (
            f"{address.repo}: no such repository, got {place!r}. "
            f"Make it: python -m dinov3 lake create {address.repo}."
        )
        raise StoreError(msg)
    if lake.find(address.repo, address.ref) is None:
        lake.create_branch(address.repo, address.ref, lake.resolve(address.repo, "main"))
    prefix = f"{address.path.strip('/')}/".lstrip("/")
    num_seen = num_sent = 0
    for name, path in _pictures(folder):
        num_seen += 1
        num_sent += _send(lake, address, f"{prefix}{name}", path)
        if num_seen % _REPORT_EVERY == 0:
            sys.stderr.write(f"lake put: {num_seen} pictures, {num_sent} of them sent\n")
    if num_seen == 0:
        msg = f"{folder}: holds no image, got an empty listing. Put images there or name another."
        raise DataError(msg)
    sys.stderr.write(f"lake put: {num_seen} pictures, {num_sent} of them sent\n")
    commit = _commit(lake, address, message)
    return f"lakefs://{address.repo}/{commit}/{prefix}".rstrip("/")


def create(repo: str, namespace: str | None = None) -> str:
    """Makes a repository, unless it is there.

    Args:
        repo: Its name.
        namespace: Where the server puts its bytes; needed where it does not keep them itself.

    Returns:
        A line that says what was done.

    Raises:
        StoreError: The server is away or refuses, or needs a namespace.
    """
    lake = _connect()
    if namespace is None:
        kind = lake.storage_kind()
        if kind != "local":
            msg = f"--namespace: needed where the server keeps bytes in {kind}, got none. Name one."
            raise StoreError(msg)
        namespace = f"local://{repo}"
    made = lake.create_repository(repo, namespace)
    return f"{repo}: {'made' if made else 'there already'}"


def _connect() -> "Lake":
    from dinov3.lake import Lake

    return Lake.connect()


def _place(text: str) -> "Address":
    from dinov3.lake import parse_address

    try:
        return parse_address(f"lakefs://{text.removeprefix('lakefs://')}")
    except StoreError as error:
        msg = f"place: not of the form REPO/BRANCH[/PREFIX], got {text!r}. Write it so."
        raise ConfigError(msg) from error


def _pictures(folder: Path) -> Iterator[tuple[str, str]]:
    """Name inside the folder and place of each picture, in order."""
    from dinov3.data.sources.folder import FolderSource
    from dinov3.data.sources.paths import decode_path

    source = FolderSource(folder)
    for entry in source.entries():
        name = decode_path(entry.path)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            msg = f"{entry.path}: lakeFS names are UTF-8, got other bytes. Rename it."
            raise DataError(msg) from error
        if entry.refused is not None:
            msg = f"{entry.path}: cannot be loaded, got {entry.refused}. Take it out of the folder."
            raise DataError(msg)
        yield name, source.file_of(entry.path)


def _send(lake: "Lake", address: "Address", name: str, path: str) -> bool:
    """Sends one file, unless the branch has the same bytes there; whether it was sent."""
    try:
        with Path(path).open("rb") as stream:
            size = stream.seek(0, 2)
            found = lake.stat(address.repo, address.ref, name)
            stream.seek(0)
            if found is not None and found.size == size:
                known = hashlib.file_digest(stream, "md5").hexdigest()  # the server's own checksum
                if known == found.checksum:
                    return False
                stream.seek(0)
            lake.upload(address.repo, address.ref, name, stream, size)
    except OSError as error:
        msg = f"{path}: cannot be read, got {error.strerror}. Allow it or take it away."
        raise DataError(msg) from error
    return True


def _commit(lake: "Lake", address: "Address", message: str) -> str:
    """Commits what is staged on the branch; its commit id, a new one or the one it had."""
    if lake.has_staged(address.repo, address.ref):
        return lake.commit(address.repo, address.ref, message)
    return lake.resolve(address.repo, address.ref)
