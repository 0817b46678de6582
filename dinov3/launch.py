"""Start a command so that nothing of it outlives us, and stop it as Ctrl-C in a shell would.

    python -m dinov3.launch --parent PID --grace SECONDS -- COMMAND …

is the guard that `start` puts between us and the command: it stops the whole tree, other sessions
included, when it is asked to, when the command ends, and when its parent dies, be it by kill -9.
Every process gets one polite signal only: a trainer saves on the first and dies of the second.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

ORCHESTRATED = "DVC_STAGE"  # dvc sets it for every command of a stage
DEFAULT_GRACE = 20.0  # seconds in which a stopped trainer writes its checkpoint
INTERRUPTED = 130

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL = 0.05  # seconds between two looks at a tree that is ending
_SETTLE = 5.0  # seconds dvc has to end by itself after its command was killed
_FOLLOW = 0.5  # seconds between two looks at the dvc that runs us
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Stopped(BaseException):
    """The guard was asked to stop, or its parent died."""


def die_with_parent() -> None:
    """Sends us SIGTERM when the dvc that runs us dies; no-op for a command started by hand.

    A stage calls it first thing. The kernel's own signal for this would miss: between dvc and us
    may stand a shell that outlives it. By hand (`nohup … &`) a run shall outlive its terminal.
    """
    if ORCHESTRATED not in os.environ:
        return
    for ancestor in psutil.Process().parents():
        if _is_dvc(ancestor):
            threading.Thread(target=_follow, args=(ancestor,), daemon=True).start()
            return


def start(
    command: Sequence[str],
    *,
    output: IO[bytes],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    grace: float = DEFAULT_GRACE,
) -> subprocess.Popen[bytes]:
    """Starts a command under a guard, in its own session.

    Args:
        command: Program and arguments.
        output: Takes stdout and stderr; a file, so that a reader's death breaks no writer.
        cwd: Folder to run in.
        env: The whole environment, None for ours.
        grace: Seconds between the polite signal and the kill.
    """
    guard = [sys.executable, "-P", str(Path(__file__).resolve())]  # -P: names of ours hide nobody's
    settings = ["--parent", str(os.getpid()), "--grace", str(grace)]
    return subprocess.Popen(
        [*guard, *settings, "--", *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes], grace: float = DEFAULT_GRACE) -> None:
    """Stops what `start` started and returns when no process of it is left."""
    tree = process_tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        # the guard stops the rest; it alone knows who was signalled
        process.wait(grace + 2 * _SETTLE)
    _kill(tree)
    process.wait()


def stop_tree(pid: int, grace: float = DEFAULT_GRACE, *, itself: bool = True) -> None:
    """Interrupts a process and all its descendants, waits, then kills who is left.

    Args:
        pid: Root of the tree.
        grace: Seconds between the interrupt and the kill.
        itself: False spares the root.
    """
    asked: set[psutil.Process] = set()
    deadline, spares_dvc = time.monotonic() + grace, True
    while tree := _living(process_tree(pid, itself=itself) | asked):
        if time.monotonic() > deadline:
            _kill(one for one in tree if not (spares_dvc and _is_dvc(one)))
            deadline, spares_dvc = time.monotonic() + _SETTLE, False
        for process in tree - asked:
            if not _waits(process):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGINT)
        asked |= tree
        time.sleep(_POLL)


def process_tree(pid: int, *, itself: bool = True) -> set[psutil.Process]:
    """A process and its descendants in whatever session or group; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return {*root.children(recursive=True), *([root] if itself else [])}
    except psutil.NoSuchProcess:
        return set()


def is_running(process: psutil.Process) -> bool:
    """False also for a zombie, which a parent that does not reap can keep for ever."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _waits(process: psutil.Process) -> bool:
    """A dvc whose command runs ends by itself after that, and leaves its lock files whole."""
    try:
        return _is_dvc(process) and bool(process.children())
    except psutil.Error:
        return False


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return "dvc" in {Path(word).name for word in process.cmdline()[:3]}
    except psutil.Error:
        return False


def _follow(leader: psutil.Process) -> None:
    while is_running(leader):
        time.sleep(_FOLLOW)
    os.kill(os.getpid(), signal.SIGTERM)


def _living(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    return {process for process in processes if is_running(process)}


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in _living(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def tie_to(parent: int, number: int = signal.SIGTERM) -> None:
    """Dies with `parent`, also when that happened before the kernel was told."""
    if not sys.platform.startswith("linux"):
        return
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _guard(command: Sequence[str], *, parent: int, grace: float) -> int:
    try:
        for number in _STOPPING:
            signal.signal(number, _raise_stopped)
        if sys.platform.startswith("linux"):
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become ours
        tie_to(parent)
        guard = os.getpid()
        child = subprocess.Popen(command, preexec_fn=lambda: _prepare_child(guard))
        return _exit_code(child.wait())
    except _Stopped:
        return INTERRUPTED
    finally:
        for number in _STOPPING:
            signal.signal(number, signal.SIG_IGN)
        stop_tree(os.getpid(), grace, itself=False)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    for stopping in _STOPPING:
        signal.signal(stopping, signal.SIG_IGN)
    raise _Stopped


def _prepare_child(guard: int) -> None:
    """Runs between fork and exec; the guard has one thread, so this is safe."""
    for number in _STOPPING:  # a background shell hands down an ignored SIGINT
        signal.signal(number, signal.SIG_DFL)
    tie_to(guard)


def _exit_code(returned: int) -> int:
    return returned if returned >= 0 else 128 - returned


def main(arguments: Sequence[str] | None = None) -> int:
    """The guard's command line."""
    parser = argparse.ArgumentParser(prog="python -m dinov3.launch")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="die with this process")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE, help="seconds before a kill")
    parser.add_argument("command", nargs="+")
    given: Any = parser.parse_args(arguments)
    return _guard(given.command, parent=given.parent, grace=given.grace)


if __name__ == "__main__":
    sys.exit(main())
