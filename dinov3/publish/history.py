"""Each metric of a model over its releases: the released value and what was measured since.

    value │   ┄┄┄            ┄┄┄  released, and below it how far it may fall
          │   ● ● ●          ●
          │                    ●  a later measurement; filled red when it is a regression
          └──────────────────────
             0.1.0          0.2.0

It is read from the dated reports alone, each of which was made from verified bytes.
"""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.errors import DataError
from dinov3.publish.store import version_key
from dinov3.release.record import RecordError, parse_json

SCHEMA = "dinov3.reevaluation/1"

_COLUMNS = 2  # panels beside each other
_WIDTH, _HEIGHT = 380, 170  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 24  # margins of a panel
_SHARE = 0.8  # of a version's place that its marks take
_LETTER = 7  # of a label, pixels
_MARGIN = 0.08  # of the range of values, above and below
_BLUE, _RED, _GREY, _BAND, _INK = "#1f5fa8", "#b3261e", "#8a94a1", "#eaf1fb", "#16191d"

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One re-evaluation of one metric."""

    date: str
    value: float
    regressed: bool
    tolerance: float
    benchmark: str  # digest of the pictures


@dataclass(frozen=True)
class Column:
    """One release: what it claims, and what was measured since, by date."""

    version: str
    released: float
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Series:
    """One metric over the releases of a model, by version."""

    protocol: str
    metric: str
    k: int  # neighbours; 0 where there are none
    columns: tuple[Column, ...]

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.protocol} {self.metric}" + (f", k = {self.k}" if self.k else "")


def read_reports(folder: Path) -> list[Report]:
    """All dated reports of a model.

    Args:
        folder: Of the model; has a folder per version.

    Raises:
        DataError: A file there is no such report.
    """
    return [_read_report(path) for path in sorted(folder.glob("*/*.json"))]


def history_of(reports: Iterable[Report]) -> list[Series]:
    """One series per metric, in the order in which the metrics first appear.

    Args:
        reports: Of one model, in any order.
    """
    found: dict[tuple[str, str, int], dict[str, list[tuple[Report, Report]]]] = {}
    for report in sorted(reports, key=_version_and_date):
        for row in report["metrics"]:
            measure = row["protocol"], row["metric"], row.get("k", 0)
            by_version = found.setdefault(measure, {})
            by_version.setdefault(report["release"]["version"], []).append((report, row))
    return [
        Series(*measure, tuple(_column(version, rows) for version, rows in by_version.items()))
        for measure, by_version in found.items()
    ]


def draw_history(model: str, history: Sequence[Series]) -> bytes:
    """A picture as SVG that stands alone: a panel per metric, a column per release.

    Args:
        model: Whose releases they are.
        history: One metric or more.
    """
    lines = -(-len(history) // _COLUMNS)
    width, height = min(len(history), _COLUMNS) * _WIDTH, lines * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" role="img" '
        f'aria-label="{html.escape(f"metrics of {model} by release")}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, series in enumerate(history):
        x, y = place % _COLUMNS * _WIDTH, place // _COLUMNS * _HEIGHT
        parts += [f'<g transform="translate({x},{y})">', *_panel(series), "</g>"]
    return "".join([*parts, "</svg>"]).encode()


def _version_and_date(report: Report) -> tuple[tuple[int, ...], str]:
    return version_key(report["release"]["version"]), report["date"]


def _column(version: str, rows: Sequence[tuple[Report, Report]]) -> Column:
    measured = tuple(
        Measured(
            date=report["date"],
            value=row["value"],
            regressed=row["regressed"],
            tolerance=row["tolerance"],
            benchmark=report["benchmark"]["sha256"],
        )
        for report, row in rows
    )
    return Column(version, rows[-1][1]["released"], measured)


def _panel(series: Series) -> Iterator[str]:
    lowest, highest = _range(series)
    room = (highest - lowest) * _MARGIN or 0.05
    low, high = lowest - room, highest + room
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def y_of(value: float) -> float:
        return round(_TOP + inner_height * (high - value) / (high - low), 1)

    yield _text(_LEFT, 16, series.title, size=12, weight="bold")
    yield (
        f'<rect x="{_LEFT}" y="{_TOP}" width="{inner_width}" height="{inner_height}" '
        f'fill="none" stroke="#dfe3e8"/>'
    )
    for value in dict.fromkeys((lowest, highest)):
        yield _text(_LEFT - 4, y_of(value) + 4, f"{value:.3f}", anchor="end")
    step = inner_width / len(series.columns)
    for number, column in enumerate(series.columns):
        yield from _marks(column, _LEFT + step * number, step, y_of)
    widest = max(len(column.version) for column in series.columns) * _LETTER
    every = math.ceil(widest / step)
    for number, column in list(enumerate(series.columns))[::-1][::every]:  # the newest in any case
        yield _text(_LEFT + step * (number + 0.5), _HEIGHT - 8, column.version, anchor="middle")


def _marks(column: Column, left: float, width: float, y_of: Any) -> Iterator[str]:
    """The released value as a line, its tolerance as a band, the measurements as dots by date."""
    start, span = left + width * (1 - _SHARE) / 2, width * _SHARE
    top = y_of(column.released)
    bottom = y_of(column.released - column.measured[-1].tolerance)
    yield (
        f'<rect x="{start:.1f}" y="{top}" width="{span:.1f}" height="{bottom - top:.1f}" '
        f'fill="{_BAND}"/>'
    )
    yield (
        f'<line x1="{start:.1f}" y1="{top}" x2="{start + span:.1f}" y2="{top}" '
        f'stroke="{_GREY}" stroke-dasharray="4 3"/>'
    )
    for number, one in enumerate(column.measured):
        x = start + span * (number + 0.5) / len(column.measured)
        said = f"{column.version} measured {one.date}: {one.value:.4f}, released {column.released}"
        yield (
            f'<circle cx="{x:.1f}" cy="{y_of(one.value)}" r="3.5" '
            f'fill="{_RED if one.regressed else _BLUE}">'
            f"<title>{html.escape(said)}</title></circle>"
        )


def _range(series: Series) -> tuple[float, float]:
    """Of everything that is drawn."""
    values = [
        value
        for column in series.columns
        for one in column.measured
        for value in (column.released, column.released - one.tolerance, one.value)
    ]
    return min(values), max(values)


def _text(
    x: float, y: float, text: str, *, size: int = 10, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}" fill="{_INK}">{html.escape(text)}</text>'
    )


def _read_report(path: Path) -> Report:
    try:
        report = parse_json(path.read_bytes())
        if report["schema"] != SCHEMA:
            msg = f"schema {report['schema']!r}"
            raise ValueError(msg)
        version_key(report["release"]["version"])
        _column("", [(report, row) for row in report["metrics"]])
    except (OSError, RecordError, LookupError, TypeError, ValueError) as error:
        msg = f"{path}: not a report of a re-evaluation, got {error!r}. Move it away."
        raise DataError(msg) from error
    found: Report = report
    return found
