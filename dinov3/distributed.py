"""Ranks, groups, collectives and FSDP2 wrapping; a process without a group is a world of one.

Every rank holds a contiguous share of the global batch, and FSDP averages gradients over ranks: a
loss that is a mean over a rank's own rows is then exact. A loss over rows of several ranks goes
through `gather_rows`, whose backward pass gives each rank the gradient of its own rows.
"""

# W ranks, b rows of one rank, B = W * b rows

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dinov3.errors import ConfigError, RankLost

Group = dist.ProcessGroup | None  # None: the whole world

_TIMEOUT = datetime.timedelta(minutes=30)  # the slowest rank may be writing or reading a state
_ENTRIES = ("forward_features", "get_intermediate_layers")  # forward passes besides forward()


@contextlib.contextmanager
def join_world(device: torch.device, *, alone: bool = False) -> Iterator[None]:
    """Joins the group that torchrun started this process for, if it did.

    Args:
        device: Decides between gloo and NCCL; `cuda` without a number is a GPU for each rank of
            the machine.
        alone: Make a group of one where torchrun did not start this process: mixed precision is
            FSDP's, also on a single device.

    Raises:
        ConfigError: The machine has fewer GPUs than ranks.
        RankLost: In the other ranks, when one ended in the middle of a collective.
    """
    _use_device(device)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if dist.is_initialized() or not (launched or alone):
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if launched:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _is_about_peers(error):
            raise
        msg = (
            f"rank {rank()}: another rank is gone, got {str(error).splitlines()[0]!r}. Look at "
            "what that one said; the same command goes on from the last checkpoint."
        )
        raise RankLost(msg) from error
    finally:
        dist.destroy_process_group()


def _use_device(device: torch.device) -> None:
    """FSDP and NCCL take the current device, whatever tensors are on."""
    if device.type != "cuda":
        return
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        msg = (
            f"run.processes: rank {index} of this machine needs a GPU of its own, got {count}. "
            "Start no more ranks than there are GPUs."
        )
        raise ConfigError(msg)
    torch.cuda.set_device(index)


def _is_about_peers(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def is_distributed() -> bool:
    """Whether this process belongs to a group."""
    return bool(dist.is_available() and dist.is_initialized())


def rank(group: Group = None) -> int:
    """Place of this process in the group, 0 where there is none."""
    return int(dist.get_rank(group)) if is_distributed() else 0


def world_size(group: Group = None) -> int:
    """Processes of the group, 1 where there is none."""
    return int(dist.get_world_size(group)) if is_distributed() else 1


def rows_of_rank(num_rows: int, group: Group = None) -> range:
    """This rank's contiguous share of the rows.

    Raises:
        ConfigError: The ranks do not divide them.
    """
    size = world_size(group)
    if num_rows % size:
        msg = f"batch_size: {size} ranks do not divide it, got {num_rows}. Use a multiple."
        raise ConfigError(msg)
    share = num_rows // size
    return range(rank(group) * share, (rank(group) + 1) * share)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, group: Group) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        context.group, context.num_rows = group, len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        first = rank(context.group) * context.num_rows
        own = gradients[0][first : first + context.num_rows]
        return own * world_size(context.group), None


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """Rows [b, ...] of all ranks, [B, ...], in the order of the ranks.

    All ranks must compute the same loss of the result; the gradient of a rank's own rows comes back
    times W, which FSDP's averaging divides out again.
    """
    if world_size(group) == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, group)
    return gathered


def gather_uneven(rows: Tensor) -> list[Tensor]:
    """Rows of all ranks of the world, which may hold different numbers of them; no gradient."""
    if world_size() == 1:
        return [rows]
    counts = gather_objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """A small value of every rank, in their order."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first_rank(value: Any) -> Any:
    """The value that rank 0 of the world has."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_over_ranks(values: Mapping[str, Tensor], group: Group = None) -> dict[str, float]:
    """Means of scalars that every rank of the group has; one collective, one wait."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size(group) > 1:
        dist.all_reduce(stacked, group=group)
        stacked /= world_size(group)
    return dict(zip(values, stacked.tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any rank of the world."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([float(flag)])
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def split_world(sizes: Sequence[int]) -> tuple[int, Group]:
    """Splits the world into consecutive groups; returns the index of ours and the group.

    Every rank must call it, with sizes that sum to the world's.
    """
    ours, found, first = 0, cast(Group, None), 0
    for index, size in enumerate(sizes):
        group = dist.new_group(list(range(first, first + size)))
        if first <= rank() < first + size:
            ours, found = index, cast(Group, group)
        first += size
    return ours, found


def shard(
    parts: Iterable[nn.Module],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    group: Group = None,
) -> None:
    """Shards modules over the ranks of a group: each block by itself, then what is left of each.

    Does nothing in a process without a group.

    Args:
        parts: Backbones and heads; those with `blocks` or `stages` are sharded block by block.
        device: Where they are.
        dtype: Of parameters and activations in use; gradients are reduced in fp32.
        group: The ranks; all if None.
    """
    if not is_distributed():
        return
    # features are views of one tensor, and nothing here changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(cast(dist.ProcessGroup, group or dist.group.WORLD), device.type)
    for part in parts:
        # always resharded: a root left whole after a forward pass without backward would hide its
        # shards from EMA and state
        for module in (*blocks_of(part), part):
            policy = MixedPrecisionPolicy(
                param_dtype=dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=module is part,  # blocks get the rotary tables: they stay fp32
            )
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in _ENTRIES:
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or the blocks of a ConvNeXt's stages, or none."""
    blocks = list(getattr(module, "blocks", ()))
    for stage in getattr(module, "stages", ()):
        blocks += list(stage.children())
    return blocks


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; all ranks of its mesh must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
