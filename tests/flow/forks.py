"""Verbs of the command line in forks of one process that has the slow imports behind it.

A fork is a process of its own that runs what `python -m dinov3` runs: it takes signals, writes to
its own stderr and ends with its own exit code; only the seconds of importing are saved.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tests.saved_states import CHILDREN

CHILDREN.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.optim",
        "torch.utils.tensorboard",
        "dinov3.cli",
        "dinov3.curation.curate",
        "dinov3.curation.embed",
        "dinov3.curation.manifest",
        "dinov3.state",
        "dinov3.train.distill",
        "dinov3.train.phases",
        "dinov3.train.text_alignment",
    ]
)


class _Tripwire:
    """A stderr that sends its own process a signal right after some words: always the same step."""

    def __init__(self, stream: TextIO, words: str, number: signal.Signals) -> None:
        self._stream, self._words, self._number = stream, words, number

    def write(self, text: str) -> int:
        """Writes, then acts."""
        written = self._stream.write(text)
        self._stream.flush()
        if self._words in text:
            os.kill(os.getpid(), self._number)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _enter(arguments, environment, writer, prepare, signal_at) -> None:
    from dinov3.__main__ import main

    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    os.environ.update(environment)
    sys.argv = ["dinov3", *arguments]
    if signal_at is not None:
        sys.stderr = _Tripwire(sys.stderr, *signal_at)
    if prepare is not None:
        prepare()
    sys.exit(main())


class Fork:
    """A verb that runs; what it says on stdout and stderr comes as one stream."""

    def __init__(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        signal_at: tuple[str, signal.Signals] | None = None,
    ) -> None:
        """Starts it.

        Args:
            arguments: Verb, its arguments and options.
            environment: Laid over ours.
            prepare: Called in the fork before anything else.
            signal_at: A signal that the fork gets right after it has said some words.
        """
        reader, writer = CHILDREN.Pipe(duplex=False)
        words = list(map(str, arguments))
        given = (words, dict(environment or {}), writer, prepare, signal_at)
        self._process = CHILDREN.Process(target=_enter, args=given, daemon=False)
        self._process.start()
        writer.close()
        self._stream = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.said = ""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def lines(self) -> Iterator[str]:
        """What it says, line by line, until it and all it started have ended."""
        for line in self._stream:
            self.said += line
            yield line

    def until(self, pattern: str) -> str:
        """Reads on to the first line that begins so; what was said before is in `said`."""
        for line in self.lines():
            if re.match(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} was never said:\n{self.said}")

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing to a process that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Reads to the end; the exit code is negative for a signal."""
        for _ in self.lines():
            pass
        self._stream.close()
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        return subprocess.CompletedProcess([], code, "", self.said)


def fork(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Runs one verb to its end."""
    return Fork(*arguments, **options).wait()


def fork_ranks(
    num_ranks: int, *arguments: str | Path, signal_at: tuple[str, signal.Signals] | None = None
) -> list[Fork]:
    """Starts a verb as torchrun would, once per rank; the signal is rank 0's, which speaks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "TORCHELASTIC_RUN_ID": "forks",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return [
        Fork(
            *arguments,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            signal_at=signal_at if rank == 0 else None,
        )
        for rank in range(num_ranks)
    ]


def run_on(
    num_ranks: int, *arguments: str | Path, signal_at: tuple[str, signal.Signals] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one verb to its end on so many ranks; what rank 0 said and its exit code."""
    if num_ranks == 1:
        return fork(*arguments, signal_at=signal_at)
    ends = [one.wait() for one in fork_ranks(num_ranks, *arguments, signal_at=signal_at)]
    if ends[0].returncode == 0:
        assert {end.returncode for end in ends} == {0}, [end.stderr for end in ends]
    return ends[0]
