"""Reading a state back: into live tensors of any number of ranks, or whole."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.errors import CheckpointError
from dinov3.state.agreement import agreed, is_distributed
from dinov3.state.folder import some, verify
from dinov3.state.shards import read_contents, read_shards


def load_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills live tensors in place; every rank calls it, each with the tensors it has.

    Raises:
        CheckpointError: On all ranks alike: a file is damaged, or the tensors of all ranks together
            are not those of the state, with their shapes and types; nothing was filled then.
    """
    extra = set.intersection(*agreed(lambda: _check(path, tensors)))
    if extra:
        msg = (
            f"{path}: not a state of this run: it holds tensors that the run lacks, got "
            f"{some(extra)}. Remove it to continue from an older one."
        )
        raise CheckpointError(msg)
    live = {name: tensor.detach() for name, tensor in tensors.items()}
    agreed(lambda: read_shards(path, live))


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole CPU tensors of a state, whatever ranks wrote it; a process does it alone.

    Args:
        path: A state.
        prefix: Beginning of the names to read; the tensors returned are named without it.

    Raises:
        CheckpointError: A file is damaged, or no tensor has such a name.
    """
    verify(path)
    found = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in read_contents(path).items()
        if name.startswith(prefix)
    }
    if not found:
        msg = f"{path}: no tensor's name begins so, got {prefix!r}. Choose a prefix that is there."
        raise CheckpointError(msg)
    read_shards(path, found)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _check(path: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """Returns the names this rank has not, which is an error only if no other rank has them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    verify(path, share=slice(rank, None, size))
    contents = read_contents(path)
    missing = tensors.keys() - contents.keys()
    differing = [
        f"{name} {list(kind.size)} {kind.properties.dtype} instead of "
        f"{list(tensor.shape)} {tensor.dtype}"
        for name, tensor in tensors.items()
        if (kind := contents.get(name)) is not None
        and (kind.size != tensor.shape or kind.properties.dtype != tensor.dtype)
    ]
    wrong = [f"it lacks {some(missing)}"] * bool(missing) + [some(differing)] * bool(differing)
    if wrong:
        msg = (
            f"{path}: not a state of this run, got {'; '.join(wrong)}. "
            "Remove it to continue from an older one."
        )
        raise CheckpointError(msg)
    return contents.keys() - tensors.keys()
