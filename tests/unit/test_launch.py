"""A started command ends with all its descendants, whoever ends it."""

import os
import select
import signal
import subprocess
import sys

import psutil
import pytest

from dinov3.launch import die_with_parent, is_running, process_tree, start, stop, stop_tree

# prints its pid and that of a child in another session, then sleeps; a signal is written down
PROGRAM = """
import os, signal, subprocess, sys, time
def note(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if sys.argv[1] == "saves":
        sys.exit(7)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
child = subprocess.Popen([sys.executable, "-c", ignore], **quiet)
with open(sys.argv[2], "w") as fifo:
    fifo.write(f"{os.getpid()} {child.pid}")
while True:
    time.sleep(600)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's prctl")


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "pids"
    os.mkfifo(path)
    return path


def pids(fifo):
    return [psutil.Process(int(pid)) for pid in fifo.read_text().split()]


@pytest.mark.parametrize("manner", ["saves", "deaf"])
def test_stop_leaves_nothing_after_one_polite_signal(tmp_path, fifo, manner):
    with (tmp_path / "output").open("w+b") as output:
        command = [sys.executable, "-c", PROGRAM, manner, str(fifo)]
        process = start(command, output=output, grace=0.5)
        family = pids(fifo)
        assert family[1] in process_tree(process.pid)
        stop(process, grace=0.5)
        assert [is_running(one) for one in family] == [False, False]
        output.seek(0)
        assert output.read() == b"SIGINT\n"
    assert process.returncode == 130


def test_guard_gives_back_exit_code_and_output(tmp_path):
    with (tmp_path / "output").open("w+b") as output:
        code = "import os, sys; print(os.getcwd(), os.environ['X']); sys.exit(5)"
        command = [sys.executable, "-c", code]
        process = start(command, output=output, cwd=tmp_path, env={"X": "y"})
        assert process.wait() == 5
        output.seek(0)
        assert output.read().decode() == f"{tmp_path} y\n"


@linux
def test_command_that_ends_takes_its_orphans_along(tmp_path, fifo):
    orphaning = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], "saves", {str(fifo)!r}])
open({str(fifo.with_name("seen"))!r}).read()
"""
    os.mkfifo(fifo.with_name("seen"))
    with (tmp_path / "output").open("w+b") as output:
        process = start([sys.executable, "-c", orphaning, PROGRAM], output=output, grace=0.5)
        family = pids(fifo)
        fifo.with_name("seen").write_text("")
        assert process.wait() == 0
    assert [is_running(one) for one in family] == [False, False]


@linux
def test_command_of_a_killed_parent_ends(tmp_path, fifo):
    parent = f"""
import sys
from dinov3.launch import start
with open({str(tmp_path / "output")!r}, "wb") as output:
    command = [sys.executable, "-c", sys.argv[1], "saves", {str(fifo)!r}]
    start(command, output=output, grace=0.5).wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent, PROGRAM])
    family = [os.pidfd_open(one.pid) for one in pids(fifo)]
    process.kill()
    process.wait()
    ended = [bool(select.select([one], [], [], 60)[0]) for one in family]
    for one in family:
        os.close(one)
    assert ended == [True, True]
    assert (tmp_path / "output").read_text() == "SIGINT\n"


def test_stop_tree_of_a_process_that_is_gone_returns():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stop_tree(process.pid, grace=0)
    assert process_tree(process.pid) == set()


def test_zombie_counts_as_ended():
    process = subprocess.Popen(["sleep", "600"])
    child = psutil.Process(process.pid)
    assert is_running(child)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(child)
    process.wait()


def test_command_started_by_hand_outlives_its_parent(monkeypatch):
    """Without dvc nothing watches: no thread is started."""
    import threading

    monkeypatch.delenv("DVC_STAGE", raising=False)
    before = threading.active_count()
    die_with_parent()
    assert threading.active_count() == before
