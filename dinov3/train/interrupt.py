"""Stop by signal: the step ends, a checkpoint is written, the exit code says interrupted."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from dinov3.distributed import world_size


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag while open; a second signal acts at once.

    Not so in one of several ranks: whoever stops the job signals each rank, and torchrun does so
    again as soon as the first has ended. There the flag is all that happens, also afterwards.
    """

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Installs the handlers."""
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restores the handlers that were there before."""
        if self.name is None or world_size() == 1:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if world_size() == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
