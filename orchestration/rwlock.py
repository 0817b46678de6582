"""dvc's per-path locks left by killed processes.

dvc drops an entry whose process is gone; one whose number was given to another process would block
a stage until that ends, and a file cut short by a kill would block everything.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from dinov3.release.atomic import atomic_write


def remove_stale_locks(root: Path) -> None:
    """Drops the entries of processes that are gone or are not dvc."""
    path = root / ".dvc" / "tmp" / "rwlock"
    with _guarded(path) as ours:
        if not ours or not path.is_file():
            return
        before = _read(path)
        kept = {
            "write": {name: one for name, one in before["write"].items() if _holds(one)},
            "read": {
                name: [one for one in all_ if _holds(one)] for name, all_ in before["read"].items()
            },
        }
        if kept != before:
            atomic_write(path, json.dumps(kept).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        lock = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError:
        lock = {"damaged": True}  # differs from whatever is kept, so it is written anew
    return {"write": {}, "read": {}, **lock}


def _holds(entry: dict[str, Any]) -> bool:
    try:
        return any("dvc" in word for word in psutil.Process(entry["pid"]).cmdline())
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[bool]:
    """Takes dvc's own lock on that file; False when a dvc is at it just now, or none ever was."""
    guard = path.with_name("rwlock.lock")
    if not guard.is_file():
        yield False
        return
    with guard.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
