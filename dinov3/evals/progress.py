"""What an evaluation is at, on standard error: a line as each part begins, a bar on a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


class EvaluationProgress:
    """Counts the parts of one evaluation as they begin."""

    def __init__(self, name: str, num_parts: int) -> None:
        """Begins with none.

        Args:
            name: What is judged.
            num_parts: How many will begin.
        """
        self._name, self._num_parts, self._begun = name, num_parts, 0

    def begin(self, part: str, extent: str) -> None:
        """Says which part begins, the how-manieth it is and over how much it goes."""
        self._begun += 1
        say(f"{self._name}: {self._begun}/{self._num_parts} {part}, {extent}")


def watched(things: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Shows a bar with rate and remaining time while things pass; nothing where none is seen."""
    console = Console(stderr=True)
    if not console.is_terminal:  # there a bar leaves an empty line
        yield from things
        return
    yield from track(things, description=what, total=total, console=console, transient=True)


def say(text: str) -> None:
    """One line, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
