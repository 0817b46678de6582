"""`gram_teacher`: one of a run's EMA snapshots becomes the teacher of Gram anchoring (paper, 4).

    python -m dinov3 gram-teacher gram_teacher --recipe demo --source folder:/my/pictures …

Either a stated step, or the snapshot whose patches segment scenes best. The scenes are made of
training pictures alone, cut in two by their pixels; the held-out half is never opened.
"""

# N scenes

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from dinov3.config import GramTeacherConfig, dump
from dinov3.device import choose_device
from dinov3.errors import CheckpointError, DataError, LineageBroken
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME, Candidate, open_candidate
from dinov3.evals.collection import COLUMNS, Pictures, labelled_halves, read_columns
from dinov3.evals.composites import digest_half
from dinov3.evals.dense import (
    DENSE_PROTOCOLS,
    NEEDS_SHAPES,
    Dense,
    Pool,
    ScenePair,
    dense_score,
    judge_dense,
    scene_pair,
)
from dinov3.evals.features import Preparation
from dinov3.evals.segmentation import Floats, interval_of, mean_ious, scene_draws
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, RecordError, canonical_json, read_record
from dinov3.stage import Stage, open_stage

CHOICE_NAME = "choice.json"

_SNAPSHOT = re.compile(r"snapshots/step_(\d+)\.safetensors")
_DIGITS = 6  # of every figure, as in reports
_BACKGROUND = (255, 255, 255)  # scenes are opaque: nothing shows through


@dataclass(frozen=True)
class _Judged:
    """Every snapshot's results on the same scenes."""

    scenes: ScenePair
    found: Mapping[int, Dense]  # by step, ascending
    scores: Mapping[int, Floats]  # over drawn scenes, see `scene_draws`

    @property
    def best(self) -> int:
        """The step of the highest score; of equal ones the earliest."""
        return max(self.scores, key=lambda step: (self.scores[step][0], -step))


def choose_gram_teacher(
    *,
    stage_name: str,
    source: str,
    manifest: Path,
    checkpoint: Path,
    output: Path,
    config: GramTeacherConfig,
) -> None:
    """Writes the chosen snapshot as a backbone, its config, and why it was chosen.

    Args:
        stage_name: Key of the stage.
        source: The images' source, `kind:path`.
        manifest: Table of all images.
        checkpoint: Folder of the trained model, with `snapshots/step_….safetensors`.
        output: Folder of the result.
        config: The resolved recipe.

    Raises:
        CheckpointError: There is no such snapshot, or none at all.
        DataError: Inputs are missing, or no scenes can be made of them.
        LineageBroken: Bytes differ from a record.
    """
    device = choose_device(config.run.device)
    with open_stage(stage_name, output, config=dump(config)) as stage:
        stage.seeds = {"seed": config.seed}
        stage.read("model config", checkpoint / CONFIG_NAME)
        snapshots = find_snapshots(checkpoint)
        judged = None
        if config.choose == "best_dense":
            judged = _judge(stage, source, manifest, checkpoint, snapshots, config)
        step = judged.best if judged is not None else _stated_step(config, snapshots)
        if judged is None:
            _open(stage.read(_role(step), snapshots[step]), checkpoint, device)
        shutil.copyfile(snapshots[step], stage.path(BACKBONE_NAME))
        shutil.copyfile(checkpoint / CONFIG_NAME, stage.path(CONFIG_NAME))
        choice = _choice(step, list(snapshots), judged, config)
        atomic_write(stage.path(CHOICE_NAME), canonical_json(choice))
        stage.steps = {"chosen": step}
        stage.facts = {name: choice[name] for name in ("rule", "step", "score") if name in choice}


def find_snapshots(checkpoint: Path) -> dict[int, Path]:
    """The snapshots that a training run recorded, by step, ascending.

    Raises:
        DataError: There is no record.
        LineageBroken: The record cannot be read.
        CheckpointError: It names no snapshot.
    """
    path = checkpoint / RECORD_NAME
    if not path.is_file():
        msg = f"{path}: missing. Make it first: dvc repro {checkpoint.name}."
        raise DataError(msg)
    try:
        outputs = read_record(path).outputs
    except RecordError as error:
        raise LineageBroken(str(error)) from error
    found = {int(match[1]): checkpoint / name for name in outputs if (match := _match(name))}
    if not found:
        msg = f"{checkpoint}: kept no snapshots, got none in its record. Train with snapshot steps."
        raise CheckpointError(msg)
    return dict(sorted(found.items()))


def _match(name: str) -> re.Match[str] | None:
    return _SNAPSHOT.fullmatch(name)


def _role(step: int) -> str:
    return f"snapshot {step}"


def _stated_step(config: GramTeacherConfig, snapshots: Mapping[int, Path]) -> int:
    """By `step`, or the earliest where there is nothing to judge by."""
    step = min(snapshots) if config.choose == "best_dense" else config.step
    if step is None or step not in snapshots:
        known = ", ".join(str(one) for one in snapshots)
        msg = f"step: no snapshot was kept there, got {step}. Use one of {known}."
        raise CheckpointError(msg)
    return step


def _open(snapshot: Path, checkpoint: Path, device: torch.device) -> Candidate:
    """The snapshot as a model: linked into a folder of the form every model has."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / BACKBONE_NAME).symlink_to(snapshot.resolve())
        (folder / CONFIG_NAME).symlink_to((checkpoint / CONFIG_NAME).resolve())
        return open_candidate(folder, None, device)


def _judge(
    stage: Stage,
    source: str,
    manifest: Path,
    checkpoint: Path,
    snapshots: Mapping[int, Path],
    config: GramTeacherConfig,
) -> _Judged | None:
    """Every snapshot on the same scenes; None where there are none and the recipe goes on."""
    table = _training_rows(stage.read("manifest", manifest))
    scenes = _scenes(Pictures(source, table), table, config)
    if scenes is None:
        return None
    kind = (config.composites.backgrounds or "scikit-image").partition(":")[0]
    stage.read_root("backgrounds", kind, scenes.photographs, set())  # the choice copies nothing
    device = choose_device(config.run.device)
    found, scores = {}, {}
    for step, path in snapshots.items():
        candidate = _open(stage.read(_role(step), path), checkpoint, device)
        candidate.require_divisible(config.composites.size)
        found[step] = judge_dense(
            candidate.backbone,
            scenes,
            _as_it_is(candidate, config.composites.size),
            config.segmentation,
            batch_size=config.run.batch_size,
            device=device,
            seed=config.seed,
        )
        scores[step] = dense_score(found[step], config.num_bootstrap, config.seed)
    return _Judged(scenes, found, scores)


def _training_rows(manifest: Path) -> pl.DataFrame:
    table = read_columns(manifest, COLUMNS, "an image table")
    return table.filter(pl.col("split") != "test")


def _scenes(pictures: Pictures, table: pl.DataFrame, config: GramTeacherConfig) -> ScenePair | None:
    labelled = labelled_halves(
        table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
    )
    digests = table["pixel_sha256"].to_list()
    halves = np.array([digest_half(digests[place]) for place in labelled.train], dtype=np.int64)
    first, second = (
        Pool(labelled.train[halves == half], labelled.train_labels[halves == half])
        for half in (0, 1)
    )
    scenes = scene_pair(
        pictures.load, labelled.classes, first, second, config.composites, config.seed
    )
    if scenes is None and config.otherwise == "refuse":
        msg = f"choose: best_dense {NEEDS_SHAPES}, got none. Choose by step: choose=step step=…."
        raise DataError(msg)
    return scenes


def _as_it_is(candidate: Candidate, size: int) -> Preparation:
    return Preparation("crop", size, size, _BACKGROUND, candidate.mean, candidate.std)


def _choice(
    step: int, available: list[int], judged: _Judged | None, config: GramTeacherConfig
) -> dict[str, Any]:
    """The content of `choice.json`."""
    choice: dict[str, Any] = {"rule": config.choose, "step": step, "available": available}
    if judged is None:
        if config.choose == "best_dense":
            choice |= {"rule": config.otherwise, "reason": f"best_dense {NEEDS_SHAPES}"}
        return choice
    rows = [
        {
            "step": one,
            "score": _figures(scores),
            "minus_chosen": _figures(scores - judged.scores[step]),
            **{
                protocol: _figures(
                    scene_draws(
                        [judged.found[one].counts(protocol)],
                        mean_ious,
                        config.num_bootstrap,
                        config.seed,
                    )
                )
                for protocol in DENSE_PROTOCOLS
            },
        }
        for one, scores in judged.scores.items()
    ]
    return choice | {
        "score": _figures(judged.scores[step]),
        "snapshots": rows,
        "scenes": {
            "classes": list(judged.scenes.train.classes),
            "num_train": len(judged.scenes.train),
            "num_test": len(judged.scenes.test),
            "photographs": judged.scenes.photographs,
        },
    }


def _figures(draws: Floats) -> dict[str, float]:
    interval = interval_of(draws)
    return {
        "value": round(interval.mean, _DIGITS),
        "low": round(interval.low, _DIGITS),
        "high": round(interval.high, _DIGITS),
    }
