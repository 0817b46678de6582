"""Starts the ranks of a run on this machine through torchrun, and says why they ended.

    command ──► launcher: this module as a program, torchrun in it ──► rank, rank, …

Whoever stops a job may signal every process of it. So the command alone passes SIGINT and SIGTERM
on, once to each rank, and the launcher is deaf to them: torchrun would kill ranks that still save.
The launcher dies with the command, and a rank saves and ends when its launcher is gone.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from dinov3.errors import Interrupted, RankLost
from dinov3.launch import tie_to
from dinov3.release.atomic import atomic_write

_REPORTS = "DINOV3_RANK_REPORTS"  # folder in which ranks and launcher say how they ended
_LAUNCHER = "DINOV3_RANK_LAUNCHER"  # its process
_ENDS = "ends.json"  # exit codes of the ranks that failed, as torchrun saw them
_POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL = 0.05  # seconds between two looks for ranks that have not been told to stop
_GO_ON = "The same command goes on from the last checkpoint."


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Runs `python -m dinov3 ARGUMENTS` in so many ranks; returns the exit code of the whole.

    One rank that fails takes the others down with it. The reason goes to stderr. On SIGINT or
    SIGTERM the ranks save; on a second they are killed.
    """
    with tempfile.TemporaryDirectory(prefix="dinov3-ranks-") as folder:
        parent = os.getpid()
        process = subprocess.Popen(
            [sys.executable, "-m", "dinov3.ranks", str(num_ranks), *arguments],
            env={**os.environ, _REPORTS: folder, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _tie_launcher(parent),
        )
        with _passing_on(process) as received:
            returned = process.wait()
        if returned == 0:
            return 0
        code, reason = _explain(Path(folder), stopped=bool(received))
    sys.stderr.write(f"dinov3: {reason}\n")
    return code


def join_ranks() -> None:
    """A rank's part: ends when its launcher is gone."""
    if is_rank():
        tie_to(int(os.environ.get(_LAUNCHER, os.getppid())))


def report_end(code: int, message: str) -> None:
    """Ends a rank that `run_ranks` started: the command says why. Returns in any other process."""
    folder = os.environ.get(_REPORTS)
    if folder is not None and is_rank():
        text = json.dumps({"code": code, "message": message, "time": time.time()})
        with contextlib.suppress(OSError):  # the reader may be gone already
            atomic_write(Path(folder) / f"rank_{os.environ['RANK']}.json", text.encode())
        raise SystemExit(code)


def _tie_launcher(parent: int) -> None:
    """Runs between fork and exec."""
    for number in _POLITE:
        signal.signal(number, signal.SIG_IGN)
    tie_to(parent, signal.SIGKILL)


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the ranks; gives the signals received so far."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        to_ranks = signal.SIGTERM if len(received) == 1 else signal.SIGKILL
        threading.Thread(target=_tell_ranks, args=(process, to_ranks), daemon=True).start()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_ranks(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Signals each rank once, also those still to be started, until the job has ended."""
    told: set[psutil.Process] = set()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for rank in set(psutil.Process(process.pid).children()) - told:
                # between fork and exec a child is still as deaf as the launcher
                if "dinov3" in rank.cmdline():
                    rank.send_signal(number)
                    told.add(rank)
        time.sleep(_POLL)


def _explain(folder: Path, *, stopped: bool) -> tuple[int, str]:
    """Exit code and reason: what happened first, before what followed from it."""
    reports = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    reports.sort(key=lambda report: report["time"])
    ends = folder / _ENDS
    codes = (
        {int(r): code for r, code in json.loads(ends.read_text()).items()} if ends.exists() else {}
    )
    silent = {r: code for r, code in codes.items() if not (folder / f"rank_{r}.json").exists()}
    for report in reports:
        if report["code"] not in (2, RankLost.exit_code):
            return report["code"], report["message"]
    # a rank that lost another one speaks too: what it says comes last
    reports.sort(key=lambda report: (report["code"] == RankLost.exit_code, report["time"]))
    if stopped:
        if reports and reports[0]["code"] != RankLost.exit_code:
            return reports[0]["code"], reports[0]["message"]  # what it was asked to save is lost
        return Interrupted.exit_code, f"interrupted. {_GO_ON}"
    if found := _silent_end(silent):
        return 2, found
    if reports:
        return 2, reports[0]["message"]
    return 2, f"the ranks ended without a word, perhaps killed. {_GO_ON}"


def _silent_end(codes: Mapping[int, int]) -> str | None:
    """What became of a rank that could not say so itself; torchrun ends others by SIGTERM."""
    for rank, code in codes.items():
        if code < 0 and -code != signal.SIGTERM:
            name = signal.Signals(-code).name
            why = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"rank {rank} was killed by {name}{why}. {_GO_ON}"
    for rank, code in codes.items():
        if code > 0:
            return f"rank {rank} failed with exit code {code}; its traceback is above. {_GO_ON}"
    return None


def _launch(num_ranks: str, arguments: Sequence[str]) -> int:
    """The launcher: torchrun, without its own words on stderr."""
    for number in _POLITE:  # unlike an ignored signal, a handler is not handed down to the ranks
        signal.signal(number, lambda number, frame: None)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)
    os.environ[_LAUNCHER] = str(os.getpid())
    own = ["--standalone", "--nproc-per-node", num_ranks, "--signals-to-handle", "SIGQUIT"]
    try:
        run.main([*own, "-m", "dinov3", *arguments])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        atomic_write(Path(os.environ[_REPORTS]) / _ENDS, json.dumps(codes).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1], sys.argv[2:]))
