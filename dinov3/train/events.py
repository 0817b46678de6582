"""`events.jsonl` and TensorBoard: what a run says while it runs.

Both live beside the resumable state. On resume the log is cut back to the checkpoint's place, so a
step stands in it once, however often the run was interrupted.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dinov3.stage import BOARD_NAME, EVENTS_NAME


class EventLog:
    """Appends one JSON line per event and mirrors numbers to TensorBoard."""

    def __init__(self, folder: Path, *, size: int, step: int) -> None:
        """Opens the log of a run.

        Args:
            folder: Where the state of the run lives.
            size: Bytes of the log that belong to the run; what follows is cut off.
            step: First step to come; TensorBoard forgets what it knew from there on.
        """
        path = folder / EVENTS_NAME
        path.touch()
        with path.open("r+b") as stream:
            stream.truncate(size)
        self._stream = path.open("ab")
        self.board = SummaryWriter(str(folder / BOARD_NAME), purge_step=step if size else None)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        self._stream.flush()
        return self._stream.tell()

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Writes one line and one TensorBoard point per value; non-finite values become null."""
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None
            self.board.add_scalar(name, value, step)
        self._write(line)

    def note(self, step: int, text: str) -> None:
        """Writes something worth knowing that is not a number."""
        self._write({"step": step, "time": round(time.time(), 3), "note": text})

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Shows an image, uint8 [3, H, W], in TensorBoard."""
        self.board.add_image(name, image, step)

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes both files, whatever happened."""
        self.board.close()
        self._stream.close()


class EventLogs:
    """The logs of all learners of a run: in the run's folder, or in one folder per student.

    A rank that does not lead a learner's group asks for its log too, and gets one that forgets.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, sizes: Mapping[str, int], step: int
    ) -> None:
        self._logs: dict[str, EventLog] = {}
        self._silent = _SilentLog()
        for name in names:
            place = folder / name if name else folder
            place.mkdir(parents=True, exist_ok=True)
            self._logs[name] = EventLog(place, size=sizes.get(name, 0), step=step)

    def of(self, name: str) -> "EventLog | _SilentLog":
        """The log of a learner."""
        return self._logs.get(name, self._silent)

    def sizes(self) -> dict[str, int]:
        """Bytes written so far, by learner."""
        return {name: log.size for name, log in self._logs.items()}

    def __enter__(self) -> Self:
        """The logs themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes all files, whatever happened."""
        for log in self._logs.values():
            log.__exit__(kind, error, trace)


class _SilentLog:
    """Takes what another rank writes."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Forgets it."""

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Forgets it."""
