"""Tensors of a state: one safetensors file per rank, through torch.distributed.checkpoint.

The library plans who writes and reads what. Its Hugging Face reader reads; its writer would copy a
rank's tensors twice more before the first byte is on disk, ours writes them from where they are.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dinov3.errors import CheckpointError
from dinov3.release.record import file_sha256
from dinov3.state.agreement import FAILED, agreed
from dinov3.state.folder import unreadable


class _CopyPlanner(DefaultSavePlanner):
    """Plans by what the live tensors are, shards of what; the bytes are those of their copies."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The copy to write."""
        return self._copies[write_item.index.fqn]


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes this rank's part of a plan to one file and remembers its checksum."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._file = folder / f"rank_{rank:05d}.safetensors"
        self.written: dict[str, dict[str, Any]] = {}  # by file name

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and syncs."""
        tensors: dict[str, Any] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            name = item.index.fqn
            if item.tensor_data is None or name in tensors:
                msg = f"{name}: not one shard of a tensor per rank, got {item.type}"
                raise ValueError(msg)
            tensors[name] = planner.resolve_data(item)
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            self._write(tensors, offsets)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, tensors: dict[str, Tensor], offsets: dict[str, Any]) -> None:
        header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(tensors, self._file, metadata=header)
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())
        size = self._file.stat().st_size
        self.written[self._file.name] = {"sha256": file_sha256(self._file), "bytes": size}


def write_shards(
    folder: Path,
    tensors: dict[str, Any],
    copies: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
) -> dict[str, dict[str, Any]]:
    """Writes and syncs every rank's file.

    Args:
        folder: An empty folder that all ranks see.
        tensors: Live tensors, plain or sharded; only their kind is looked at.
        copies: What they held, this rank's shards of it, in CPU memory.
        group: The ranks; None for a process without a group.

    Returns:
        `sha256` and `bytes` by file name.

    Raises:
        CheckpointError: On all ranks, when one could not write; without a group whatever it met.
    """
    if group is None:
        writer = _ShardWriter(folder, rank=0)
        _save_alone(writer, tensors, copies)
        return writer.written
    writer = _ShardWriter(folder, dist.get_rank(group))
    try:
        planner = _CopyPlanner(copies)
        save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        msg = f"rank {rank}: {cause}"
        raise CheckpointError(msg) from error
    every = agreed(lambda: writer.written, group)
    return {name: fact for files in every for name, fact in files.items()}


def read_shards(path: Path, tensors: dict[str, Any]) -> None:
    """Fills tensors in place, without a word to other ranks: each reads what its shards need.

    Raises:
        CheckpointError: A file cannot be read.
    """
    reader, planner = HuggingFaceStorageReader(str(path)), DefaultLoadPlanner()
    try:
        metadata = reader.read_metadata()
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plans = planner.create_global_plan([planner.create_local_plan()])
        reader.read_data(planner.finish_plan(plans[0]), planner).wait()
    except FAILED as error:
        raise unreadable(path, error) from error


def read_contents(path: Path) -> dict[str, TensorStorageMetadata]:
    """Whole sizes and types by name.

    Raises:
        CheckpointError: A file cannot be read.
    """
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except FAILED as error:
        raise unreadable(path, error) from error
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def _save_alone(
    writer: _ShardWriter, tensors: dict[str, Any], copies: Mapping[str, Tensor]
) -> None:
    planner = _CopyPlanner(copies)
    planner.set_up_planner(tensors, is_coordinator=True)
    plans, _ = planner.create_global_plan([planner.create_local_plan()])
    writer.write_data(planner.finish_plan(plans[0]), planner).wait()
