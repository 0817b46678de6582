"""Stage `caption_pairs`: pictures with a line of text each, to align text with a frozen backbone.

Captions come from the image manifest, or from any table of parquet with `image` (the path in the
manifest) and `caption`; a picture may have several. A pair is trained on where its picture is in
the training half and curation kept it; held-out pictures give the test pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dinov3.config import CaptionsConfig, dump
from dinov3.data.sources.entries import clean_text
from dinov3.errors import DataError, LineageBroken
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, canonical_json, file_sha256
from dinov3.stage import Stage, open_stage

PAIRS_NAME = "pairs.parquet"
SUMMARY_NAME = "summary.json"
PAIRS_SCHEMA = pl.Schema(
    {
        "path": pl.String,
        "sha256": pl.String,
        "caption": pl.String,
        "split": pl.String,
        "label": pl.String,
        "licence": pl.String,
    }
)

NO_CAPTION = "without a caption"
UNKNOWN = "of a picture the manifest does not know"
TOO_SHORT = "too short"
TOO_LONG = "too long"
DUPLICATE = "same pixels and same caption as another"
HELD_OUT_TWIN = "same pixels as a held-out picture"
NOT_KEPT = "of a picture curation left out"
REASONS = (NO_CAPTION, UNKNOWN, TOO_SHORT, TOO_LONG, DUPLICATE, HELD_OUT_TWIN, NOT_KEPT)

_MANIFEST_COLUMNS = ("path", "sha256", "pixel_sha256", "caption", "split", "label", "licence")
_CURATED_COLUMNS = ("path", "sha256", "kept")
_GIVEN_COLUMNS = ("image", "caption")


def make_caption_pairs(
    *,
    stage_name: str,
    manifest: Path,
    dataset: Path | None,
    output: Path,
    config: CaptionsConfig,
    pairs: Path | None = None,
) -> None:
    """Writes `pairs.parquet`, one row per pair, and `summary.json`.

    Args:
        stage_name: Key of the stage.
        manifest: `manifest.parquet` of `image_manifest`.
        dataset: `curated.parquet` of the same table; None trains on the whole training half.
        output: Folder of the stage.
        config: What a usable caption is, and how many pairs there must be.
        pairs: A table with `image` and `caption`; None takes the captions of the manifest.

    Raises:
        DataError: A table lacks a column, or there are too few pairs to train on.
        LineageBroken: The tables do not speak of the same images, or differ from their record.
    """
    with open_stage(stage_name, output, config=dump(config)) as stage:
        table = _read_columns(stage.read("manifest", manifest), _MANIFEST_COLUMNS)
        kept = None if dataset is None else _kept(stage.read("dataset", dataset), table)
        captions = None if pairs is None else _read_given(stage, pairs)
        chosen, left_out = choose_pairs(table, config, captions=captions, kept=kept)
        num_train = chosen.filter(split="train").height
        if num_train < config.min_pairs:
            reasons = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
            msg = (
                f"min_pairs: {config.min_pairs} pairs to train on are needed, got {num_train} "
                f"(left out: {reasons or 'none'}). Give pictures more captions."
            )
            raise DataError(msg)
        chosen.write_parquet(stage.path(PAIRS_NAME))
        stage.facts = _summary(chosen, left_out)
        atomic_write(stage.path(SUMMARY_NAME), canonical_json(stage.facts))


def choose_pairs(
    table: pl.DataFrame,
    config: CaptionsConfig,
    *,
    captions: pl.DataFrame | None = None,
    kept: pl.Series | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The usable pairs in the order of the manifest, and how many were left out, by reason.

    Args:
        table: The image manifest.
        config: What a usable caption is; lengths are in characters, white space collapsed.
        captions: `image` and `caption`; None takes the captions of the manifest.
        kept: Whether curation kept each row of the manifest; None keeps all.
    """
    rows = table.with_row_index("row")
    rows = rows.with_columns(pl.lit(value=True).alias("kept") if kept is None else kept)
    unknown = 0
    if captions is not None:
        named = captions.with_row_index("place").rename({"image": "path"})
        unknown = named.join(rows, on="path", how="anti").height
        rows = rows.drop("caption").join(named, on="path").sort("row", "place")
    held_out = rows.filter(split="test")["pixel_sha256"].unique()
    judged = _with_reason(_cleaned(rows), config, held_out)
    counts = dict(judged["reason"].drop_nulls().value_counts().iter_rows())
    counts[UNKNOWN] = unknown
    chosen = judged.filter(pl.col("reason").is_null()).select(PAIRS_SCHEMA.names())
    return chosen.cast(PAIRS_SCHEMA), {why: counts.get(why, 0) for why in REASONS}


def _cleaned(rows: pl.DataFrame) -> pl.DataFrame:
    texts = [None if text is None else clean_text(text) for text in rows["caption"].to_list()]
    return rows.with_columns(pl.Series("caption", texts, dtype=pl.String))


def _with_reason(rows: pl.DataFrame, config: CaptionsConfig, held_out: pl.Series) -> pl.DataFrame:
    """Adds `reason`, null where the pair is usable; the first reason that holds counts."""
    length = pl.col("caption").str.len_chars()
    training = pl.col("split") == "train"
    rules = {
        NO_CAPTION: pl.col("caption").is_null(),
        TOO_SHORT: length < config.min_characters,
        TOO_LONG: length > config.max_characters,
        HELD_OUT_TWIN: training & pl.col("pixel_sha256").is_in(held_out.implode()),
        NOT_KEPT: training & ~pl.col("kept"),
    }
    first = pl.coalesce(pl.when(rule).then(pl.lit(why)) for why, rule in rules.items())
    judged = rows.with_columns(reason=first)
    # Among usable pairs alone: a pair left out must not take its double with it.
    again = ~pl.struct("pixel_sha256", "caption", "reason").is_first_distinct()
    double = pl.when(pl.col("reason").is_null() & again).then(pl.lit(DUPLICATE))
    return judged.with_columns(reason=pl.coalesce(pl.col("reason"), double))


def _read_given(stage: Stage, path: Path) -> pl.DataFrame:
    """The caption table of a user, an input of the graph or the beginning of one.

    Raises:
        DataError: It is not there, lacks a column, or names no paths.
    """
    if not path.is_file():
        msg = f"{path}: no such table of captions. Give a parquet file with image and caption."
        raise DataError(msg)
    table = _read_columns(path, _GIVEN_COLUMNS)
    wrong = [name for name in _GIVEN_COLUMNS if table.schema[name] != pl.String]
    if wrong:
        msg = (
            f"{path}: {wrong[0]} is not text, got {table.schema[wrong[0]]}. Name images by their "
            f"path in the manifest; a table that holds pictures is a source: parquet:{path.name}."
        )
        raise DataError(msg)
    if (path.parent / RECORD_NAME).is_file():
        stage.read("captions", path)
    else:
        stage.read_root("captions", path.name, file_sha256(path), set())
    return table.select(_GIVEN_COLUMNS)


def _kept(path: Path, table: pl.DataFrame) -> pl.Series:
    curated = _read_columns(path, _CURATED_COLUMNS)
    if not curated.select("path", "sha256").equals(table.select("path", "sha256")):
        msg = (
            f"{path}: speaks of other images than the manifest, got {curated.height} rows for "
            f"{table.height}. Make curated_dataset anew."
        )
        raise LineageBroken(msg)
    return curated["kept"]


def _read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    try:
        present = pl.read_parquet_schema(path)
        missing = [name for name in columns if name not in present]
        if missing:
            msg = f"{path}: got no column {', '.join(missing)}. Give the right table."
            raise DataError(msg)
        return pl.read_parquet(path, columns=list(columns))
    except pl.exceptions.PolarsError as error:
        msg = f"{path}: not a table of parquet, got {str(error)!r}. Make it anew."
        raise DataError(msg) from error


def _summary(chosen: pl.DataFrame, left_out: dict[str, int]) -> dict[str, Any]:
    """Counts per half; a caption of several pictures is a right answer for each of them."""
    halves = {}
    for name in ("train", "test"):
        half = chosen.filter(split=name)
        halves[name] = {
            "pairs": half.height,
            "pictures": half["sha256"].n_unique(),
            "captions": half["caption"].n_unique(),
        }
    trained = chosen.filter(split="train")["caption"].unique()
    known = chosen.filter(pl.col("split") == "test", pl.col("caption").is_in(trained.implode()))
    return {
        "rows": chosen.height,
        **halves,
        "test_captions_seen_in_training": known["caption"].n_unique(),
        "left_out": left_out,
    }
