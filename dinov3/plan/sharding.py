"""Bytes of a sharded network, and what its ranks send each other (FSDP2: every tensor by rows).

A tensor of n rows on W ranks takes ceil(n / W) rows on every rank: the last ranks hold padding.
Optimizer moments have no padding. Shards are fp32; rows are gathered in the dtype of computation
and gradients reduced in fp32.
"""

# W ranks

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dinov3.distributed import blocks_of

SHARD_BYTES = 4  # fp32: of parameters, gradients, moments and reductions
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Tensors that are gathered together: a block, or what is left of a network without blocks.

    Attributes:
        shapes: Of its parameters.
        is_block: Of a part with blocks: the next one is on its way while it is in use.
    """

    shapes: tuple[Shape, ...]
    is_block: bool

    @property
    def num_parameters(self) -> int:
        """Numbers in all its tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    def padded(self, world_size: int) -> int:
        """Numbers that each rank stores."""
        return sum(_rows(shape, world_size) * _row_size(shape) for shape in self.shapes)

    def owned(self, world_size: int, rank: int = 0) -> int:
        """Numbers that one rank stores, without padding; rank 0 has the most."""
        total = 0
        for shape in self.shapes:
            rows = _rows(shape, world_size)
            left = max(_num_rows(shape) - rank * rows, 0)
            total += min(rows, left) * _row_size(shape)
        return total


@dataclass(frozen=True)
class Sharded:
    """A network cut into units, on a number of ranks."""

    units: tuple[Unit, ...]
    world_size: int
    compute_bytes: int  # of one number in use: 4 or 2

    def shard_bytes(self) -> int:
        """Of parameters, of gradients, or of an average of them, on each rank."""
        return SHARD_BYTES * sum(unit.padded(self.world_size) for unit in self.units)

    def moment_bytes(self, rank: int = 0) -> int:
        """Of both AdamW moments on one rank."""
        return 2 * SHARD_BYTES * sum(unit.owned(self.world_size, rank) for unit in self.units)

    def gathered_bytes(self, *, backward: bool) -> int:
        """Most that stands whole at once: two blocks or one head, and one unit's gradients.

        A single rank that computes in fp32 needs no copy.
        """
        if self.world_size == 1 and self.compute_bytes == SHARD_BYTES:
            return 0
        counts = [(1 + unit.is_block) * unit.num_parameters for unit in self.units]
        largest = max((unit.num_parameters for unit in self.units), default=0)
        reduced = largest * (self.compute_bytes + SHARD_BYTES) if backward else 0
        return self.compute_bytes * max(counts, default=0) + reduced

    def gather_traffic(self, *, backward: bool) -> float:
        """Bytes each rank receives for one forward pass, and once more for its backward pass."""
        numbers = sum(unit.padded(self.world_size) for unit in self.units)
        return float((1 + backward) * numbers * (self.world_size - 1) * self.compute_bytes)

    def reduce_traffic(self) -> float:
        """Bytes each rank receives while gradients are reduced once."""
        return float(self.shard_bytes() * (self.world_size - 1))


def shard_of(parts: Iterable[nn.Module], *, world_size: int, dtype: str) -> Sharded:
    """How `dinov3.distributed.shard` would cut these modules.

    Args:
        parts: Backbones and heads, on the meta device.
        world_size: Ranks.
        dtype: `fp32` or `bf16`, of computation.
    """
    units: list[Unit] = []
    for part in parts:
        seen: set[nn.Parameter] = set()
        for block in blocks_of(part):
            units.append(_unit(block, seen, is_block=True))
        units.append(_unit(part, seen, is_block=False))
    size = torch.finfo(torch.bfloat16 if dtype == "bf16" else torch.float32).bits // 8
    return Sharded(tuple(units), world_size, size)


def _unit(module: nn.Module, seen: set[nn.Parameter], *, is_block: bool) -> Unit:
    own = [p for p in module.parameters() if p not in seen]
    seen.update(own)
    return Unit(tuple(tuple(p.shape) for p in own), is_block)


def _num_rows(shape: Shape) -> int:
    return shape[0] if shape else 1


def _rows(shape: Shape, world_size: int) -> int:
    return math.ceil(_num_rows(shape) / world_size)


def _row_size(shape: Shape) -> int:
    return math.prod(shape[1:])
