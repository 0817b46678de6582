"""Branches of publishers: each has its own, and holds a lock on this machine while it lives.

A branch whose lock stands here unheld is a dead publisher's. One whose lock is not here belongs to
another machine, and counts as dead after a day.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dinov3.errors import StoreError
from dinov3.lake import Lake

_RUN = re.compile(r"run-(\d{8}T\d{6}Z)-[0-9a-f]{12}")
_TIME = "%Y%m%dT%H%M%SZ"
_FOREIGN_LIFE = timedelta(days=1)


@contextlib.contextmanager
def run_branch(lake: Lake, repo: str, base: str) -> Iterator[str]:
    """A new branch at a commit, gone afterwards unless this process is killed."""
    branch = f"run-{datetime.now(UTC).strftime(_TIME)}-{secrets.token_hex(6)}"
    path = _lock_path(branch)
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            lake.create_branch(repo, branch, base)
            yield branch
        finally:
            with contextlib.suppress(StoreError):  # what went wrong before is worth more
                lake.delete_branch(repo, branch)
                path.unlink(missing_ok=True)


def prune_runs(lake: Lake, repo: str) -> list[str]:
    """Removes branches of dead publishers; says which."""
    return [branch for branch in sorted(lake.branches(repo, "run-")) if _prune(lake, repo, branch)]


def _prune(lake: Lake, repo: str, branch: str) -> bool:
    made = _made(branch)
    if made is None:
        return False
    path = _lock_path(branch)
    try:
        with path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = lake.delete_branch(repo, branch)
            path.unlink()
            return removed
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return datetime.now(UTC) - made > _FOREIGN_LIFE and lake.delete_branch(repo, branch)


def _made(branch: str) -> datetime | None:
    """When a publisher made it; None where none did."""
    named = _RUN.fullmatch(branch)
    try:
        return datetime.strptime(named[1], _TIME).replace(tzinfo=UTC) if named else None
    except ValueError:
        return None


def _lock_path(branch: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "dinov3" / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{folder}: cannot be made: {error.strerror}. Set XDG_CACHE_HOME."
        raise StoreError(msg) from error
    return folder / f"{branch}.lock"
