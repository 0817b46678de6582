"""The stage `pretrained_checkpoint`: from a curated dataset to a backbone, its heads, its record.

    python -m dinov3 train pretrained_checkpoint --recipe demo --source folder:/my/pictures …

Resumable state lives in `<output's parent>/.state/<stage>/<key>/`, keyed by all that determines the
run; the same command continues, a changed key starts afresh and says so.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import torch

from dinov3.checkpoint import exclusive, save_tensors, state_path
from dinov3.config import TrainConfig, dump
from dinov3.data.loader import ImageSet
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.device import choose_device
from dinov3.errors import CheckpointError, DataError, TrainingDiverged
from dinov3.release.record import (
    RECORD_NAME,
    Edge,
    canonical_json,
    digest_of,
    file_sha256,
    read_record,
)
from dinov3.stage import BOARD_NAME, EVENTS_NAME, Stage, atomic_write, open_stage
from dinov3.train.trainer import Trainer

BACKBONE_NAME = "backbone.safetensors"
HEADS_NAME = "heads.safetensors"
HEALTH_NAME = "health.json"
_FINISHED = "finished"


def pretrain(
    *,
    stage_name: str,
    source: str,
    manifest: Path,
    dataset: Path,
    output: Path,
    config: TrainConfig,
    resume: Path | None = None,
) -> None:
    """Trains and writes the stage's files.

    Args:
        stage_name: Key of the stage.
        source: The images' source, `kind:path`.
        manifest: Table of all images.
        dataset: Table of the images to train on.
        output: Folder of the result.
        config: The resolved recipe.
        resume: A state to go on from, of this run or of a finished one to be extended.

    Raises:
        Interrupted: Stopped by a signal; the same command goes on.
        TrainingDiverged: Non-finite or collapsed.
        DataError, CheckpointError, LineageBroken: Inputs or state that cannot be used.
    """
    device = choose_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with open_stage(stage_name, output, config=dump(config)) as stage:
        stage.seeds = {"seed": config.seed}
        images = _training_images(stage, source, manifest, dataset)
        key = _run_key(stage, config, device)
        root = output.parent / ".state" / stage_name
        folder = root / key[:16]
        with exclusive(folder):
            trainer = Trainer(config, images, device, folder)
            _continue(trainer, stage, resume)
            try:
                trainer.run()
            except TrainingDiverged as error:
                _leave_verdict(output, config, trainer, str(error))
                raise
            _export(stage, trainer)
            stage.run_facts = {
                "device": device.type,
                "threads": torch.get_num_threads(),
                "interruptions": trainer.interruptions,
            }
    _keep_final_state(root, folder, trainer, output)


def _training_images(stage: Stage, source: str, manifest: Path, dataset: Path) -> ImageSet:
    stage.read("manifest", manifest)
    table = pl.read_parquet(stage.read("dataset", dataset))
    if "kept" not in table.columns:
        msg = (
            f"{dataset}: not a curated dataset, got columns {table.columns}. Give curated.parquet."
        )
        raise DataError(msg)
    table = table.filter(pl.col("kept"))
    if table.height < 2:
        msg = (
            f"{dataset}: too few images are kept to train on, got {table.height}. Loosen curation."
        )
        raise DataError(msg)
    stage.facts = {"num_images": table.height}
    return SourceImages(open_source(source), table["path"].to_list(), table["sha256"].to_list())


def _run_key(stage: Stage, config: TrainConfig, device: torch.device) -> str:
    """Digest of all that determines the bits: config, inputs, threads and the kind of device."""
    return digest_of(
        {
            "config": dump(config),
            "edges": [asdict(edge) for edge in stage.edges],
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
    )


def _continue(trainer: Trainer, stage: Stage, resume: Path | None) -> None:
    if resume is not None:
        _resume_explicitly(trainer, stage, resume)
    elif trainer.resume():
        _say(f"continuing at step {trainer.step} from {trainer.folder}")
    else:
        others = [path.name for path in trainer.folder.parent.glob("*/step_*.pt")]
        if others:
            _say("recipe, inputs, threads or device changed: starting afresh at step 0")


def _resume_explicitly(trainer: Trainer, stage: Stage, resume: Path) -> None:
    """The same run, or a finished one that only gets more steps."""
    here = resume.parent / RECORD_NAME
    if not here.is_file():
        if resume.resolve().parent != trainer.folder.resolve():
            msg = f"resume: state of another run, got {resume}. Choose one of {trainer.folder}."
            raise CheckpointError(msg)
        trainer.resume(resume)
        return
    record = read_record(here)
    changed = _differences(dict(record.config), dump(trainer.config))
    if any(not name.startswith("schedules.") for name in changed):
        msg = f"resume: the finished run had other settings, got {', '.join(changed)}. Undo them."
        raise CheckpointError(msg)
    if _same_file(stage.output / RECORD_NAME, here):
        msg = (
            f"resume: {stage.output} holds the finished run itself, which the longer one is made "
            "from. Choose another --output."
        )
        raise CheckpointError(msg)
    trainer.resume(resume)
    if trainer.step >= trainer.config.schedules.num_steps:
        msg = (
            f"resume: {resume.name} already has {trainer.step} steps, got schedules.num_steps="
            f"{trainer.config.schedules.num_steps}. Ask for more."
        )
        raise CheckpointError(msg)
    weights = record.outputs[BACKBONE_NAME]
    edge = Edge("resume", BACKBONE_NAME, weights.sha256, file_sha256(here))
    stage.add_edge(edge, record.licences.get("out", ()))
    _say(f"extending the finished run of {trainer.step} steps")


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and file_sha256(one) == file_sha256(other)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            names.append(f"{prefix}{name}")
    return names


def _verdict(config: TrainConfig, trainer: Trainer, reason: str | None) -> bytes:
    return canonical_json(
        {
            "passed": reason is None,
            "reason": reason,
            "step": trainer.step,
            "metrics": {name: round(value, 6) for name, value in trainer.health.items()},
            "thresholds": config.health.model_dump(mode="json"),
        }
    )


def _leave_verdict(output: Path, config: TrainConfig, trainer: Trainer, reason: str) -> None:
    """The only file a diverged run leaves in its output: why it was stopped."""
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / HEALTH_NAME, _verdict(config, trainer, reason))


def _export(stage: Stage, trainer: Trainer) -> None:
    """Writes EMA teacher and student, named so, and what belongs to them."""
    networks = {"teacher": trainer.method.teacher, "student": trainer.method.student}
    backbone, heads = {}, {}
    for role, network in networks.items():
        for name, tensor in network.state_dict().items():
            part, _, rest = name.partition(".")
            if part == "backbone":
                backbone[f"{role}.{rest}"] = tensor
            else:
                heads[f"{role}.{name}"] = tensor
    save_tensors(stage.path(BACKBONE_NAME), backbone)
    save_tensors(stage.path(HEADS_NAME), heads)
    config = trainer.config
    atomic_write(stage.path("config.json"), canonical_json(dump(config)))
    atomic_write(stage.path(HEALTH_NAME), _verdict(config, trainer, None))
    shutil.copyfile(trainer.folder / EVENTS_NAME, stage.path(EVENTS_NAME))
    board = stage.path(BOARD_NAME)
    board.mkdir()
    for number, path in enumerate(sorted((trainer.folder / BOARD_NAME).iterdir())):
        # the writer puts the host's name into the file's
        shutil.copyfile(path, board / f"events.out.tfevents.{number:06d}")
    stage.steps = {"planned": config.schedules.num_steps, "performed": trainer.step}


def _keep_final_state(root: Path, folder: Path, trainer: Trainer, output: Path) -> None:
    """The last state stays for those who extend the run; the rest has done its duty."""
    finished = root / _FINISHED
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    final = state_path(folder, trainer.step)
    final.replace(finished / final.name)
    shutil.copyfile(output / RECORD_NAME, finished / RECORD_NAME)
    shutil.rmtree(folder)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
