"""`eval_reports_dinotxt`: what a model of pictures and texts understands, with its baselines.

The protocols are those of zeroshot, text_retrieval and open_vocabulary, each with controls of its
own. `report.json` is canonical JSON without times or places: equal inputs give equal bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dinov3.config import EvalsConfig, config_digest, dump
from dinov3.device import choose_device
from dinov3.errors import LineageBroken
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME
from dinov3.evals.collection import (
    COLUMNS,
    KEPT_COLUMNS,
    Halves,
    Pictures,
    labelled_halves,
    read_columns,
    require_no_overlap,
)
from dinov3.evals.dinotxt import WEIGHTS_NAME, identity, open_dinotxt
from dinov3.evals.report import PAGE_NAME, REPORT_NAME
from dinov3.evals.study import Gallery
from dinov3.evals.text_page import TextPieces, render_text_page
from dinov3.evals.text_pictures import picture_queries, scene_rows, text_queries
from dinov3.evals.text_study import TextEvaluation, TextStudy
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import Stage, code_digest, open_stage

TEXT_SCHEMA = "dinov3.text_report/1"

_PAIR_COLUMNS = ("path", "sha256", "caption", "split")


@dataclass(frozen=True)
class TextInputs:
    """What is judged, and by what.

    Attributes:
        source: The images' source, `kind:path`.
        model: Folder of the trained dino.txt.
        backbone: Folder of the frozen backbone it was trained on.
        manifest: Table of all images, with labels and split.
        dataset: Table of the images the backbone was trained on.
        pairs: Table of pictures and captions the model was trained on and is judged by.
    """

    source: str
    model: Path
    backbone: Path
    manifest: Path
    dataset: Path
    pairs: Path


def make_text_report(
    stage_name: str, *, inputs: TextInputs, output: Path, config: EvalsConfig
) -> None:
    """Judges a trained dino.txt on held-out pictures and writes report.json and report.html.

    Args:
        stage_name: Key of the stage.
        inputs: What is judged, and by what.
        output: Folder of the result.
        config: The resolved recipe.

    Raises:
        DataError: Inputs are missing, or a held-out image is in the training data.
        CheckpointError: The model cannot be used.
        LineageBroken: Bytes differ from a record, or the backbone is another.
    """
    device = choose_device(config.run.device)
    with open_stage(stage_name, output, config=dump(config)) as stage:
        stage.seeds = {"seed": config.seed}
        table, kept, pairs = _read_inputs(stage, inputs)
        halves = labelled_halves(
            table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
        )
        seen = pl.concat([kept["sha256"], pairs.filter(split="train")["sha256"]]).unique()
        require_no_overlap(table, halves, table.filter(pl.col("sha256").is_in(seen.implode())))
        aligned = open_dinotxt(inputs.model, inputs.backbone, device)
        pictures = Pictures(inputs.source, table)
        evaluation = TextEvaluation(aligned, table, pictures, halves, config, device)
        study = evaluation.run(pairs.filter(split="test"), inputs.model.name)
        report = {
            "schema": TEXT_SCHEMA,
            "stage": stage_name,
            "model": identity(inputs.model, inputs.backbone),
            "dataset": {
                "sha256": file_sha256(inputs.manifest),
                "contamination": stage.contamination,
                **_dataset(halves, pairs, study),
            },
            "code": code_digest(),
            "config": config_digest(config),
            "rows": study.findings.rows,
            "differences": study.findings.differences,
            "per_class": study.per_class,
            "missing": study.missing,
        }
        _write(stage, report, study, pictures, config)


def _read_inputs(
    stage: Stage, inputs: TextInputs
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The image table, the rows the backbone was trained on, and the pairs; all checked."""
    stage.read("model", inputs.model / WEIGHTS_NAME)
    stage.read("model config", inputs.model / CONFIG_NAME)
    stage.read("backbone", inputs.backbone / BACKBONE_NAME)
    stage.read("backbone config", inputs.backbone / CONFIG_NAME)
    table = read_columns(stage.read("manifest", inputs.manifest), COLUMNS, "an image table")
    dataset = stage.read("dataset", inputs.dataset)
    kept = read_columns(dataset, KEPT_COLUMNS, "a curated dataset").filter("kept")
    pairs = read_columns(
        stage.read("pairs", inputs.pairs), _PAIR_COLUMNS, "a table of caption pairs"
    )
    _require_rows(kept, table, inputs.dataset)
    _require_rows(pairs, table, inputs.pairs)
    return table, kept, pairs


def _dataset(halves: Halves, pairs: pl.DataFrame, study: TextStudy) -> dict[str, Any]:
    """What was judged, and how many of its captions are no news."""
    lowered = pairs.with_columns(pl.col("caption").str.to_lowercase())
    train, test = (lowered.filter(split=half)["caption"].unique() for half in ("train", "test"))
    return {
        "num_train": len(halves.train),
        "num_test": len(halves.test),
        "classes": list(halves.classes),
        "num_test_pairs": pairs.filter(split="test").height,
        "num_test_captions": len(test),
        "captions_seen_in_training": int(test.is_in(train.implode()).sum()),
        **study.facts,
    }


def _write(
    stage: Stage,
    report: Mapping[str, Any],
    study: TextStudy,
    pictures: Gallery,
    config: EvalsConfig,
) -> None:
    """Writes both files and what the record shall say of them."""
    retrieval, segmentation = study.retrieval, study.segmentation
    pieces = TextPieces(
        picture_queries=picture_queries(retrieval, pictures, config) if retrieval else [],
        text_queries=text_queries(retrieval, pictures, config) if retrieval else [],
        scenes=scene_rows(segmentation) if segmentation else [],
        scene_classes=segmentation.scenes.classes if segmentation else (),
        edges=stage.edges,
    )
    atomic_write(stage.path(REPORT_NAME), canonical_json(report))
    atomic_write(stage.path(PAGE_NAME), render_text_page(report, pieces))
    figures: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        name = f"{row['protocol']} {row['metric']}"
        figures.setdefault(name, {})[row["subject"]] = row["value"]
    stage.facts = {
        "num_test": report["dataset"]["num_test"],
        "num_test_pairs": report["dataset"]["num_test_pairs"],
        "contamination": report["dataset"]["contamination"],
        "figures": figures,
    }


def _require_rows(rows: pl.DataFrame, table: pl.DataFrame, path: Path) -> None:
    """Refuses rows of images the table does not know: they could not be compared with it."""
    unknown = rows.join(table, on=["path", "sha256"], how="anti")
    if unknown.height:
        msg = (
            f"{path}: {unknown.height} rows are of images the image table does not know, got "
            f"{unknown['path'][0]!r} first. Make it anew."
        )
        raise LineageBroken(msg)
