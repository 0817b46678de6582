"""How far a long pass over images is: count, rate and remaining time, on standard error.

A bar on a terminal; elsewhere (a log file, an orchestrator) one plain line now and then.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

_PLAIN_EVERY = 10.0  # seconds between plain lines
_LOOK_EVERY = 256  # images between looks at the clock


class Progress:
    """Counts images while a `with` block works through them."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._count = 0
        self._started = self._said = time.monotonic()
        console = Console(stderr=True)
        self._bar = _bar(console) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count)
            self._bar.stop()
        elif kind is None:
            self._say()

    def advance(self) -> None:
        """Counts one image."""
        self._count += 1
        if self._count % _LOOK_EVERY:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count)
        elif time.monotonic() - self._said > _PLAIN_EVERY:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = self._count / max(self._said - self._started, 1e-3)
        line = f"{self._what}: {self._count}"
        if self._total is not None:
            line += f" of {self._total}"
        line += f" images, {rate:.0f} a second"
        if self._total is not None and self._count < self._total and rate > 0:
            line += f", {(self._total - self._count) / rate:.0f} s remain"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class _RateColumn(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s")


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
    )
