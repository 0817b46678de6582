"""The step that was not finite, on disk: the state before it and every rank's batch.

    <state folder>/job.json                            what was being trained, from what
    <state folder>/non_finite/step_…                   the state before the step
    <state folder>/non_finite/batch_rank_….safetensors the crops, and what was drawn for them

`dinov3.train.rebuild` takes the step again from these.
"""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.checkpoint import load_tensors, save_tensors
from dinov3.data.augment import Batch, CropParameters, View
from dinov3.errors import CheckpointError

JOB_NAME = "job.json"
_VIEW = "view"


def save_batch(folder: Path, batch: Batch, rank: int) -> Path:
    """Writes a batch as safetensors: crops as the workers left them, and what was drawn."""
    drawn = {
        f"parameters.{one.name}": torch.from_numpy(getattr(batch.parameters, one.name).copy())
        for one in fields(CropParameters)
    }
    views = {
        f"{_VIEW}.{view.kind}.{view.size}.{int(view.is_distorted)}": crops
        for view, crops in batch.views.items()
    }
    path = batch_path(folder, rank)
    partial = path.with_name(f".{path.name}.partial")
    save_tensors(
        partial,
        {
            "step": torch.tensor(batch.step),
            "indices": torch.from_numpy(batch.indices.copy()),
            "global_crops": batch.global_crops,
            "local_crops": batch.local_crops,
            **drawn,
            **views,
        },
    )
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)
    return path


def batch_path(folder: Path, rank: int) -> Path:
    """Where the batch of a rank lies."""
    return folder / f"batch_rank_{rank:05d}.safetensors"


def load_batch(path: Path) -> Batch:
    """Reads what `save_batch` wrote."""
    tensors = load_tensors(path)
    views = {}
    for name, crops in tensors.items():
        if name.startswith(f"{_VIEW}."):
            _, kind, size, is_distorted = name.split(".")
            views[View(kind, int(size), is_distorted == "1")] = crops  # type: ignore[arg-type]
    drawn = {one.name: tensors[f"parameters.{one.name}"].numpy() for one in fields(CropParameters)}
    return Batch(
        step=int(tensors["step"]),
        indices=tensors["indices"].numpy(),
        global_crops=tensors["global_crops"],
        local_crops=tensors["local_crops"],
        parameters=CropParameters(**drawn),
        views=views,
    )


def dumped_batches(folder: Path, *, step: int, num_ranks: int) -> list[Batch]:
    """The batches of all ranks, in their order.

    Args:
        folder: Holds them, perhaps beside those of an earlier dump by other ranks.
        step: Theirs.
        num_ranks: Of the run that left them.

    Raises:
        CheckpointError: One is missing, or of another step.
    """
    batches = []
    for rank in range(num_ranks):
        path = batch_path(folder, rank)
        if not path.is_file():
            msg = f"{path}: no batch of rank {rank}, got {num_ranks} ranks. Keep the dump whole."
            raise CheckpointError(msg)
        batch = load_batch(path)
        if batch.step != step:
            msg = f"{path}: not the batch of step {step}, got {batch.step}. Give the last dump."
            raise CheckpointError(msg)
        batches.append(batch)
    return batches


def groups_of(batches: Sequence[Batch], batch_size: int) -> list[list[Batch]]:
    """Ranks that went through the global batch together, as the students of a distillation do.

    Raises:
        CheckpointError: The batches are not so many times the global one.
    """
    groups: list[list[Batch]] = [[]]
    for batch in batches:
        if sum(len(one.indices) for one in groups[-1]) >= batch_size:
            groups.append([])
        groups[-1].append(batch)
    counts = [sum(len(one.indices) for one in group) for group in groups]
    if any(count != batch_size for count in counts):
        msg = f"dumped batches: not {batch_size} images each, got {counts}. Keep the dump whole."
        raise CheckpointError(msg)
    return groups


def merged(groups: Sequence[Sequence[Batch]]) -> Batch:
    """One batch with the crops that any group of ranks had; all groups have the same images."""
    batches = [joined(group) for group in groups]
    views = dict(batches[0].views)
    for batch in batches[1:]:
        views |= {_local_view(batch): batch.local_crops, **batch.views}
    return replace(batches[0], views=views)


def with_local_size(batch: Batch, size: int) -> Batch:
    """The same batch, with those local crops first that have this size."""
    first = _local_view(batch)
    if first.size == size:
        return batch
    wanted = View("local", size)
    others = {view: crops for view, crops in batch.views.items() if view != wanted}
    views = {first: batch.local_crops, **others}
    return replace(batch, local_crops=batch.views[wanted], views=views)


def _local_view(batch: Batch) -> View:
    return View("local", batch.local_crops.shape[-1])


def joined(batches: Sequence[Batch]) -> Batch:
    """The batches of all ranks as one, in the order of the global batch."""
    if len(batches) == 1:
        return batches[0]
    counts = [len(batch.indices) for batch in batches]

    def crops(parts: list[Tensor]) -> Tensor:
        rows = [part.unflatten(0, (-1, n)) for part, n in zip(parts, counts, strict=True)]
        return torch.cat(rows, dim=1).flatten(0, 1)

    def drawn(name: str) -> Any:
        parts = [getattr(batch.parameters, name) for batch in batches]
        rows = [part.reshape(-1, n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)]
        whole = np.concatenate(rows, axis=1)
        return whole.reshape(-1, *whole.shape[2:])

    return Batch(
        step=batches[0].step,
        indices=np.concatenate([batch.indices for batch in batches]),
        global_crops=crops([batch.global_crops for batch in batches]),
        local_crops=crops([batch.local_crops for batch in batches]),
        parameters=CropParameters(**{one.name: drawn(one.name) for one in fields(CropParameters)}),
        views={view: crops([batch.views[view] for batch in batches]) for view in batches[0].views},
    )
