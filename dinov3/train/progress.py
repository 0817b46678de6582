"""Progress of a training run: a bar with rate and remaining time, or plain lines in a log."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """Shows the step, the loss, the rate and the time that remains."""

    def __init__(self, num_steps: int, *, start: int, log_every: int, speaks: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not speaks)
        self._speaks = speaks
        self._live = self._console.is_terminal
        self._num_steps = num_steps
        self._log_every = log_every
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (self._live and speaks),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start, shown="")

    def __enter__(self) -> Self:
        """Starts the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()

    def advance(self, step: int, loss: float, seconds: float) -> None:
        """Tells that `step` steps are done; `seconds` is the recent time of one."""
        shown = f"loss {loss:.3f}  {1 / max(seconds, 1e-9):.2f} steps/s"
        self._bar.update(self._task, completed=step, shown=shown)
        if not self._live and (step % self._log_every == 0 or step == self._num_steps):
            left = (self._num_steps - step) * seconds
            self.say(f"step {step}/{self._num_steps}  {shown}  {left / 60:.1f} min remaining")

    def say(self, text: str) -> None:
        """One line beside the bar."""
        if self._live:
            self._console.print(text, highlight=False)
        elif self._speaks:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
