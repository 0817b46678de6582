"""Resumable state: whole or not there, bit for bit, no pickle."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dinov3.errors import CheckpointError
from dinov3.state import (
    StateWriter,
    latest_state,
    load_state,
    read_facts,
    read_tensors,
    state_path,
)
from tests.saved_states import CHILDREN, blank, die_at, flip_a_bit, names_in, same


def _tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "student.weight": torch.randn(5, 3, generator=generator),
        "student.bf16": torch.randn(4, 4, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(7.0 + seed),
        "optimizer.flags": torch.tensor([True, False, True]),
        "teacher.counts": torch.arange(6) + seed,
        "teacher.none": torch.zeros(0, 3),
    }


def _save(folder, step, tensors, facts=None, keep=2):
    with StateWriter(folder, keep=keep) as writer:
        writer.save(step, tensors, facts or {})
    return state_path(folder, step)


def test_tensors_and_facts_come_back_as_they_were(tmp_path):
    path = _save(tmp_path, 7, _tensors(), {"health": {"rank": 0.1}, "loss": float("nan")})
    live = blank(_tensors())
    load_state(path, live)
    assert same(live, _tensors())
    facts = read_facts(path)
    assert (facts["step"], facts["health"]) == (7, {"rank": 0.1})
    assert facts["loss"] != facts["loss"]


def test_state_may_be_facts_alone(tmp_path):
    path = _save(tmp_path, 1, {}, {"a": 1})
    load_state(path, {})
    assert read_facts(path) == {"a": 1, "step": 1}


def test_live_parameters_are_filled_in_place(tmp_path):
    path = _save(tmp_path, 1, {"weight": torch.ones(2, 2)})
    live = nn.Linear(2, 2, bias=False)
    weight = live.weight
    load_state(path, {"weight": weight})
    assert live.weight is weight
    assert torch.equal(weight, torch.ones(2, 2))
    assert weight.requires_grad


def test_state_does_not_change_with_the_tensors_after_save_returned(tmp_path):
    live, facts = {"a": torch.zeros(1_000_000)}, {"list": [1]}
    with StateWriter(tmp_path, keep=2) as writer:
        for step in (1, 2):
            live["a"].fill_(step)
            writer.save(step, live, facts)
            live["a"].fill_(-1)
            facts["list"].append(step)
    for step in (1, 2):
        path = state_path(tmp_path, step)
        assert read_tensors(path)["a"].unique().tolist() == [step]
        assert read_facts(path)["list"] == [1, 1][:step]


def test_save_returns_before_the_state_is_on_disk(tmp_path):
    go_on, folder = threading.Event(), tmp_path / "states"
    with StateWriter(folder, keep=2) as writer:
        writer._thread.submit(go_on.wait)  # the disk is busy
        writer.save(1, _tensors(), {})
        assert latest_state(folder) is None
        go_on.set()
    assert latest_state(folder) == state_path(folder, 1)


def test_tied_and_strided_tensors_are_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "slice": base[1:], "turned": base.T}
    assert same(read_tensors(_save(tmp_path, 1, tensors)), tensors)


def test_export_reads_one_part_under_its_own_names(tmp_path):
    path = _save(tmp_path, 1, _tensors())
    assert read_tensors(path, "teacher.").keys() == {"counts", "none"}
    with pytest.raises(CheckpointError, match="got 'pupil'"):
        read_tensors(path, "pupil")


def test_only_the_last_states_are_kept(tmp_path):
    with StateWriter(tmp_path, keep=2) as writer:
        for step in (1, 2, 10, 11):
            writer.save(step, {"a": torch.tensor(step)}, {})
    assert names_in(tmp_path) == ["step_000000010", "step_000000011"]
    assert read_facts(latest_state(tmp_path))["step"] == 11


def test_run_that_went_back_keeps_its_new_state(tmp_path):
    for step in (10, 20, 6):
        path = _save(tmp_path, step, _tensors(), keep=1)
    assert path.exists()
    assert read_facts(path)["step"] == 6


def test_same_step_is_replaced(tmp_path):
    _save(tmp_path, 3, _tensors(0))
    path = _save(tmp_path, 3, _tensors(1))
    assert names_in(tmp_path) == [path.name]
    assert same(read_tensors(path), _tensors(1))


def test_facts_that_are_not_json_are_refused_at_once(tmp_path):
    with StateWriter(tmp_path, keep=1) as writer, pytest.raises(TypeError, match="JSON"):
        writer.save(1, {}, {"tensor": torch.zeros(1)})


def test_nothing_is_pickled(tmp_path):
    path = _save(tmp_path, 1, _tensors())
    assert names_in(path) == ["rank_00000.safetensors", "state.json"]
    json.loads((path / "state.json").read_text())
    assert load_file(path / "rank_00000.safetensors").keys() == _tensors().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": torch.zeros(1)}, "it lacks more"),
        ({"teacher.counts": torch.zeros(5).long()}, r"teacher.counts \[6\].*instead of \[5\]"),
        ({"teacher.counts": torch.zeros(6)}, "teacher.counts .*int64 instead of .*float32"),
        ({"teacher.counts": None}, "holds tensors that the run lacks, got teacher.counts"),
    ],
)
def test_state_of_another_run_is_refused_and_fills_nothing(tmp_path, change, message):
    path = _save(tmp_path, 1, _tensors())
    changed = {**blank(_tensors()), **change}
    live = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        load_state(path, live)
    assert not any(tensor.any() for tensor in live.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_bit(path / "rank_00000.safetensors"), "checksum of rank_00000"),
        (lambda path: os.truncate(path / "rank_00000.safetensors", 99), "checksum of rank_00000"),
        (lambda path: (path / "rank_00000.safetensors").unlink(), "belong to it: rank_00000"),
        (lambda path: (path / "rank_00001.safetensors").touch(), "belong to it: rank_00001"),
        (lambda path: (path / "state.json").unlink(), r"state\.json"),
        (lambda path: (path / "state.json").write_bytes(b""), "not a readable checkpoint"),
        (lambda path: (path / "state.json").write_bytes(b"[1]"), "not a readable checkpoint"),
        (
            lambda path: (path / "state.json").write_text(
                (path / "state.json").read_text().replace('"step": 1', '"step": 2')
            ),
            r"checksum of state\.json",
        ),
    ],
)
def test_damaged_state_is_refused(tmp_path, damage, message):
    path = _save(tmp_path, 1, _tensors())
    damage(path)
    with pytest.raises(CheckpointError, match=f"not a readable checkpoint.*{message}|{message}"):
        load_state(path, blank(_tensors()))
    with pytest.raises(CheckpointError, match="Remove it to continue from an older one"):
        read_tensors(path)


def test_missing_state_is_refused(tmp_path):
    assert latest_state(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="step_000000005: not a readable checkpoint"):
        read_facts(state_path(tmp_path, 5))


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/states: cannot hold states"):
        StateWriter(tmp_path / "file" / "states", keep=1)


@pytest.fixture
def _small_files():
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.usefixtures("_small_files")
def test_failed_write_names_the_last_good_state_and_leaves_it(tmp_path):
    with StateWriter(tmp_path, keep=1) as writer:
        writer.save(1, {"a": torch.zeros(10)}, {})
        writer.save(2, {"a": torch.zeros(100_000)}, {})
        with pytest.raises(CheckpointError, match=r"_000000002.*not be written.*_000000001; free"):
            writer.save(3, {"a": torch.zeros(10)}, {})
        assert names_in(tmp_path) == ["step_000000001"]
        writer.save(3, {"a": torch.zeros(10)}, {}, wait=True)
        with pytest.raises(CheckpointError, match=r"could not be written: .*File too large"):
            writer.save(4, {"a": torch.zeros(100_000)}, {}, wait=True)
    assert names_in(tmp_path) == ["step_000000003"]
    load_state(latest_state(tmp_path), {"a": torch.ones(10)})


@pytest.mark.usefixtures("_small_files")
def test_reason_a_run_ended_comes_before_its_failed_write(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt) as raised,
        StateWriter(tmp_path, keep=1) as writer,
    ):
        writer.save(2, {"a": torch.zeros(100_000)}, {})
        raise KeyboardInterrupt
    assert "could not be written" in raised.value.__notes__[0]
    with (
        pytest.raises(CheckpointError, match="The last good one is none"),
        StateWriter(tmp_path, keep=1) as writer,
    ):
        writer.save(2, {"a": torch.zeros(100_000)}, {})


_FILL_THE_DISK = """
import sys, torch
from pathlib import Path
from dinov3.errors import CheckpointError
from dinov3.state import StateWriter, latest_state, load_state
folder = Path(sys.argv[1])
with StateWriter(folder, keep=2) as writer:
    writer.save(1, {"a": torch.ones(10)}, {})
    try:
        writer.save(2, {"a": torch.ones(500_000)}, {}, wait=True)
    except CheckpointError as error:
        sys.stdout.write(str(error))
assert [path.name for path in folder.iterdir()] == ["step_000000001"]
load_state(latest_state(folder), {"a": torch.zeros(10)})
"""


def test_full_disk_leaves_the_last_good_state(tmp_path):
    own = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run([*own, mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system mounts nothing for its users")
    shell = f'{mount}; exec {sys.executable} -W error -c "$0" {tmp_path}/states'
    done = subprocess.run([*own, shell, _FILL_THE_DISK], capture_output=True, check=True, text=True)
    assert "No space left on device" in done.stdout
    assert "step_000000001; free the disk" in done.stdout


def _killed_at(number, folder):
    """Saves step 2 again, then 3."""
    with StateWriter(folder, keep=2) as writer:
        die_at(number)
        writer.save(2, {"a": torch.tensor([20])}, {"value": 20})
        writer.save(3, {"a": torch.tensor([30])}, {"value": 30})


def _values(folder):
    found = {}
    for path in sorted(folder.glob("step_*")):
        live = {"a": torch.zeros(1, dtype=torch.int64)}
        load_state(path, live)
        assert read_facts(path)["value"] == live["a"].item()
        found[read_facts(path)["step"]] = live["a"].item()
    return found


def test_kill_at_any_moment_leaves_whole_states_only(tmp_path):
    outcomes, exit_code = [], -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        folder = tmp_path / str(len(outcomes))
        for step in (1, 2):
            _save(folder, step, {"a": torch.tensor([step])}, {"value": step})
        child = CHILDREN.Process(target=_killed_at, args=(len(outcomes) + 1, folder))
        child.start()
        child.join()
        exit_code = child.exitcode
        newest = read_tensors(latest_state(folder))["a"].item()
        StateWriter(folder, keep=2).close()
        assert all(name.startswith("step_") for name in names_in(folder))
        values = _values(folder)
        assert newest == values[max(values)]
        outcomes.append(tuple(values.items()))
    assert exit_code == 0
    assert len(outcomes) > 20  # moments looked at
    assert list(dict.fromkeys(outcomes)) == [
        ((1, 1), (2, 2)),
        ((1, 1), (2, 20)),
        ((1, 1), (2, 20), (3, 30)),
        ((2, 20), (3, 30)),
    ]


def test_write_under_way_is_finished_after_sigterm(tmp_path):
    asked = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        with StateWriter(tmp_path, keep=1) as writer:
            writer.save(1, {"a": torch.ones(5_000_000)}, {})
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert asked == [signal.SIGTERM]
    assert read_tensors(state_path(tmp_path, 1))["a"].sum() == 5_000_000
