"""Resumable state: whole or not there, readable without pickle's dangers."""

import multiprocessing

import pytest
import torch

from dinov3.checkpoint import (
    exclusive,
    latest_state,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
    state_path,
)
from dinov3.errors import CheckpointError


def test_only_the_last_states_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        save_state(tmp_path, step, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000000010.pt",
        "step_000000011.pt",
    ]
    assert load_state(latest_state(tmp_path))["step"] == 11


def test_failed_write_names_the_last_good_state_and_leaves_it(tmp_path):
    save_state(tmp_path, 1, {"step": 1}, keep=2)
    state_path(tmp_path, 2).with_suffix(".tmp").mkdir()  # nothing can be written there
    with pytest.raises(CheckpointError, match=r"could not be written.*step_000000001\.pt"):
        save_state(tmp_path, 2, {"step": 2}, keep=2)
    assert load_state(latest_state(tmp_path))["step"] == 1


def test_half_written_file_is_never_taken_for_a_state(tmp_path):
    save_state(tmp_path, 1, {"step": 1}, keep=2)
    (tmp_path / "step_000000002.tmp").write_bytes(b"half")
    assert latest_state(tmp_path) == state_path(tmp_path, 1)


def test_pickled_code_is_refused(tmp_path):
    path = tmp_path / "step_000000001.pt"
    torch.save({"step": 1, "bad": pytest.approx}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_state(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_unreadable_state_is_refused(tmp_path, content):
    path = tmp_path / "step_000000001.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_state(path)


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
