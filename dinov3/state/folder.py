"""Folders of states: their names, their `state.json`, and how one appears and goes.

.step_N.partial    being written
.step_N.replaced   the one before of the same step, until its successor is in place
.step_N.removed    being removed
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dinov3.errors import CheckpointError
from dinov3.release.record import file_sha256

_SCHEMA = "dinov3.state/1"
_FACTS = "state.json"
_STATE = re.compile(r"step_\d{9}")
_LEFT_OVER = re.compile(r"\.(step_\d{9})\.(partial|replaced|removed)")
_NUM_NAMED = 5  # names in a message


def state_path(folder: Path, step: int) -> Path:
    """Folder of the state after `step` steps."""
    return folder / f"step_{step:09d}"


def latest_state(folder: Path) -> Path | None:
    """The newest whole state of a folder, if there is one."""
    states = _states(folder)
    return states[-1] if states else None


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a state and its `step`.

    Raises:
        CheckpointError: It is not there or not readable.
    """
    facts: dict[str, Any] = _read_body(path)["facts"]
    return facts


def partial_path(path: Path) -> Path:
    """Where a state is written before it gets its name."""
    return _beside(path, "partial")


def tidy(folder: Path) -> None:
    """Makes the folder, and ends what a killed writer had begun in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        left_over = _LEFT_OVER.fullmatch(path.name)
        if left_over is None:
            continue
        if left_over[2] == "replaced" and not (folder / left_over[1]).exists():
            path.rename(folder / left_over[1])
        else:
            shutil.rmtree(path)


def publish(path: Path, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Gives a state whose files are all on disk its name.

    Args:
        path: The state.
        files: `sha256` and `bytes` by file name.
        facts: JSON values, `step` among them.
    """
    partial, replaced = partial_path(path), _beside(path, "replaced")
    for name, fact in files.items():
        size = (partial / name).stat().st_size  # also: does this rank see the others' files?
        if size != fact["bytes"]:
            msg = f"{partial / name}: wrong size, got {size} bytes of {fact['bytes']}"
            raise OSError(msg)
    body = {"schema": _SCHEMA, "facts": facts, "files": files}
    with (partial / _FACTS).open("w") as stream:
        json.dump({"state": body, "sha256": _digest(body)}, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(partial)
    if path.exists():
        path.rename(replaced)  # a folder with files in it cannot be renamed over
    partial.rename(path)
    _sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove_older(path: Path, keep: int) -> None:
    """Removes all but the last `keep` states up to this one.

    Newer ones stay: a run that went back to an older state comes to them again.
    """
    older = [state for state in _states(path.parent) if state.name <= path.name]
    for state in older[:-keep]:
        doomed = _beside(state, "removed")
        state.rename(doomed)  # a kill while removing must not leave half a state
        shutil.rmtree(doomed)


def verify(path: Path, share: slice = slice(None)) -> None:
    """Compares a state's files with their checksums.

    Args:
        path: The state.
        share: Which of its files, in order of their names; that all are there is always checked.

    Raises:
        CheckpointError: A file is damaged, missing, or not of the state.
    """
    files = _read_body(path)["files"]
    found = {file.name for file in path.iterdir()} - {_FACTS}
    if found != files.keys():
        odd = some(found ^ files.keys())
        raise unreadable(path, f"files are missing or do not belong to it: {odd}")
    for name in sorted(files)[share]:
        try:
            sha256 = file_sha256(path / name)
        except OSError as error:
            raise unreadable(path, error) from error
        if sha256 != files[name]["sha256"]:
            raise unreadable(path, f"checksum of {name} does not hold")


def unreadable(path: Path, why: object) -> CheckpointError:
    """The error of a damaged state."""
    return CheckpointError(
        f"{path}: not a readable checkpoint: {why}. Remove it to continue from an older one."
    )


def some(names: Collection[str]) -> str:
    """The first few names and how many more there are."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(sorted(names)[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _read_body(path: Path) -> dict[str, Any]:
    try:
        written = json.loads((path / _FACTS).read_bytes())
        body: dict[str, Any] = written["state"]
        held = written["sha256"] == _digest(body) and body["schema"] == _SCHEMA
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise unreadable(path, error) from error
    if not held:
        raise unreadable(path, f"checksum of {_FACTS} does not hold")
    return body


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = {path.name: path for path in folder.iterdir() if _STATE.fullmatch(path.name)}
    for path in folder.iterdir():
        left_over = _LEFT_OVER.fullmatch(path.name)
        if left_over is not None and left_over[2] == "replaced":
            found.setdefault(left_over[1], path)  # killed before its successor was in place
    return [found[name] for name in sorted(found)]


def _beside(path: Path, why: str) -> Path:
    return path.with_name(f".{path.name}.{why}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
