"""Training on several ranks: the same numbers as on one, and an end that leaves nothing behind."""

import json
import signal
import sys

import psutil
import pytest

from dinov3.checkpoint import load_tensors
from dinov3.errors import RankLost
from dinov3.release.record import read_record
from tests.flow.forks import Fork, fork, fork_ranks, run_on

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG"
)

STEPS = 20
LENGTH = (f"schedules.num_steps={STEPS}", "run.checkpoint_every=2")
# a Gram matrix of a crop or a batch is not a mean over images: what of it is shared is named here
OVERRIDES = {
    "pretrain": (*LENGTH, "schedules.lr.peak=1e-3"),
    "gram": (*LENGTH, "gram.image_level=false"),
    "highres": (*LENGTH, "gram.image_level=false", "gram.tokens=masked"),
    "distill": LENGTH,
    "dinotxt": LENGTH,
}
PHASES = tuple(OVERRIDES)
NOT_NUMBERS = ("time", "wait_fraction")


def numbers(output):
    """All logged numbers by log, step and name."""
    found = {}
    for path in sorted(output.rglob("events.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            step = event.pop("step")
            place = path.parent.relative_to(output).as_posix()
            found |= {
                (place, step, name): value
                for name, value in event.items()
                if name not in NOT_NUMBERS
            }
    return found


def assert_close(output, expected, tolerance):
    """Losses to the tolerance; norms and health, which magnify their rounding, to ten times it."""
    one, other = numbers(output), numbers(expected)
    assert one.keys() == other.keys()
    far = {}
    for (place, step, name), value in one.items():
        expected_value = other[place, step, name]
        allowed = tolerance * (10 if "/" in name else 1) * (1 + abs(expected_value))
        if abs(value - expected_value) > allowed:
            far[place, step, name] = (value, expected_value)
    assert not far


def assert_same_weights(output, expected, tolerance):
    files = sorted(expected.rglob("*.safetensors"))
    assert files
    for path in files:
        one, other = load_tensors(output / path.relative_to(expected)), load_tensors(path)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.shape == other[name].shape
            assert tensor.dtype == other[name].dtype
            assert (tensor.double() - other[name].double()).abs().max() < tolerance, name


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    """Output of a whole run of a phase on so many ranks, trained when first asked for."""
    outputs = {}

    def get(phase, num_ranks):
        if (phase, num_ranks) not in outputs:
            output = tmp_path_factory.mktemp("trained") / f"{phase}_{num_ranks}"
            done = run_on(num_ranks, *chain.training(phase, output, *OVERRIDES[phase]))
            assert done.returncode == 0, done.stderr
            outputs[phase, num_ranks] = output
        return outputs[phase, num_ranks]

    return get


@pytest.mark.parametrize("phase", PHASES)
def test_two_ranks_train_what_one_does(trained, phase):
    one, two = trained(phase, 1), trained(phase, 2)
    assert_close(two, one, 1e-5)
    assert_same_weights(two, one, 1e-5)


@pytest.mark.parametrize(
    "phase", ["pretrain", *(pytest.param(one, marks=pytest.mark.slow) for one in PHASES[1:])]
)
def test_micro_batches_train_what_the_whole_batch_does(chain, trained, tmp_path, phase):
    arguments = chain.training(phase, tmp_path / "parts", *OVERRIDES[phase], "run.micro_batches=2")
    done = fork(*arguments)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "parts", trained(phase, 1), 1e-5)
    assert_same_weights(tmp_path / "parts", trained(phase, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_micro_batches_on_two_ranks_train_what_the_whole_batch_does(
    chain, trained, tmp_path, phase
):
    arguments = chain.training(phase, tmp_path / "parts", *OVERRIDES[phase], "run.micro_batches=2")
    done = run_on(2, *arguments)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "parts", trained(phase, 1), 1e-5)


@pytest.mark.slow
def test_two_ranks_for_each_of_two_students_train_what_one_does(chain, trained, tmp_path):
    done = run_on(4, *chain.training("distill", tmp_path / "four", *OVERRIDES["distill"]))
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "four", trained("distill", 1), 1e-5)
    assert_same_weights(tmp_path / "four", trained("distill", 1), 1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    "phase", ["pretrain", *(pytest.param(one, marks=pytest.mark.slow) for one in PHASES[1:])]
)
def test_run_goes_on_on_another_number_of_ranks(chain, trained, tmp_path, phase, before, after):
    arguments = chain.training(phase, tmp_path / "moved", *OVERRIDES[phase])
    stopped = run_on(before, *arguments, signal_at=("step 7/", signal.SIGTERM))
    assert stopped.returncode == 130
    again = run_on(after, *arguments)
    assert again.returncode == 0, again.stderr
    assert "continuing at step 7" in again.stderr
    assert_close(tmp_path / "moved", trained(phase, 1), 1e-5)
    assert_same_weights(tmp_path / "moved", trained(phase, 1), 1e-5)


def test_finished_run_is_extended_on_two_ranks(world, trained, tmp_path):
    short = trained("pretrain", 2)
    state = short.parent / ".state" / "pretrained_checkpoint" / "finished" / f"step_{STEPS:09d}"
    more = (*OVERRIDES["pretrain"], f"schedules.num_steps={STEPS + 4}")
    ends = []
    for num_ranks in (1, 2):
        output = tmp_path / str(num_ranks) / "pretrained_checkpoint"
        done = run_on(num_ranks, *world.training(output, *more), "--resume", state)
        assert done.returncode == 0, done.stderr
        assert "resume" in {edge.role for edge in read_record(output / "record.json").inputs}
        ends.append(output)
    assert_close(ends[1], ends[0], 1e-5)


def start_job(chain, output):
    """The very command a user gives, which starts two ranks itself."""
    return Fork(*chain.training("pretrain", output, *OVERRIDES["pretrain"], "run.processes=2"))


def processes_of(job):
    """The launcher, and the ranks in their order, once they train."""
    (launcher,) = psutil.Process(job.pid).children()
    ranks = [one for one in launcher.children() if "dinov3" in one.cmdline()]
    return launcher, sorted(ranks, key=lambda one: int(one.environ()["RANK"]))


def assert_ended(processes):
    psutil.wait_procs(processes)
    assert not any(one.is_running() for one in processes)


def go_on(chain, output, expected):
    """The next start, on two ranks."""
    again = run_on(2, *chain.training("pretrain", output, *OVERRIDES["pretrain"]))
    assert again.returncode == 0, again.stderr
    assert "continuing at step" in again.stderr
    assert_close(output, expected, 1e-6)
    assert_same_weights(output, expected, 1e-6)


def test_killed_rank_takes_the_job_down_with_one_sentence(chain, trained, tmp_path):
    job = start_job(chain, tmp_path / "out")
    job.until("step 5/")
    launcher, ranks = processes_of(job)
    ranks[1].kill()
    end = job.wait()
    assert end.returncode == 2
    said = [line for line in end.stderr.splitlines() if not line.startswith(("step", "training"))]
    assert said == [
        "dinov3: rank 1 was killed by SIGKILL (out of memory?). "
        "The same command goes on from the last checkpoint."
    ]
    assert_ended([launcher, *ranks])
    go_on(chain, tmp_path / "out", trained("pretrain", 2))


@pytest.mark.parametrize("who", ["command", pytest.param("launcher", marks=pytest.mark.slow)])
def test_killed_command_leaves_no_rank_behind(chain, trained, tmp_path, who):
    job = start_job(chain, tmp_path / "out")
    job.until("step 5/")
    launcher, ranks = processes_of(job)
    {"command": psutil.Process(job.pid), "launcher": launcher}[who].kill()
    assert job.wait().returncode == {"command": -signal.SIGKILL, "launcher": 2}[who]
    assert_ended([launcher, *ranks])
    go_on(chain, tmp_path / "out", trained("pretrain", 2))


def test_rank_that_loses_another_says_so_in_one_sentence(chain, tmp_path):
    """Also under a torchrun of the user's own, whose ranks nobody explains."""
    arguments = chain.training("pretrain", tmp_path / "out", *LENGTH, "run.checkpoint_every=20")
    first, second = fork_ranks(2, *arguments, signal_at=("step 3/", signal.SIGKILL))
    assert first.wait().returncode == -signal.SIGKILL
    end = second.wait()
    assert end.returncode == RankLost.exit_code
    assert end.stderr.startswith("dinov3: rank 1: another rank is gone, got ")
    assert end.stderr.count("\n") == 1


@pytest.mark.slow
def test_second_signal_ends_ranks_that_hang(chain, tmp_path):
    job = start_job(chain, tmp_path / "out")
    job.until("step 5/")
    launcher, ranks = processes_of(job)
    for rank in ranks:
        rank.suspend()
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGINT)
    assert job.wait().returncode == 130
    assert_ended([launcher, *ranks])


@pytest.mark.parametrize(
    ("number", "whole"),
    [
        (signal.SIGTERM, False),
        (signal.SIGINT, True),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_stopped_job_saves_and_goes_on(chain, trained, tmp_path, number, whole):
    """Also where each of its processes gets the signal, as an orchestrator or a scheduler does."""
    job = start_job(chain, tmp_path / "out")
    job.until("step 5/")
    launcher, ranks = processes_of(job)
    job.send_signal(number)
    for process in (launcher, *ranks) if whole else ():
        process.send_signal(number)
    end = job.wait()
    assert end.returncode == 130
    assert end.stderr.count("run the same command to go on") == 1
    assert "Traceback" not in end.stderr
    assert_ended([launcher, *ranks])
    go_on(chain, tmp_path / "out", trained("pretrain", 2))


def test_error_in_the_ranks_is_one_sentence(chain, tmp_path):
    arguments = chain.training("pretrain", tmp_path / "out", "run.processes=2")
    done = fork(*arguments, "optim.batch_size=7")
    assert done.returncode == 2
    assert done.stderr == ("dinov3: batch_size: 2 ranks do not divide it, got 7. Use a multiple.\n")
    assert not (tmp_path / "out").exists()


def test_wrong_recipe_value_is_one_sentence_before_any_rank_starts(chain, tmp_path):
    arguments = chain.training("pretrain", tmp_path / "out", "run.processes=2")
    done = fork(*arguments, "optim.batch_size=few")
    assert done.returncode == 2
    assert done.stderr.startswith("dinov3: recipe smoke_cpu: optim.batch_size: ")
    assert done.stderr.count("\n") == 1


def test_error_of_the_run_in_ranks_has_its_exit_code(chain, tmp_path):
    """Two ranks diverge; the sentence and the dump are those of one."""
    wild = ("schedules.lr.peak=1e38", "schedules.lr.warmup_steps=0")
    done = run_on(2, *chain.training("pretrain", tmp_path / "out", *wild))
    assert done.returncode == 3
    assert done.stderr.count("nothing of it was updated") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["health.json"]
