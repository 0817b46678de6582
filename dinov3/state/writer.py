"""Writing states while training goes on."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov3.errors import CheckpointError, RankLost
from dinov3.state.agreement import FAILED, agreed, is_about_peers, is_distributed
from dinov3.state.folder import (
    latest_state,
    partial_path,
    publish,
    remove_older,
    state_path,
    tidy,
)
from dinov3.state.shards import write_shards


class StateWriter:
    """Writes states in a thread of its own, over collectives of its own.

    Every rank has one, and every rank makes the same calls. It holds one copy of this rank's
    tensors in CPU memory, which every write uses again.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Clears what a killed writer left.

        Args:
            folder: Holds the states; made if it is not there.
            keep: How many of the last states stay.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        self._folder = folder
        self._keep = keep
        # training's collectives go on meanwhile: in one group the two would interleave
        self._group = cast(
            dist.ProcessGroup | None, dist.new_group(backend="gloo") if is_distributed() else None
        )
        self._is_first = self._group is None or dist.get_rank(self._group) == 0
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._pending: Future[None] | None = None
        try:
            self._on_first_rank(lambda: tidy(folder))
        except FAILED as error:
            msg = f"{folder}: cannot hold states: {error}. Make it writable."
            raise CheckpointError(msg) from error

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Copies the tensors and returns; the copy is written in the background.

        It waits for the write before, if that is still under way.

        Args:
            step: Steps done; a state of the same step is replaced.
            tensors: Live tensors. One that is not sharded must be equal on all ranks that have it.
            facts: JSON values; rank 0's are kept.
            wait: Return when the state is on disk.

        Raises:
            CheckpointError: The write before this one failed, or this one when waiting.
            RankLost: It failed because another rank ended.
        """
        self.wait()
        frozen = json.loads(json.dumps({**facts, "step": step}))
        live = dict(tensors)
        self._copies = _copied(live, self._copies)
        self._pending = self._thread.submit(self._write, step, live, frozen)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: The last write failed, older states stand; it is raised once.
            RankLost: Likewise, because another rank ended.
        """
        if self._pending is None:
            return
        failure = self._pending.exception()  # interrupted here, the write is still close()'s
        self._pending = None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Finishes the write, then frees thread, copy and group.

        Raises:
            CheckpointError: The last write failed, older states stand.
            RankLost: Likewise, because another rank ended.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copies = {}
            if self._group is not None and is_distributed():
                dist.destroy_process_group(self._group)
            self._group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except (CheckpointError, RankLost) as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the run comes first

    def _write(self, step: int, live: dict[str, Tensor], facts: dict[str, Any]) -> None:
        path = state_path(self._folder, step)
        partial = partial_path(path)
        try:
            self._on_first_rank(lambda: _make_anew(partial))
            files = write_shards(partial, live, self._copies, self._group)
            self._on_first_rank(lambda: publish(path, files, facts))
            self._on_first_rank(lambda: remove_older(path, self._keep))
        except FAILED as error:
            if self._is_first:  # all ranks have met the failure: nobody writes there any more
                shutil.rmtree(partial, ignore_errors=True)
            last = f"The last good one is {latest_state(self._folder) or 'none'}"
            if is_about_peers(error):
                said = str(error).splitlines()[0]
                msg = (
                    f"{path}: another rank is gone while the checkpoint was written, got {said!r}. "
                    f"{last}; look at what that rank said and run the same command again."
                )
                raise RankLost(msg) from error
            msg = (
                f"{path}: the checkpoint could not be written: {error}. {last}; free the disk and "
                "run the same command again."
            )
            raise CheckpointError(msg) from error

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        if self._group is None:
            work()
        else:
            agreed(work if self._is_first else lambda: None, self._group)


@torch.no_grad()
def _copied(live: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards in CPU memory, in the buffers of the copy before where they fit."""
    copies, devices = {}, set()
    for name, tensor in live.items():
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
            # page-locked memory: a GPU writes to it several times as fast
            buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
        copies[name] = buffer.copy_(shard, non_blocking=True)
        devices.add(shard.device.type)
    if devices - {"cpu"}:
        torch.accelerator.synchronize()
    return copies


def _make_anew(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
