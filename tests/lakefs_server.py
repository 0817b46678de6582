"""The real lakeFS server in a folder of a test, started and ended by the project's own tools.

Skips only where the build says that Go cannot be had; a build that fails is a failure.
"""

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3.lake import Lake

CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # of the build
TOOLS = Path(__file__).parents[1] / "tools" / "lakefs"
CANNOT_BE_HAD = 3
PATIENCE = 20.0  # seconds a healthy but busy machine is waited for


@functools.cache
def require_binary() -> Path:
    """The server's binary, built if need be."""
    build = run_tool("build.py")
    if build.returncode == CANNOT_BE_HAD:
        pytest.skip(build.stderr.strip().splitlines()[-1])
    if build.returncode:
        pytest.fail(f"the lakeFS server was not built:\n{build.stderr}")
    return Path(build.stdout.strip())


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One of the project's tools, with the build cache of this machine."""
    return subprocess.run(
        [sys.executable, TOOLS / arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": CACHE},
    )


class Server:
    """One server and its state, which outlives every process of it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.port = 0

    def start(self) -> None:
        """Starts it, again at the same port."""
        require_binary()
        done = self.tool("start", "--port", str(self.port))
        assert done.returncode == 0, done.stderr
        self.port = int(self.environment["LAKEFS_ENDPOINT"].rpartition(":")[2])

    def stop(self) -> None:
        """Ends it cleanly."""
        done = self.tool("stop")
        assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self.send_signal(signal.SIGKILL)
        self.stop()

    def send_signal(self, number: signal.Signals) -> None:
        """To the server's process."""
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Alive, but silent."""
        self.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_signal(signal.SIGCONT)

    def tool(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """tools/lakefs/server.py."""
        return run_tool("server.py", arguments[0], "--state", self.state, *arguments[1:])

    @property
    def pid(self) -> int:
        return int((self.state / "pid").read_text())

    @property
    def environment(self) -> dict[str, str]:
        """LAKEFS_ENDPOINT and the key."""
        lines = (self.state / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def lake(self, *, timeout: float = PATIENCE) -> Lake:
        """A client of it."""
        return Lake.connect(self.environment, timeout=timeout)

    def repository(self) -> str:
        """A new repository of this test alone."""
        name = f"r{secrets.token_hex(8)}"
        assert self.lake().create_repository(name, f"local://{name}")
        return name


@contextlib.contextmanager
def running_server(state: Path) -> Iterator[Server]:
    """A server that has ended afterwards, whatever was done to it."""
    server = Server(state)
    server.start()
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGCONT)
        server.stop()
