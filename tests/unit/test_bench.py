"""The benchmarks measure what they say: the trainer's own steps, at toy size here."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from dinov3.bench import DrawnImages
from dinov3.bench.__main__ import main
from dinov3.bench.against import step_against
from dinov3.bench.checkpoints import checkpoint_stall
from dinov3.bench.distillation import Shape, distillation_ratio
from dinov3.bench.rounds import times_in_turns
from dinov3.errors import ConfigError
from dinov3.recipe import load_recipe
from dinov3.state import latest_state, read_tensors
from dinov3.train.timing import PARTS, Clock, step_split

WIDE, NARROW = Shape(128, 3, 2), Shape(32, 1, 1)


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split():
    return step_split(load_recipe("smoke_cpu"), DrawnImages(8, 48), num_steps=2)


def test_the_parts_of_a_step_make_up_the_whole(split):
    assert sum(split[part] for part in PARTS) == pytest.approx(1)
    assert all(split[part] > 0 for part in PARTS)


def test_images_per_second_are_those_of_the_steps(split):
    size = load_recipe("smoke_cpu").optim.batch_size
    assert split["images_per_second"] * split["seconds_per_step"] == pytest.approx(size)


def test_the_parts_are_those_of_the_trainers_step_with_a_gram_teacher_too():
    config = load_recipe("smoke_cpu", ["gram.teacher=ema@0"], phase="gram")
    found = step_split(config, DrawnImages(8, 48), num_steps=1)
    assert sum(found[part] for part in PARTS) == pytest.approx(1)


def test_a_clock_counts_what_it_stands_around_and_nothing_else():
    class Worker:
        def work(self, value):
            return 2 * value

        def rest(self):
            return None

    worker, clock = Worker(), Clock()
    clock.watch(worker, "work", "work")
    assert (worker.work(3), worker.rest()) == (6, None)
    assert list(clock.seconds) == ["work"]


def test_sides_take_turns_after_one_round_to_warm_up():
    calls = []
    sides = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    found = times_in_turns(sides, num_rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}


def test_the_teachers_share_of_the_work_is_counted():
    """Together a step costs T + 2S, two runs 2T + 2S, in floating-point operations."""
    wide = distillation_ratio(WIDE, NARROW, batch_size=2, num_rounds=1)
    narrow = distillation_ratio(NARROW, NARROW, batch_size=2, num_rounds=1)
    for found in (wide, narrow):
        share = found["teacher_flops_per_student"]
        assert found["ratio_of_flops"] == pytest.approx((share + 2) / (2 * share + 2))
        assert found["ratio"] > 0
    assert wide["teacher_flops_per_student"] > 3 * narrow["teacher_flops_per_student"]


def test_states_are_written_while_steps_are_timed(tmp_path):
    found = checkpoint_stall(
        load_recipe("smoke_cpu"), DrawnImages(8, 48), tmp_path, num_saves=2, steps_between=2
    )
    assert found.keys() >= {"stall_share", "waiting_share", "next_step"}
    assert all(value > 0 for value in found.values())
    state = latest_state(tmp_path)
    assert state is not None
    assert read_tensors(state, "ema.backbone.")


def test_the_command_line_refuses_in_a_sentence(capsys):
    assert main(["--against", "no-such-commit"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("dinov3.bench: --against: git worktree add failed")
    assert not said.out


def git(folder, *arguments):
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    command = ["git", "-C", str(folder), *who, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def write_benchmark(checkout: Path, source: str) -> None:
    package = checkout / "dinov3"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "bench.py").write_text(source)


def printing(seconds):
    content = {"training step": {"seconds_per_step": seconds}}
    return f"import sys\nassert sys.argv[1:] == ['step']\nprint({json.dumps(content)!r})\n"


@pytest.fixture
def checkout(tmp_path):
    """A project whose last commit takes 2 seconds per step, and whose working tree takes 1."""
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet")
    write_benchmark(root, printing(2.0))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "slow")
    write_benchmark(root, printing(1.0))
    return root


def test_a_step_is_compared_with_another_commits_own(checkout):
    found = step_against("HEAD", checkout=checkout, num_rounds=2)
    assert found["here_for_there"] == pytest.approx(0.5)
    assert found["rounds"] == {"here": [1.0, 1.0], "there": [2.0, 2.0]}
    trees = subprocess.run(
        ["git", "-C", str(checkout), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(trees.stdout.splitlines()) == 1


def test_an_unknown_commit_is_refused(checkout):
    with pytest.raises(ConfigError, match=r"--against: git worktree add failed, got .*no-such"):
        step_against("no-such", checkout=checkout)


def test_a_commit_without_such_a_benchmark_is_refused(checkout):
    write_benchmark(checkout, "import no_such_module")
    git(checkout, "commit", "--quiet", "-am", "broken")
    write_benchmark(checkout, printing(1.0))
    with pytest.raises(ConfigError, match=r"no seconds per step from .*no_such_module"):
        step_against("HEAD", checkout=checkout, num_rounds=1)
