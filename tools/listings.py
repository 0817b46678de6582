"""Fetches the listings of folders that dvc is about to pull, and checks them: dvc itself does not.

    .venv-dvc/bin/python tools/listings.py [REMOTE]
    .venv-dvc/bin/python tools/listings.py --made       prints the stages that dvc.lock has bytes of

`verify true` covers the files of a folder, but their names are taken from the remote's listing as
it stands: who changes it exchanges files, or names one outside the folder. With the right listing
in its cache dvc asks the remote for none. Exit code 1: a listing is not the one in `dvc.lock`; 2:
the remote could not be asked.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError
from dvc.config import NoRemoteError
from dvc.exceptions import DvcException
from dvc.repo import Repo


def main(arguments: list[str]) -> int:
    """Checks every folder that the workspace's dvc files name; returns the exit code."""
    if arguments == ["--made"]:
        return print_made()
    remote = arguments[0] if arguments else None
    wrong = 0
    try:
        with Repo() as repo:
            for out in repo.index.outs:
                if out.hash_info and out.hash_info.isdir and out.hash_info.name == "md5":
                    wrong += not fetch_listing(repo, out, remote)
    except NoRemoteError:
        say("no remote is set. Run tools/remote PLACE.")
        return 2
    except (DvcException, BotoCoreError, OSError) as error:
        say(f"the remote cannot be asked, got {type(error).__name__}: {error}. Check it.")
        return 2
    return 1 if wrong else 0


def print_made() -> int:
    """Names stages that were made: of the others there is nothing to pull, and dvc would fail."""
    with Repo() as repo:
        for stage in repo.index.stages:
            if stage.outs and all(out.hash_info for out in stage.outs):
                sys.stdout.write(f"{stage.addressing}\n")
    return 0


def fetch_listing(repo: Any, out: Any, remote: str | None) -> bool:
    """Puts the right listing into the cache; False where the remote's is another one."""
    digest = out.hash_info.value
    cached = Path(out.cache.oid_to_path(digest))
    if cached.is_file() and is_right(cached.read_bytes(), digest):
        return True
    store = repo.cloud.get_remote_odb(name=remote or out.remote, command="pull")
    try:
        data = store.fs.cat_file(store.oid_to_path(digest))
    except FileNotFoundError:
        return True  # nothing to be misled by; dvc says so where it is needed
    if not is_right(data, digest):
        say(
            f"{out}: the remote's listing of this folder is not the one in dvc.lock, got md5 "
            f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}. Pull from another remote."
        )
        return False
    write(cached, data)
    return True


def is_right(data: bytes, digest: str) -> bool:
    """Whether a listing has the digest, written `<md5>.dir`."""
    return f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}.dir" == digest


def write(path: Path, data: bytes) -> None:
    """Writes a file of the cache whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.chmod(0o444)
    partial.replace(path)


def say(text: str) -> None:
    """One line for whoever pulls."""
    sys.stderr.write(f"tools/dvc: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
