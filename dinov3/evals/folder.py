"""Judge any weights on any labelled folder: `python -m dinov3 eval`, without a pipeline around it.

    python -m dinov3 eval --model data/pretrained_checkpoint --train folder:/my/pictures
    python -m dinov3 eval --model dinov3_vits16 --weights FILE --train folder:A --test folder:B

Without a test source every picture falls into one half by the digest of its own pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image

from dinov3.config import EvalsConfig, dump
from dinov3.data.decode import UndecodableImage, decode_image, pixel_digest
from dinov3.data.sources import ImageSource, open_source, require_images
from dinov3.data.sources.paths import reason_of
from dinov3.device import choose_device
from dinov3.errors import DataError
from dinov3.evals.candidate import CONFIG_NAME, Candidate, open_candidate
from dinov3.evals.collection import JoinedPictures, Pictures, labelled_halves, require_no_overlap
from dinov3.evals.report import build_report, gather_pieces, name_backgrounds, write_report
from dinov3.evals.study import run_study
from dinov3.release.record import RECORD_NAME, digest_of, file_sha256
from dinov3.stage import Stage, open_stage

STAGE = "evaluation"

_TEST_SHARE = 0.5
_UNKNOWN_TRAINING = "none between the halves; what the model was trained on was not compared"
_SCHEMA = {
    "path": pl.String,
    "sha256": pl.String,
    "pixel_sha256": pl.String,
    "label": pl.String,
    "split": pl.String,
}


@dataclass(frozen=True)
class SourceImage:
    """One decodable image of a source."""

    path: str
    label: str | None
    sha256: str
    image: Image.Image


def evaluate_folder(
    *,
    model: str,
    weights: Path | None,
    train: str,
    test: str | None,
    output: Path | None,
    config: EvalsConfig,
) -> dict[str, Any]:
    """Judges a model on labelled pictures; returns the content of `report.json`.

    Args:
        model: Folder of a trained model, or a name of `dinov3.hub`.
        weights: File of a hub model's weights; None for a folder.
        train: Source of the pictures to look at; without `test` also of those to judge.
        test: Source of the pictures to judge.
        output: Folder for report.json, report.html and a record; None writes nothing.
        config: The resolved recipe.

    Raises:
        DataError: No picture can be read, or one stands in both halves.
        CheckpointError: The model cannot be used.
    """
    device = choose_device(config.run.device)
    candidate = open_candidate(model, weights, device)
    candidate.require_divisible(config.crop)
    specs = [train] if test is None else [train, test]
    sides = [None] if test is None else ["train", "test"]
    unreadable: Counter[str] = Counter()
    tables = [source_table(spec, side, unreadable) for spec, side in zip(specs, sides, strict=True)]
    table = pl.concat(tables)
    halves = labelled_halves(
        table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
    )
    require_no_overlap(table, halves)
    parts = [Pictures(spec, part) for spec, part in zip(specs, tables, strict=True)]
    pictures = JoinedPictures(parts)
    study = run_study(candidate, table, pictures, halves, config, device)
    digests = [digest_of(part.select("path", "sha256").rows()) for part in tables]
    dataset = {
        "sha256": digest_of(digests),
        "contamination": _UNKNOWN_TRAINING,
        "unreadable": dict(sorted(unreadable.items())),
    }
    report = build_report(STAGE, candidate, study, config, dataset)
    if output is not None:
        with open_stage(STAGE, output, config=dump(config)) as stage:
            stage.seeds = {"seed": config.seed}
            _name_inputs(stage, candidate, specs, digests)
            name_backgrounds(stage, study.dense, config)
            pieces = gather_pieces(candidate, study, table, pictures, config, stage)
            write_report(stage, report, pieces)
    return report


def source_table(spec: str, side: str | None, unreadable: Counter[str]) -> pl.DataFrame:
    """One row per decodable image of a source.

    Args:
        spec: `kind:path`.
        side: train or test; None splits by the digest of the pixels.
        unreadable: Grows by the reasons of images left out.

    Raises:
        DataError: There is no decodable image.
    """
    rows = []
    for found in read_images(spec, unreadable):
        pixels = pixel_digest(found.image)
        split = side or split_of(pixels)
        rows.append((found.path, found.sha256, pixels.hex(), found.label, split))
    if not rows:
        msg = f"source: no readable image, got {spec} ({dict(unreadable)}). Choose another source."
        raise DataError(msg)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def read_images(spec: str, unreadable: Counter[str]) -> Iterator[SourceImage]:
    """Decoded images of a source, streamed.

    Args:
        spec: `kind:path`.
        unreadable: Grows by the reasons of images left out.

    Raises:
        DataError: The source offers nothing at all.
    """
    source = open_source(spec)
    num_entries = 0
    for entry in source.entries():
        num_entries += 1
        if entry.refused is not None:
            unreadable[entry.refused.partition(":")[0]] += 1
            continue
        found = _decode(source, entry.path, unreadable)
        if found is not None:
            data_sha256, image = found
            yield SourceImage(entry.path, entry.label, data_sha256, image)
    require_images(spec, source, num_entries)


def split_of(pixel_sha256: bytes) -> str:
    """The half an image falls into, by its own pixels alone."""
    return "test" if int.from_bytes(pixel_sha256[:8], "big") < _TEST_SHARE * 2**64 else "train"


def _decode(
    source: ImageSource, path: str, unreadable: Counter[str]
) -> tuple[str, Image.Image] | None:
    try:
        data = source.read(path)
        return hashlib.sha256(data).hexdigest(), decode_image(data)
    except OSError as error:
        unreadable[reason_of(error)[0]] += 1
    except UndecodableImage as error:
        unreadable[error.reason] += 1
    return None


def _name_inputs(stage: Stage, candidate: Candidate, specs: list[str], digests: list[str]) -> None:
    weights = candidate.weights
    if (weights.parent / RECORD_NAME).is_file():
        stage.read("backbone", weights)
        stage.read("model config", weights.parent / CONFIG_NAME)
    else:
        stage.read_root("backbone", weights.name, file_sha256(weights), set())
    roles = ["pictures"] if len(specs) == 1 else ["training pictures", "test pictures"]
    for role, spec, digest in zip(roles, specs, digests, strict=True):
        stage.read_root(role, spec.partition(":")[0], digest, set())
