"""One outcome for all ranks: a failure of one is raised by every one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from dinov3.errors import CheckpointError

T = TypeVar("T")

# what libraries raise about a disk, a file or a dead peer; CheckpointError is what we do
FAILED = (
    CheckpointError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    AssertionError,
    SafetensorError,
)


def is_about_peers(error: BaseException) -> bool:
    """Whether a collective failed; gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def is_distributed() -> bool:
    """Whether this process belongs to a group."""
    return bool(dist.is_available() and dist.is_initialized())


def agreed(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Results of all ranks.

    Raises:
        CheckpointError: On all ranks, with the words of the first that failed.
    """
    result, failure = None, None
    try:
        result = work()
    except FAILED as error:
        failure = str(error) or type(error).__name__
    outcomes: list[Any] = [(result, failure)]
    if is_distributed():
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, failure), group=group)
    for _, failed in outcomes:
        if failed is not None:
            raise CheckpointError(failed)
    return [done for done, _ in outcomes]
