"""Resumable state and exported weights on disk.

State lives in a folder keyed by everything that determines the run; each file appears whole or not
at all, and the last good one outlives a full disk or a kill at any moment. It is read with
`weights_only=True`; exported weights are safetensors.
"""

import contextlib
import fcntl
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3.errors import CheckpointError

_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError)
_STATE_NAME = re.compile(r"step_(\d{9})\.pt")


def state_path(folder: Path, step: int) -> Path:
    """File of the state after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def save_state(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the state after `step` steps and removes all but the last `keep`.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; older states stand.
    """
    path = state_path(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        msg = (
            f"{path}: the checkpoint could not be written: {error}. The last good one is "
            f"{latest_state(folder) or 'none'}; free the disk and run the same command again."
        )
        raise CheckpointError(msg) from error
    for old in _states(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def latest_state(folder: Path) -> Path | None:
    """The newest whole state of a folder, if there is one."""
    states = _states(folder)
    return states[-1] if states else None


def load_state(path: Path) -> dict[str, Any]:
    """Reads a state.

    Raises:
        CheckpointError: The file is missing or not a state.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged is not None:
            msg = f"checksum of {damaged} does not hold"
            raise zipfile.BadZipFile(msg)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNREADABLE, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        msg = (
            f"{path}: not a readable checkpoint: {error}. Remove it to continue from an older one."
        )
        raise CheckpointError(msg) from error
    if not isinstance(loaded, dict) or "step" not in loaded:
        msg = f"{path}: not a training state, got {type(loaded).__name__}. Choose a step_*.pt file."
        raise CheckpointError(msg)
    return loaded


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; tensors that share memory are written apart."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU."""
    loaded: dict[str, Tensor] = load_file(str(path))
    return loaded


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a state folder for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: Another process trains the very same run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            msg = (
                f"{folder}: this very run is being trained by process {holder}. "
                "Wait for it or stop it."
            )
            raise CheckpointError(msg) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name))
