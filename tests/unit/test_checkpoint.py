"""Weights survive, and a run has one trainer."""

import multiprocessing

import pytest
import torch

from dinov3.checkpoint import exclusive, load_tensors, save_tensors
from dinov3.errors import CheckpointError


def _hold(folder, ready, leave):
    with exclusive(folder):
        ready.set()
        leave.wait()


def test_second_trainer_of_the_same_run_is_turned_away(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, leave))
    holder.start()
    ready.wait()
    with (
        pytest.raises(CheckpointError, match=f"trained by process {holder.pid}"),
        exclusive(tmp_path),
    ):
        pass
    leave.set()
    holder.join()
    with exclusive(tmp_path):
        pass


def test_tensors_survive_bit_for_bit(tmp_path):
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int64)}
    save_tensors(tmp_path / "w.safetensors", weights)
    loaded = load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
