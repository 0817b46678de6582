"""`eval_reports_phases`: what each phase of training did, on the same pictures and scenes.

    pretrained ──► gram ──► highres ──► students        each against the model it began from

Every model is judged by all protocols of its own report; here they stand side by side, and their
differences are paired picture by picture and scene by scene.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from dinov3.config import EvalsConfig, config_digest, dump
from dinov3.device import choose_device
from dinov3.errors import CheckpointError, ConfigError
from dinov3.evals.baselines import random_init_name
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME, Candidate, open_candidate
from dinov3.evals.collection import Halves, Pictures
from dinov3.evals.features import Backbone
from dinov3.evals.phase_findings import (
    PHASES_SCHEMA,
    Phase,
    nearness,
    phase_differences,
    phase_rows,
)
from dinov3.evals.phase_page import PhasePieces, render_phases
from dinov3.evals.phase_pictures import phase_exhibits
from dinov3.evals.report import (
    PAGE_NAME,
    REPORT_NAME,
    name_backgrounds,
    read_collection,
    rounded,
)
from dinov3.evals.study import Gallery, Scope, Study, find_scenes, run_study
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, canonical_json, file_sha256, read_record
from dinov3.stage import Stage, code_digest, open_stage

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_INIT_ROLE = "init"  # of the edge from a training run to the weights it began from
_DISTILLATION = "distill"  # phase of a student's config


def compare_phases(
    stage_name: str,
    *,
    source: str,
    models: Sequence[tuple[str, Path]],
    manifest: Path,
    dataset: Path,
    output: Path,
    config: EvalsConfig,
) -> None:
    """Judges models side by side and writes report.json and report.html.

    Args:
        stage_name: Key of the stage.
        source: The images' source, `kind:path`.
        models: Name and folder of every model, in the order of training.
        manifest: Table of all images, with labels and split.
        dataset: Table of the images the models were trained on.
        output: Folder of the result.
        config: The resolved recipe.

    Raises:
        ConfigError: A name is given twice or is none, or there is no model.
        DataError: Inputs are missing, or a held-out image is in the training data.
        CheckpointError, LineageBroken: A model cannot be used, or bytes differ from a record.
    """
    _check_names(models)
    device = choose_device(config.run.device)
    with open_stage(stage_name, output, config=dump(config)) as stage:
        stage.seeds = {"seed": config.seed}
        phases = _open_phases(stage, models, device)
        table, halves = read_collection(stage, manifest, dataset, config)
        pictures = Pictures(source, table)
        studies = _judge(phases, table, pictures, halves, config, device)
        first = studies[phases[0].name]
        name_backgrounds(stage, first.dense, config)
        report = _build(stage_name, phases, studies, config)
        report["dataset"]["sha256"] = file_sha256(manifest)
        report["dataset"]["contamination"] = stage.contamination
        exhibits = phase_exhibits(
            phases, studies, table["path"].to_list(), pictures, config, device
        )
        classes = first.dense.scenes.test.classes if first.dense else ()
        pieces = PhasePieces(exhibits, classes, stage.edges)
        atomic_write(stage.path(REPORT_NAME), canonical_json(report))
        atomic_write(stage.path(PAGE_NAME), render_phases(report, pieces))
        stage.facts = {
            "models": [phase.name for phase in phases],
            "num_test": report["dataset"]["num_test"],
            "contamination": report["dataset"]["contamination"],
            "nearness": report["nearness"],
        }


def _check_names(models: Sequence[tuple[str, Path]]) -> None:
    names = [name for name, _ in models]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            rule = "names are letters, digits, _ . or -, each given once"
            msg = f"models: {rule}, got {name!r}. Rename it."
            raise ConfigError(msg)
    if not names:
        msg = "models: at least one is needed, got none. Name them: --model NAME=FOLDER."
        raise ConfigError(msg)


def _open_phases(
    stage: Stage, models: Sequence[tuple[str, Path]], device: torch.device
) -> list[Phase]:
    phases: list[Phase] = []
    by_digest: dict[str, str] = {}
    for name, folder in models:
        weights = stage.read(f"{name} backbone", folder / BACKBONE_NAME)
        path = stage.read(f"{name} config", folder / CONFIG_NAME)
        begun = [
            by_digest[edge.sha256]
            for edge in read_record(folder / RECORD_NAME).inputs
            if edge.role == _INIT_ROLE and edge.sha256 in by_digest
        ]
        before = phases[-1].name if phases else None
        previous = begun[0] if begun else before
        is_student = _phase_of(path) == _DISTILLATION
        phases.append(Phase(name, open_candidate(folder, None, device), previous, is_student))
        by_digest[file_sha256(weights)] = name
    return phases


def _phase_of(path: Path) -> str | None:
    """The recipe's phase; None where the config does not say."""
    try:
        phase: str | None = json.loads(path.read_bytes()).get("phase")
    except (ValueError, AttributeError) as error:
        msg = f"{path}: not the config of a model, got {error}. Export it again."
        raise CheckpointError(msg) from error
    return phase


def _judge(
    phases: Sequence[Phase],
    table: pl.DataFrame,
    pictures: Gallery,
    halves: Halves,
    config: EvalsConfig,
    device: torch.device,
) -> dict[str, Study]:
    for phase in phases:
        phase.candidate.require_divisible(config.crop)
    scenes, num = find_scenes(pictures, halves, config), config.num_random_inits
    return {
        phase.name: run_study(
            phase.candidate,
            table,
            pictures,
            halves,
            config,
            device,
            scope=Scope(baselines=_untrained(phase.candidate, num) if phase.is_student else {}),
            scenes=scenes,
        )
        for phase in phases
    }


def _untrained(candidate: Candidate, num: int) -> dict[str, Backbone]:
    return {random_init_name(seed): candidate.untrained(seed) for seed in range(num)}


def _build(
    stage_name: str, phases: Sequence[Phase], studies: Mapping[str, Study], config: EvalsConfig
) -> dict[str, Any]:
    """The content of `report.json`."""
    first = studies[phases[0].name]
    content: dict[str, Any] = rounded(
        {
            "schema": PHASES_SCHEMA,
            "stage": stage_name,
            "models": [
                {
                    **phase.candidate.identity(),
                    "name": phase.name,
                    "against": phase.previous,
                    "is_student": phase.is_student,
                    "features": studies[phase.name].health,
                }
                for phase in phases
            ],
            "dataset": {
                "num_train": len(first.halves.train),
                "num_test": len(first.halves.test),
                "num_held_out": len(first.test),
                "num_scenes": len(first.dense.scenes.test) if first.dense else 0,
                "classes": list(first.halves.classes),
            },
            "code": code_digest(),
            "config": config_digest(config),
            "num_random_inits": config.num_random_inits,
            "rows": phase_rows(phases, studies),
            "differences": phase_differences(phases, studies, config),
            "nearness": nearness(phases, studies, config),
            "missing": first.missing,
        }
    )
    return content
