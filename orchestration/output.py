"""What a process says, passed on while it runs."""

import os
import subprocess
from collections.abc import Callable
from typing import IO

LINES_SHOWN = 40  # at a time; of more, the last


def follow(
    process: subprocess.Popen[bytes], output: IO[bytes], log: Callable[[str], None], period: float
) -> str:
    """Passes on whole lines as they come until the process ends; returns everything it said.

    Args:
        process: Writes to `output`.
        output: The file, from its beginning.
        log: Takes one or more lines at a time.
        period: At most this often, seconds.
    """
    said, shown = b"", 0
    while True:
        ended = _wait(process, period)  # looked at before reading, so that nothing is lost
        said += os.pread(output.fileno(), 1 << 30, len(said))
        until = len(said) if ended else max(said.rfind(b"\n"), said.rfind(b"\r")) + 1
        _pass_on(said[shown:until], log)
        shown = max(shown, until)
        if ended:
            return _lines(said)


def _wait(process: subprocess.Popen[bytes], period: float) -> bool:
    try:
        process.wait(period)
    except subprocess.TimeoutExpired:
        return False
    return True


def _pass_on(chunk: bytes, log: Callable[[str], None]) -> None:
    lines = [line for line in _lines(chunk).splitlines() if line.strip()]
    if len(lines) > LINES_SHOWN:
        left_out = f"({len(lines) - LINES_SHOWN} lines left out)"
        lines = [left_out, *lines[-LINES_SHOWN:]]
    if lines:
        log("\n".join(lines))


def _lines(said: bytes) -> str:
    """A progress bar rewrites its line with carriage returns: each becomes a line."""
    return said.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
