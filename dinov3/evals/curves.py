"""Training curves of the report, drawn from `events.jsonl` as plain SVG geometry.

Only figures that the inputs determine are drawn (losses, health), never times or rates: the page
must come out the same twice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.errors import DataError
from dinov3.release.record import RecordError, parse_json

LOSSES = (
    "loss",
    "dino_global",
    "dino_local",
    "ibot",
    "koleo",
    "gram",
    "contrastive",
    "text_gram",
)
HEALTH_PREFIX = "health/"

WIDTH, HEIGHT = 240, 110  # units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 4, 4, 6, 6  # margins
_MAX_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """One small panel: values over steps."""

    name: str
    points: str  # of an SVG polyline
    first_step: int
    last_step: int
    low: float
    high: float
    last: float


def read_curves(path: Path) -> list[Curve]:
    """Curves of a run; none where there is no log.

    Raises:
        DataError: A line of the log is not readable.
    """
    if not path.is_file():
        return []
    series: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        for name, step, value in _numbers(path, number, line):
            series.setdefault(name, []).append((step, value))
    order = [*LOSSES, *sorted(name for name in series if name.startswith(HEALTH_PREFIX))]
    return [_curve(name, series[name]) for name in order if len(series.get(name, [])) > 1]


def _numbers(path: Path, number: int, line: bytes) -> list[tuple[str, int, float]]:
    try:
        event: dict[str, Any] = parse_json(line)
        step = int(event["step"])
        return [
            (name, step, float(value))
            for name, value in event.items()
            if (name in LOSSES or name.startswith(HEALTH_PREFIX)) and value is not None
        ]
    except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"{path}: line {number} is not an event, got {line[:60]!r}. Restore the file."
        raise DataError(msg) from error


def _curve(name: str, points: list[tuple[int, float]]) -> Curve:
    stride = -(-len(points) // _MAX_POINTS)
    thinned = points[::stride]
    if thinned[-1] != points[-1]:
        thinned.append(points[-1])
    values = [value for _, value in points]
    low, high = min(values), max(values)
    first, last = points[0][0], points[-1][0]
    span_x, span_y = max(last - first, 1), (high - low) or 1.0
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    drawn = " ".join(
        f"{_LEFT + inner_width * (step - first) / span_x:.1f},"
        f"{_TOP + inner_height * (high - value) / span_y:.1f}"
        for step, value in thinned
    )
    return Curve(name, drawn, first, last, low, high, points[-1][1])
