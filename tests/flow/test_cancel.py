"""However a run ends, nothing of it is left, and the next one goes on."""

import contextlib
import os
import select
import signal
import subprocess
import sys

import dagster as dg
import psutil
import pytest

from orchestration.lock import read_lock
from orchestration.stages import CHECKOUT
from orchestration.versions import dvc_lock_sensor
from tests.flow.project import DVC, Project, environment
from tests.flow.test_doors import DEFINITIONS

GRACE = 3.0
ALLOWED = 60.0  # seconds in which the kernel must have told of every end, on a crowded machine

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG and pidfds"
)


@pytest.fixture
def project(tmp_path):
    made = Project.create(tmp_path / "project")
    os.mkfifo(made.root / "pids.fifo")
    yield made
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(made.root):
                process.kill()  # what a failed test left


def materialize(project, *keys):
    command = [sys.executable, "-m", "tests.flow.project", str(project.root), str(GRACE), *keys]
    output = (project.root / "worker.log").open("wb")
    with output:
        return subprocess.Popen(command, cwd=CHECKOUT, stdout=output, stderr=output)


def running_pids(project, worker):
    """Pids of the stage and of its child in another session, once both run."""
    ended = os.pidfd_open(worker.pid)
    pipe = os.open(project.root / "pids.fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready, _, _ = select.select([pipe, ended], [], [])
        assert pipe in ready, (project.root / "worker.log").read_text()
        stage, rank = os.read(pipe, 100).split()
    finally:
        os.close(pipe)
        os.close(ended)
    return int(stage), int(rank)


def is_gone(pidfd):
    """Whether a process ends; a zombie has ended."""
    ready, _, _ = select.select([pidfd], [], [], ALLOWED)
    os.close(pidfd)
    return bool(ready)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("mode", ["wait", "deaf"])
def test_stopped_step_leaves_no_process_and_saves_once(project, number, mode):
    project.set_modes(first=mode)
    worker = materialize(project, "first")
    watched = [os.pidfd_open(pid) for pid in running_pids(project, worker)]
    worker.send_signal(number)
    assert [is_gone(one) for one in watched] == [True, True]
    worker.wait()
    assert (project.root / "saved.txt").read_text() == "SIGINT\n"  # the second would not save

    project.set_modes()
    project.dvc("repro")


def test_cancelled_stage_of_two_artifacts_leaves_neither(project):
    project.dvc("repro", "second")
    project.set_modes(pair="wait")
    worker = materialize(project, "pair_one", "pair_two")
    watched = [os.pidfd_open(pid) for pid in running_pids(project, worker)]
    worker.send_signal(signal.SIGTERM)
    assert [is_gone(one) for one in watched] == [True, True]
    worker.wait()
    assert not (project.root / "data" / "pair").exists()
    assert "pair" not in read_lock(project.root)

    project.set_modes()
    project.dvc("repro")


def test_killed_dvc_takes_its_stage_along(project):
    project.set_modes(first="wait")
    with (project.root / "worker.log").open("wb") as said:
        dvc = subprocess.Popen(
            [DVC, "repro", "first"],
            cwd=project.root,
            env=environment(),
            stdout=said,
            stderr=said,
        )
    stage, _ = running_pids(project, dvc)
    watched = os.pidfd_open(stage)
    dvc.kill()
    assert is_gone(watched)
    dvc.wait()
    assert (project.root / "saved.txt").read_text() == "SIGTERM\n"


def test_run_killed_with_its_daemon_does_not_keep_the_sensor_silent(project, tmp_path):
    """Nobody is left to say that it ended: Dagster calls it running for ever."""
    home = tmp_path / "dagster home"
    home.mkdir()
    (home / "dagster.yaml").write_text((CHECKOUT / "orchestration" / "dagster.yaml").read_text())
    (project.root / "definitions.py").write_text(DEFINITIONS)
    env = {**environment(), "DAGSTER_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", "first"]
    project.set_modes(first="wait")
    with (project.root / "worker.log").open("wb") as said:
        worker = subprocess.Popen(
            [*command, "-f", "definitions.py"], cwd=project.root, env=env, stdout=said, stderr=said
        )
    watched = [os.pidfd_open(pid) for pid in running_pids(project, worker)]
    sensor = dvc_lock_sensor(project.pipeline)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        (project.root / "dvc.lock").write_text('schema: "2.0"\nstages: {}\n')
        with dg.build_sensor_context(instance=instance) as context:
            assert "A run is on its way" in sensor(context).skip_message
            worker.kill()
            worker.wait()
            assert [is_gone(one) for one in watched] == [True, True]
            project.set_modes()
            project.dvc("repro", "first")
            assert "raw_images, first" in sensor(context).skip_message
        (run,) = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.STARTED
