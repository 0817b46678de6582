"""Weights on disk without a run around them, and the lock of a run's folder.

Resumable state, which may be sharded, is `dinov3.state`.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3.errors import CheckpointError


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
