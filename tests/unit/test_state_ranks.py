"""Resumable state of many ranks: the same bits on any number of them, one outcome for all."""

import json
import resource
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dinov3.errors import CheckpointError, RankLost
from dinov3.state import StateWriter, latest_state, load_state, read_facts, read_tensors
from tests.saved_states import CHILDREN, blank, die_at, flip_a_bit, names_in, same


def _join(folder, rank, size, name):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / name), size), rank=rank, world_size=size
    )


def _run_of(seed, size):
    """Live tensors of a small run under FSDP after a step, and some that it does not make."""
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (size,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    live = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            live[f"optimizer.{name}.{key}"] = value
    live["columns"] = distribute_tensor(torch.randn(2, 7), mesh, [Shard(1)])
    live["whole"] = distribute_tensor(torch.randn(3), mesh, [Replicate()])
    live["ids"] = torch.arange(5) + seed
    live["flag"] = torch.tensor(seed == 0)
    return live


def _whole(live):
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in live.items()
    }


def _refusal(work):
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "no refusal"


def _save_as_two(rank, folder):
    _join(folder, rank, 2, "first")
    live = _run_of(0, 2)
    torch.save(_whole(live), folder / f"expected_{rank}.pt")
    with StateWriter(folder / "two", keep=2) as writer:
        writer.save(1, live, {"by": rank})
        for tensor in live.values():
            tensor.detach().zero_()  # training goes on
        dist.all_reduce(torch.ones(1))  # and so do its collectives
        mesh = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])][rank]  # a learner on each rank
        own = distribute_tensor(torch.full((3,), float(rank)), mesh, [Shard(0)])
        writer.save(2, {f"learner_{rank}.weight": own, "shared": torch.ones(2)}, {})
    dist.destroy_process_group()


def _load_and_save_as_three(rank, folder):
    _join(folder, rank, 3, "second")
    live = _run_of(1, 3)
    load_state(folder / "two" / "step_000000001", live)
    torch.save(_whole(live), folder / f"resharded_{rank}.pt")
    with StateWriter(folder / "three", keep=2) as writer:
        writer.save(2, live, {}, wait=True)
        if rank == 2:  # the disk of one rank is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        written = _refusal(lambda: writer.save(3, live, {}, wait=True))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    path = folder / "three" / "step_000000002"
    lacking = {name: tensor for name, tensor in live.items() if name != "ids"}
    load_state(path, live if rank == 0 else lacking)  # one rank has it: not an extra tensor
    extra = _refusal(lambda: load_state(path, lacking))
    said = [written, extra, _refusal_of_damage(rank, path, live)]
    (folder / f"said_{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _refusal_of_damage(rank, path, live):
    if rank == 0:
        flip_a_bit(path / "rank_00001.safetensors")
    dist.barrier()
    said = _refusal(lambda: load_state(path, live))
    dist.barrier()
    if rank == 0:
        flip_a_bit(path / "rank_00001.safetensors")
    return said


def _load_as_two(rank, folder):
    _join(folder, rank, 2, "third")
    live = _run_of(2, 2)
    load_state(folder / "three" / "step_000000002", live)
    torch.save(_whole(live), folder / f"back_{rank}.pt")
    dist.destroy_process_group()


def _rank_of_many(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if rank < 2:
        _save_as_two(rank, folder)
    _load_and_save_as_three(rank, folder)
    if rank < 2:
        _load_as_two(rank, folder)


@pytest.fixture(scope="module")
def many_ranks(tmp_path_factory):
    """The folder in which worlds of two and three ranks wrote and read."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        _rank_of_many, (folder,), nprocs=3, start_method="forkserver"
    )
    return folder


def test_state_is_the_same_bits_on_other_numbers_of_ranks(many_ranks):
    expected = torch.load(many_ranks / "expected_0.pt")
    assert expected["optimizer.0.weight.step"].shape == ()
    for name in ("resharded_0", "resharded_1", "resharded_2", "back_0", "back_1"):
        assert same(torch.load(many_ranks / f"{name}.pt"), expected), name
    for path in (many_ranks / "two/step_000000001", many_ranks / "three/step_000000002"):
        alone = blank(expected)
        load_state(path, alone)
        assert same(alone, expected)
        assert same(read_tensors(path), expected)


def test_every_rank_writes_its_own_shards_and_the_first_the_facts(many_ranks):
    path = many_ranks / "two/step_000000001"
    assert names_in(path) == ["rank_00000.safetensors", "rank_00001.safetensors", "state.json"]
    assert read_facts(path) == {"by": 0, "step": 1}
    rows = [len(load_file(file)["0.weight"]) for file in sorted(path.glob("*.safetensors"))]
    assert rows == [3, 2]


def test_learners_on_ranks_of_their_own_share_a_state(many_ranks):
    read = read_tensors(many_ranks / "two/step_000000002")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "learner_0.weight": [0.0, 0.0, 0.0],
        "learner_1.weight": [1.0, 1.0, 1.0],
        "shared": [1.0, 1.0],
    }


def test_all_ranks_meet_the_same_failure(many_ranks):
    said = [json.loads((many_ranks / f"said_{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    written, extra, damaged = said[0]
    assert "step_000000003: the checkpoint could not be written: rank 2" in written
    assert "step_000000002; free the disk" in written
    assert "holds tensors that the run lacks, got ids" in extra
    assert "not a readable checkpoint: checksum of rank_00001" in damaged
    assert names_in(many_ranks / "three") == ["step_000000002"]


def _rank_that_outlives(rank, folder):
    torch.set_num_threads(1)
    _join(folder, rank, 2, "store")
    live = distribute_tensor(torch.ones(8), init_device_mesh("cpu", (2,)), [Shard(0)])
    with StateWriter(folder / "states", keep=2) as writer:
        writer.save(1, {"a": live}, {}, wait=True)
        if rank == 1:
            die_at(1)
        with pytest.raises(RankLost, match="another rank is gone") as raised:
            writer.save(2, {"a": live}, {}, wait=True)
        (folder / f"said_{rank}").write_text(str(raised.value))
    dist.destroy_process_group()


def test_death_of_a_rank_while_writing_is_met_by_the_others(tmp_path):
    ranks = [
        CHILDREN.Process(target=_rank_that_outlives, args=(rank, tmp_path)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    said = (tmp_path / "said_0").read_text()
    assert "The last good one is" in said
    assert "look at what that rank said" in said
    assert "free the disk" not in said
    assert names_in(tmp_path / "states") == ["step_000000001"]
    assert read_tensors(latest_state(tmp_path / "states"))["a"].sum() == 8
