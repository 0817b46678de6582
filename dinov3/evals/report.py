"""`eval_reports`: figures bound to the digests of weights, data and code; a page for people.

    python -m dinov3 report eval_reports_pretrained --recipe demo --source folder:/my/pictures …

`report.json` is canonical JSON without times or places: equal inputs give equal bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from dinov3.config import EvalsConfig, config_digest, dump
from dinov3.device import choose_device
from dinov3.errors import DataError
from dinov3.evals.baselines import MODEL, SUBJECTS
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME, Candidate, open_candidate
from dinov3.evals.collection import (
    COLUMNS,
    KEPT_COLUMNS,
    Halves,
    Pictures,
    labelled_halves,
    read_columns,
    require_no_overlap,
)
from dinov3.evals.curves import read_curves
from dinov3.evals.dense_findings import dense_per_class
from dinov3.evals.page import Pieces, render_page
from dinov3.evals.phase_findings import PHASES_SCHEMA, phases_table
from dinov3.evals.pictures import neighbour_rows, patch_pictures, scene_picture
from dinov3.evals.protocols import KNN, TOP_1
from dinov3.evals.study import Gallery, SceneStudy, Study, headline_k, run_study
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import EVENTS_NAME, Stage, code_digest, open_stage

SCHEMA = "dinov3.report/1"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"

_DIGITS = 6  # of every figure; rounding of the last bits must not change the bytes


def make_report(
    stage_name: str,
    *,
    source: str,
    model: Path,
    manifest: Path,
    dataset: Path,
    output: Path,
    config: EvalsConfig,
) -> None:
    """Judges a trained model on the held-out half and writes report.json and report.html.

    Args:
        stage_name: Key of the stage.
        source: The images' source, `kind:path`.
        model: Folder of the trained model.
        manifest: Table of all images, with labels and split.
        dataset: Table of the images the model was trained on.
        output: Folder of the result.
        config: The resolved recipe.

    Raises:
        DataError: Inputs are missing, or a held-out image is in the training data.
        CheckpointError, LineageBroken: The model cannot be used, or bytes differ from a record.
    """
    device = choose_device(config.run.device)
    with open_stage(stage_name, output, config=dump(config)) as stage:
        stage.seeds = {"seed": config.seed}
        stage.read("backbone", model / BACKBONE_NAME)
        stage.read("model config", model / CONFIG_NAME)
        table, halves = read_collection(stage, manifest, dataset, config)
        candidate = open_candidate(model, None, device)
        pictures = Pictures(source, table)
        study = run_study(candidate, table, pictures, halves, config, device)
        name_backgrounds(stage, study.dense, config)
        identity = {"sha256": file_sha256(manifest), "contamination": stage.contamination}
        report = build_report(stage_name, candidate, study, config, identity)
        pieces = gather_pieces(candidate, study, table, pictures, config, stage)
        write_report(stage, report, pieces)


def read_collection(
    stage: Stage, manifest: Path, dataset: Path, config: EvalsConfig
) -> tuple[pl.DataFrame, Halves]:
    """The image table and its labelled halves, proven free of what was trained on.

    Args:
        stage: Which reads them.
        manifest: Table of all images, with labels and split.
        dataset: Table of the images the model was trained on.
        config: The recipe.

    Raises:
        DataError: Inputs are missing, or a held-out image is in the training data.
        LineageBroken: Bytes differ from a record.
    """
    table = read_table(stage.read("manifest", manifest))
    curated = read_columns(stage.read("dataset", dataset), KEPT_COLUMNS, "a curated dataset")
    kept = _kept_rows(curated, table, dataset)
    halves = labelled_halves(
        table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
    )
    require_no_overlap(table, halves, kept)
    return table, halves


def build_report(
    stage_name: str,
    candidate: Candidate,
    study: Study,
    config: EvalsConfig,
    dataset: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        stage_name: What to call it.
        candidate: The model.
        study: The findings.
        config: The recipe.
        dataset: What identifies the pictures: sha256 and contamination.
    """
    report = {
        "schema": SCHEMA,
        "stage": stage_name,
        "model": candidate.identity(),
        "dataset": {
            **dataset,
            "num_train": len(study.halves.train),
            "num_test": len(study.halves.test),
            "num_held_out": len(study.test),
            "classes": list(study.halves.classes),
        },
        "code": code_digest(),
        "config": config_digest(config),
        "num_random_inits": config.num_random_inits,
        "rows": study.rows,
        "differences": study.differences,
        "features": study.health,
        "per_class": study.per_class,
        "scenes": _scenes(study.dense),
        "choices": study.choices,
        "missing": study.missing,
    }
    content: dict[str, Any] = rounded(report)
    return content


def _scenes(dense: SceneStudy | None) -> dict[str, Any] | None:
    """What was segmented, and class by class how well."""
    if dense is None:
        return None
    return {
        "num_train": len(dense.scenes.train),
        "num_test": len(dense.scenes.test),
        "photographs": dense.scenes.photographs,
        "per_class": dense_per_class(dense.found, dense.scenes),
    }


def gather_pieces(
    candidate: Candidate,
    study: Study,
    table: pl.DataFrame,
    pictures: Gallery,
    config: EvalsConfig,
    stage: Stage,
) -> Pieces:
    """Pictures, curves and inputs for the page."""
    names, labels = table["path"].to_list(), table["label"].to_list()
    device = choose_device(config.run.device)
    return Pieces(
        neighbours=neighbour_rows(study, names, labels, pictures, config),
        patches=patch_pictures(candidate, study, names, labels, pictures, config, device),
        scenes=scene_picture(study.dense) if study.dense else None,
        curves=read_curves(candidate.weights.parent / EVENTS_NAME),
        edges=stage.edges,
    )


def name_backgrounds(stage: Stage, dense: SceneStudy | None, config: EvalsConfig) -> None:
    """Adds the edge to the photographs behind the scenes."""
    if dense is not None:
        kind = (config.composites.backgrounds or "scikit-image").partition(":")[0]
        stage.read_root("backgrounds", kind, dense.scenes.photographs, set())


def write_report(stage: Stage, report: Mapping[str, Any], pieces: Pieces) -> None:
    """Writes both files and what the record shall say of them."""
    atomic_write(stage.path(REPORT_NAME), canonical_json(report))
    atomic_write(stage.path(PAGE_NAME), render_page(report, pieces))
    k = headline_k(report["rows"])
    stage.facts = {
        "num_train": report["dataset"]["num_train"],
        "num_test": report["dataset"]["num_test"],
        "contamination": report["dataset"]["contamination"],
        "features": report["features"],
        "k": k,
        "knn_top_1": {row["subject"]: row["value"] for row in _headline_rows(report, k)},
    }


def read_table(path: Path) -> pl.DataFrame:
    """The image table, with the columns an evaluation needs.

    Raises:
        DataError: It is no parquet, or a column is missing.
    """
    return read_columns(path, COLUMNS, "an image table")


def knn_summary(report: Mapping[str, Any]) -> str:
    """A few lines for the terminal: the model's k-NN beside its three baselines.

    Args:
        report: The content of `report.json`.
    """
    k = headline_k(report["rows"])
    if not k:
        protocols: dict[str, list[str]] = {}
        for item in report["missing"]:
            protocols.setdefault(item["reason"], []).append(item["protocol"])
        reasons = (f"{', '.join(names)}: {reason}" for reason, names in protocols.items())
        return f"k-NN: not judged ({'; '.join(reasons)})"
    dataset = report["dataset"]
    rows = {row["subject"]: row for row in _headline_rows(report, k)}
    lines = [
        f"k-NN top-1 (k = {k}) of {dataset['num_test']} held-out pictures against "
        f"{dataset['num_train']}, {len(dataset['classes'])} classes; bootstrap 95 % in brackets"
    ]
    for subject in SUBJECTS:
        row = rows[subject]
        lines.append(f"  {subject:<15} {row['value']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
    for row in report["differences"]:
        if row["protocol"] == KNN and row["metric"] == TOP_1 and row["k"] == k:
            interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
            name = f"{MODEL} - {row['against']}"
            lines.append(f"  {name:<21} {row['value']:+.3f}  {interval}")
    return "\n".join(lines)


def summarise_file(path: Path) -> str:
    """The `knn_summary` of a report.json, or the `phases_table` of one that compares models.

    Raises:
        DataError: There is no such file, or it is no report.
    """
    if not path.is_file():
        msg = f"{path}: no report there. Make it first: dvc repro."
        raise DataError(msg)
    try:
        report = json.loads(path.read_bytes())
        if report["schema"] == PHASES_SCHEMA:
            return phases_table(report)
        if report["schema"] != SCHEMA:
            msg = f"{path}: not a report, got schema {report['schema']!r}. Give a report.json."
            raise DataError(msg)
        return knn_summary(report)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        msg = f"{path}: not a report of this program, got {error!r}. Give a report.json."
        raise DataError(msg) from error


def _headline_rows(report: Mapping[str, Any], k: int) -> list[dict[str, Any]]:
    return [
        row
        for row in report["rows"]
        if row["protocol"] == KNN and row["metric"] == TOP_1 and row["k"] == k
    ]


def _kept_rows(curated: pl.DataFrame, table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """What was trained on, with the pixel digests of the image table.

    Raises:
        DataError: The training data names images the table does not know.
    """
    kept = curated.filter(pl.col("kept")).select("path", "sha256")
    joined = kept.join(table.select("path", "pixel_sha256"), on="path", how="left")
    unknown = joined.filter(pl.col("pixel_sha256").is_null())
    if unknown.height:
        msg = (
            f"{path}: {unknown.height} images are not in the image table, got "
            f"{unknown['path'][0]!r} first. Curate again."
        )
        raise DataError(msg)
    return joined


def rounded(value: Any) -> Any:
    """A tree of figures as reports write them."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: rounded(below) for key, below in value.items()}
    if isinstance(value, list):
        return [rounded(below) for below in value]
    return value
