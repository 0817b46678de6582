"""Great Expectations judges the image table; polars counts first.

Great Expectations has no polars engine and wants the whole table in memory. So what holds for all
rows (fractions, order, nulls, malformed values) is counted by streaming queries into one row, and
that row is judged, together with at most 10,000 rows spread evenly over the table.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dinov3.config import ExpectationsConfig
from dinov3.errors import JudgementFailed

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_ROWS = 10_000
_BUCKET_ROWS = 1_000_000  # rows whose pixel digests are counted at once

REQUIRED = [
    "path", "sha256", "bytes", "width", "height", "mode", "source", "licence", "split",
    "pixel_sha256", "phash",
]  # fmt: skip
_PATTERNS = {
    "sha256": "^[0-9a-f]{64}$",
    "pixel_sha256": "^[0-9a-f]{64}$",
    "phash": "^[0-9a-f]{16}$",
}
_SETS = {"split": ["test", "train"], "mode": ["RGB", "RGBA"]}
_POSITIVE = ("bytes", "width", "height")
_PANDAS_TYPES = {pl.String: "str", pl.Float64: "float64", pl.Boolean: "boolean"}


def judge(manifest: Path, unreadable: Path, expect: ExpectationsConfig) -> dict[str, Any]:
    """The verdict on an image table, as the JSON values of `verdict.json`.

    Args:
        manifest: The table of images.
        unreadable: The table of what could not become a row.
        expect: Thresholds of the recipe.
    """
    totals = count(manifest, unreadable, expect)
    sample = spread(manifest, totals["num_images"].item())
    results = [
        *_validate(to_pandas(totals), _expect_totals(expect)),
        *_validate(to_pandas(sample), _expect_rows()),
    ]
    results.sort(key=lambda result: (result["column"], result["name"]))
    return {
        "passed": all(result["passed"] for result in results),
        "expectations": results,
        "rows": totals["num_images"].item(),
        "rows_judged_singly": sample.height,
    }


def require_passed(verdict: dict[str, Any]) -> None:
    """Turns a bad verdict into the error that stops both front doors.

    Raises:
        JudgementFailed: An expectation is not met; the message names each with its figures.
    """
    failed = [result for result in verdict["expectations"] if not result["passed"]]
    if failed:
        what = "; ".join(
            f"{result['column']} ({result['name']}): got {result['observed']}, "
            f"allowed {result['threshold']}"
            for result in failed
        )
        msg = (
            f"image_manifest: {len(failed)} of {len(verdict['expectations'])} expectations failed: "
            f"{what}. Mend the source, or change expect.* in the recipe."
        )
        raise JudgementFailed(msg)


def count(manifest: Path, unreadable: Path, expect: ExpectationsConfig) -> pl.DataFrame:
    """One row about the whole table; see `_expect_totals` for its columns."""
    table = pl.scan_parquet(manifest)
    short = pl.min_horizontal("width", "height") < expect.min_short_side
    malformed = [~pl.col(name).str.contains(regex) for name, regex in _PATTERNS.items()]
    malformed += [~pl.col(name).is_in(values) for name, values in _SETS.items()]
    malformed += [pl.col(name) < 1 for name in _POSITIVE]
    totals = table.select(
        pl.len().cast(pl.Int64).alias("num_images"),
        short.sum().cast(pl.Int64).alias("num_small"),
        pl.sum_horizontal(pl.col(REQUIRED).null_count()).cast(pl.Int64).alias("num_nulls"),
        pl.sum_horizontal(part.sum() for part in malformed).cast(pl.Int64).alias("num_malformed"),
        (pl.col("path") <= pl.col("path").shift(1)).sum().cast(pl.Int64).alias("num_out_of_order"),
    ).collect(engine="streaming")
    num_unreadable = pl.scan_parquet(unreadable).select(pl.len()).collect().item()
    rows = max(totals["num_images"].item(), 1)
    duplicates = rows - _count_distinct_pixels(table, rows)
    return totals.with_columns(
        (pl.col("num_small") / rows).round(6).alias("small_fraction"),
        pl.lit(round(num_unreadable / (rows + num_unreadable), 6)).alias("unreadable_fraction"),
        pl.lit(round(duplicates / rows, 6)).alias("duplicate_fraction"),
    )


def spread(manifest: Path, num_rows: int) -> pl.DataFrame:
    """At most `SAMPLE_ROWS` rows, evenly spread; all rows of a smaller table."""
    every = -(-num_rows // SAMPLE_ROWS) or 1
    table = pl.scan_parquet(manifest).with_row_index("row")
    return table.filter(pl.col("row") % every == 0).drop("row").collect(engine="streaming")


def to_pandas(frame: pl.DataFrame) -> "pd.DataFrame":
    """The same values in pandas: integers stay integers (with nulls: `Int64`), text stays text.

    Raises:
        TypeError: A column of another type.
    """
    import pandas as pd

    columns = {}
    for series in frame.iter_columns():
        if series.dtype.is_integer():
            kind = "Int64" if series.null_count() else "int64"
        elif type(series.dtype) in _PANDAS_TYPES:
            kind = _PANDAS_TYPES[type(series.dtype)]
        else:
            msg = f"{series.name}: no pandas type is agreed for {series.dtype}"
            raise TypeError(msg)
        columns[series.name] = pd.Series(series.to_list(), dtype=kind)
    return pd.DataFrame(columns)


def _count_distinct_pixels(table: pl.LazyFrame, rows: int) -> int:
    """Exact, in bounded memory: digests are counted one bucket at a time."""
    buckets = -(-rows // _BUCKET_ROWS)
    key = pl.col("pixel_sha256").str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    keys = table.select(key.alias("key"))
    return sum(
        keys.filter(pl.col("key") % buckets == bucket)
        .select(pl.col("key").n_unique())
        .collect(engine="streaming")
        .item()
        for bucket in range(buckets)
    )


def _expect_totals(expect: ExpectationsConfig) -> list[tuple[str, dict[str, Any]]]:
    limits: dict[str, dict[str, float]] = {
        "num_images": {"min_value": expect.min_images},
        "unreadable_fraction": {"max_value": expect.max_unreadable_fraction},
        "small_fraction": {"max_value": expect.max_small_fraction},
        "duplicate_fraction": {"max_value": expect.max_duplicate_fraction},
        "num_nulls": {"max_value": 0},
        "num_malformed": {"max_value": 0},
        "num_out_of_order": {"max_value": 0},
    }
    kind = "ExpectColumnMaxToBeBetween"  # of one row: the value itself, reported as observed
    return [(kind, {"column": column, **limit}) for column, limit in limits.items()]


def _expect_rows() -> list[tuple[str, dict[str, Any]]]:
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("ExpectColumnValuesToBeUnique", {"column": "path"}),
    ]
    for column in REQUIRED:
        wanted.append(("ExpectColumnValuesToNotBeNull", {"column": column}))
    for column, regex in _PATTERNS.items():
        wanted.append(("ExpectColumnValuesToMatchRegex", {"column": column, "regex": regex}))
    for column, values in _SETS.items():
        wanted.append(("ExpectColumnValuesToBeInSet", {"column": column, "value_set": values}))
    for column in _POSITIVE:
        wanted.append(("ExpectColumnValuesToBeBetween", {"column": column, "min_value": 1}))
    return wanted


def _validate(
    frame: "pd.DataFrame", wanted: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Runs expectations on a frame in a context of their own."""
    gx = _great_expectations()
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset("frame")
    batch = asset.add_batch_definition_whole_dataframe("whole")
    expectations = [getattr(gx.expectations, kind)(**fields) for kind, fields in wanted]
    suite = context.suites.add(
        gx.ExpectationSuite(name="image_manifest", expectations=expectations)
    )
    definition = gx.ValidationDefinition(name="image_manifest", data=batch, suite=suite)
    outcome = definition.run(batch_parameters={"dataframe": frame})
    return [_describe(result) for result in outcome.results]


def _describe(result: Any) -> dict[str, Any]:
    fields = result.expectation_config.kwargs
    limits = {
        name: fields[name]
        for name in ("min_value", "max_value", "value_set", "regex")
        if fields.get(name) is not None
    }
    found = result.result.get("observed_value", result.result.get("unexpected_count"))
    observed = found.item() if hasattr(found, "item") else found
    if observed is None:  # the expectation itself failed to run
        observed = str(result.exception_info)
    return {
        "name": result.expectation_config.type,
        "column": fields["column"],
        "passed": bool(result.success),
        "observed": observed,
        "threshold": limits or {"unexpected_count": 0},
    }


def _great_expectations() -> Any:
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read once, on import
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "module 'sre_(constants|parse|compile)' is deprecated")
        import great_expectations
    return great_expectations
