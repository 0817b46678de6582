"""`image_manifest`: one row per image of a source, judged before it is let through.

    python -m dinov3 manifest --recipe demo --source folder:/my/pictures --output DIR

Rows stream from worker processes into parquet in the order of their paths; memory does not grow
with their number. What cannot become a row is listed in `unreadable.parquet` with its reason.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from dinov3.config import ManifestConfig, SplitConfig, dump
from dinov3.curation.imagefacts import Facts, examine
from dinov3.curation.progress import Progress
from dinov3.curation.quality import judge, require_passed
from dinov3.data.sources import Entry, open_source, require_images
from dinov3.data.sources.fingerprint import Fingerprint
from dinov3.errors import DataError
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, RUN_NAME, canonical_json, parse_json
from dinov3.stage import Stage, open_stage

MANIFEST = "manifest.parquet"
UNREADABLE = "unreadable.parquet"
VERDICT = "verdict.json"

_FOUND = {
    "path": pl.String,
    "sha256": pl.String,
    "bytes": pl.Int64,
    "width": pl.Int32,
    "height": pl.Int32,
    "mode": pl.String,
    "source": pl.String,
    "licence": pl.String,
    "caption": pl.String,
    "label": pl.String,
}
_DIGESTS = {"pixel_sha256": pl.String, "phash": pl.String}
MANIFEST_SCHEMA = pl.Schema({**_FOUND, "split": pl.String, **_DIGESTS})
UNREADABLE_SCHEMA = pl.Schema({"path": pl.String, "reason": pl.String, "detail": pl.String})

_GROUP_ROWS = 16_384  # rows of a parquet row group, and in memory before they are written
_MAX_LABELS = 1_000  # labels counted by name in the record


def make_manifest(
    *,
    source: str,
    output: Path,
    config: ManifestConfig,
    fingerprint: Path | None = None,
    num_workers: int | None = None,
) -> None:
    """Makes the stage's folder: the two tables, the verdict and the records.

    Args:
        source: One line, see `dinov3.data.sources`.
        output: Folder of the stage; a failed judgement leaves only `verdict.json` there.
        config: The resolved recipe.
        fingerprint: What the source was seen to hold; a difference is an error.
        num_workers: Processes that decode; by default one per usable core, at most 8.

    Raises:
        DataError: The source is missing, empty, without any readable image, or changed meanwhile.
        JudgementFailed: The table does not meet the recipe's expectations.
    """
    expected = None if fingerprint is None else _read_fingerprint(fingerprint)
    with open_stage("image_manifest", output, config=dump(config)) as stage:
        seen = _write_tables(stage, source, config, expected, num_workers)
        if expected is not None and seen.value() != expected:
            msg = (
                f"{fingerprint}: the source is not what it was, got {seen.value()['sha256']} "
                f"instead of {expected.get('sha256')}. Run dvc repro again."
            )
            raise DataError(msg)
        stage.read_root("source", seen.kind, seen.value()["sha256"], _licences(stage))
        stage.facts.update(_facts(stage), source=seen.value())
        verdict = judge(stage.path(MANIFEST), stage.path(UNREADABLE), config.expect)
        if not verdict["passed"]:
            _leave_only(output, verdict)
        require_passed(verdict)
        atomic_write(stage.path(VERDICT), canonical_json(verdict))


def split_expression(config: SplitConfig) -> pl.Expr:
    """`split` of a row from its own `pixel_sha256` and `label`, in exact integers.

    The first 8 bytes of the digest are a number u in [0, 1); the row is held out when u is below
    the fraction for its kind. So a new image never moves an old one across.
    """
    head = pl.col("pixel_sha256").str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    labelled = pl.col("label").is_not_null()
    allowed = ~pl.col("label").is_in(list(config.never_test))
    held_out = (
        pl.when(labelled)
        .then(allowed & _below(head, config.test_fraction))
        .otherwise(_below(head, config.unlabelled_test_fraction))
    )
    return pl.when(held_out).then(pl.lit("test")).otherwise(pl.lit("train")).alias("split")


def _below(head: pl.Expr, fraction: float) -> pl.Expr:
    """Whether head / 2**64 < fraction, without rounding."""
    bound = math.ceil(Fraction(fraction) * 2**64)
    return head < pl.lit(bound, pl.UInt64) if bound < 2**64 else pl.lit(True)


def _write_tables(
    stage: Stage,
    spec: str,
    config: ManifestConfig,
    expected: dict[str, Any] | None,
    num_workers: int | None,
) -> Fingerprint:
    opened = open_source(spec)
    seen = Fingerprint(opened.kind)
    split = split_expression(config.split)
    total = None if expected is None else expected.get("num_files")
    with (
        _open_table(stage.path(MANIFEST), MANIFEST_SCHEMA, split) as images,
        _open_table(stage.path(UNREADABLE), UNREADABLE_SCHEMA) as unreadable,
        Progress("image_manifest", total) as progress,
    ):
        for entry, facts in examine(opened, max_pixels=config.max_pixels, num_workers=num_workers):
            seen.add(entry, facts.identity, facts.bytes)
            if facts.reason is None:
                images.add(_row(entry, facts, opened.kind, config.licence))
            else:
                unreadable.add((entry.path, facts.reason, facts.detail))
            progress.advance()
    require_images(spec, opened, seen.num_files)
    if images.num_rows == 0:
        msg = (
            f"source: none of its {seen.num_files} images can be read, got {spec} "
            f"({_most_common_reason(stage)}). Check the files."
        )
        raise DataError(msg)
    # Beside the record: what is no image cannot change the table, nor make it stale.
    stage.run_facts["passed_over"] = dict(sorted(opened.ignored.items()))
    kinds = ", ".join(f"{count} {kind}" for kind, count in opened.ignored.most_common(8))
    sys.stderr.write(
        f"image_manifest: {images.num_rows} images, {unreadable.num_rows} unreadable, "
        f"passed over: {kinds or 'nothing'}\n"
    )
    return seen


def _row(entry: Entry, facts: Facts, kind: str, licence: str) -> tuple[Any, ...]:
    """Values in the order of `_FOUND` and `_DIGESTS`."""
    return (
        entry.path,
        facts.sha256,
        facts.bytes,
        facts.width,
        facts.height,
        facts.mode,
        kind,
        entry.licence or licence,
        entry.caption,
        entry.label,
        facts.pixel_sha256,
        facts.phash,
    )


class _Table:
    """Rows on their way into a parquet file, one row group in memory."""

    def __init__(
        self, writer: pq.ParquetWriter, schema: pl.Schema, derived: pl.Expr | None
    ) -> None:
        self.num_rows = 0
        self._writer = writer
        self._schema = schema
        self._derived = derived
        self._given = schema if derived is None else pl.Schema({**_FOUND, **_DIGESTS})
        self._rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        """Takes one row."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == _GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the rows in memory as one row group."""
        if self._rows:
            frame = pl.DataFrame(self._rows, self._given, orient="row")
            if self._derived is not None:
                frame = frame.with_columns(self._derived)
            table = frame.select(self._schema.names()).to_arrow().cast(self._writer.schema)
            self._writer.write_table(table)
            self._rows.clear()


@contextmanager
def _open_table(path: Path, schema: pl.Schema, derived: pl.Expr | None = None) -> Iterator[_Table]:
    arrow = schema.to_frame().to_arrow().schema
    with pq.ParquetWriter(path, arrow, compression="zstd") as writer:
        table = _Table(writer, schema, derived)
        yield table
        table.flush()


def _read_fingerprint(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        msg = f"{path}: not readable: {error}. Make it: python -m dinov3 source --refresh."
        raise DataError(msg) from error
    if not isinstance(value, dict):
        msg = (
            f"{path}: not a fingerprint, got {value!r}. Make it: python -m dinov3 source --refresh."
        )
        raise DataError(msg)
    return value


def _most_common_reason(stage: Stage) -> str:
    reasons = _count_by(stage.path(UNREADABLE), "reason")
    reason = max(reasons, key=lambda name: reasons[name])
    return f"most often: {reason}, {reasons[reason]} times"


def _count_by(table: Path, column: str) -> dict[str, int]:
    """How many rows have each value, nulls left out; at most `_MAX_LABELS` values, by frequency."""
    counts = (
        pl.scan_parquet(table)
        .filter(pl.col(column).is_not_null())
        .group_by(column)
        .len("rows")
        .sort(["rows", column], descending=[True, False])
        .head(_MAX_LABELS)
        .collect(engine="streaming")
    )
    return dict(sorted(counts.iter_rows()))


def _licences(stage: Stage) -> set[str]:
    return set(_count_by(stage.path(MANIFEST), "licence"))


def _facts(stage: Stage) -> dict[str, Any]:
    table = pl.scan_parquet(stage.path(MANIFEST))
    totals = table.select(
        pl.len().alias("rows"), pl.col("label").drop_nulls().n_unique().alias("num_labels")
    ).collect(engine="streaming")
    return {
        **totals.row(0, named=True),
        "labels": _count_by(stage.path(MANIFEST), "label"),
        "splits": _count_by(stage.path(MANIFEST), "split"),
        "unreadable": _count_by(stage.path(UNREADABLE), "reason"),
    }


def _leave_only(output: Path, verdict: dict[str, Any]) -> None:
    """Leaves the verdict as the stage's only file: an earlier table would seem judged by it."""
    for name in (RECORD_NAME, RUN_NAME, MANIFEST, UNREADABLE):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / VERDICT, canonical_json(verdict))
