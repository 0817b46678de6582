"""The stage `distilled_students`: one folder, record and log per student, from one run.

python -m dinov3 distill distilled_students --teacher data/highres_model --recipe demo …
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov3 import hub
from dinov3.config import DistillConfig, HeadConfig, HeadsConfig, dump
from dinov3.data.loader import ImageSet
from dinov3.errors import CheckpointError, ConfigError
from dinov3.models.convnext import ConvNeXtConfig
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import Stage
from dinov3.train.build import build_network
from dinov3.train.distillation import DistillationPhase
from dinov3.train.frame import (
    CONFIG_NAME,
    TrainingInputs,
    TrainingStage,
    export_networks,
    run_training,
    training_images,
)
from dinov3.train.init_from import BACKBONE_NAME, UNKNOWN_LICENCE, load_network
from dinov3.train.network import Network
from dinov3.train.trainer import Method, Trainer


def distill_students(
    *,
    stage_name: str,
    inputs: TrainingInputs,
    teacher: Path,
    output: Path,
    config: DistillConfig,
    teacher_arch: str | None = None,
    resume: Path | None = None,
) -> None:
    """Trains all students of the recipe and writes a folder for each.

    Args:
        stage_name: Key of the stage; a student's artifact is called `<stage_name>_<student>`.
        inputs: The training images.
        teacher: Folder of our artifact, whose EMA teaches, or a published file of a backbone.
        output: Holds the students' folders.
        config: The resolved recipe.
        teacher_arch: Name of the published architecture, for a file.
        resume: A state to go on from.

    Raises:
        ConfigError: Teacher and students do not fit each other.
        Interrupted: Stopped by a signal; the same command goes on.
        TrainingDiverged: Non-finite or collapsed.
        DataError, CheckpointError, LineageBroken: Inputs or state that cannot be used.
    """
    arguments = {
        **inputs.as_text(),
        "teacher": str(teacher),
        "teacher_arch": teacher_arch,
    }
    run_training(
        TrainingStage(
            name=stage_name,
            outputs={name: (f"{stage_name}_{name}", output / name) for name in config.students},
            config=config,
            arguments=arguments,
            build=partial(build_distillation, config=config, arguments=arguments),
            export=partial(_export, config=config),
            num_steps=config.schedules.num_steps,
            batch_size=config.batch_size,
        ),
        resume=resume,
    )


def build_distillation(
    stage: Stage, device: torch.device, *, config: DistillConfig, arguments: dict[str, Any]
) -> tuple[ImageSet, Method]:
    """Reads the inputs through the stage and builds the method at step 0."""
    images = training_images(stage, TrainingInputs.from_text(arguments))
    source = Path(arguments["teacher"])
    teacher = open_teacher(stage, source, config, arguments.get("teacher_arch"))
    patch = teacher.backbone.stride
    check_grids(config, patch)
    phase = DistillationPhase(config, images, device, teacher=teacher, teacher_patch=patch)
    return images, phase


def check_grids(config: DistillConfig, teacher_patch: int) -> None:
    """Refuses students whose feature map is not the teacher's, place by place.

    Raises:
        ConfigError: A crop gives another grid than the teacher's, or the teacher's is uneven.
    """
    size = config.crops.global_size
    if size % teacher_patch:
        msg = (
            f"crops.global_size: not a multiple of the teacher's patch {teacher_patch}, got "
            f"{size}. Round it."
        )
        raise ConfigError(msg)
    for name, student in config.students.items():
        wanted = size // teacher_patch * student.model.stride
        if student.crops.global_size != wanted:
            msg = (
                f"students.{name}.crops.global_size: the teacher's grid of {size // teacher_patch} "
                f"patches a side needs {wanted} pixels at stride {student.model.stride}, got "
                f"{student.crops.global_size}. Set it."
            )
            raise ConfigError(msg)


def open_teacher(
    stage: Stage, source: Path, config: DistillConfig, arch: str | None = None
) -> Network:
    """The teacher with its heads, where the objective needs them.

    Args:
        stage: Gets the edges.
        source: Folder of an artifact, or a published file of a backbone.
        config: `objective` says whether heads are needed.
        arch: Name of the published architecture; for a file alone.

    Raises:
        CheckpointError: The source is no artifact of ours, or does not hold what is needed.
        ConfigError: Students have other prototypes than the teacher, or the file's architecture is
            not named.
    """
    if (arch is None and source.is_file()) or (arch is not None and source.is_dir()):
        msg = (
            f"--teacher-arch: goes with a file of weights and with nothing else, got {arch} for "
            f"{source}. Name the file's architecture, as dinov3_vitl16; leave it out for a folder."
        )
        raise ConfigError(msg)
    if arch is not None:
        return _published_teacher(stage, source, config, arch)
    return _own_teacher(stage, source, config)


def _published_teacher(stage: Stage, path: Path, config: DistillConfig, arch: str) -> Network:
    if config.objective == "heads":
        msg = f"objective: {path.name} comes without heads, got heads. Set objective=features."
        raise ConfigError(msg)
    backbone = hub.load_backbone(path, arch, device="cpu")
    stage.read_root("teacher", path.name, file_sha256(path), {UNKNOWN_LICENCE})
    family = "convnext" if isinstance(backbone.config, ConvNeXtConfig) else "vit"
    fields = {"arch": family, **dataclasses.asdict(backbone.config)}
    teacher = build_network(fields, _placeholder_heads(), "meta")  # its weights exist already
    teacher.backbone = backbone
    for head in (teacher.dino_head, teacher.ibot_head):
        head.to_empty(device="cpu")
    return teacher


def _own_teacher(stage: Stage, folder: Path, config: DistillConfig) -> Network:
    path = stage.read("teacher config", folder / CONFIG_NAME)
    if not (folder / BACKBONE_NAME).is_file():
        msg = f"{folder}: no {BACKBONE_NAME} there, got {folder}. Give the folder of a backbone."
        raise CheckpointError(msg)
    content = json.loads(path.read_bytes())
    with_heads = config.objective == "heads"
    heads = _heads_of(content, path) if with_heads else _placeholder_heads()
    teacher = build_network(content["model"], heads)
    load_network(stage, folder, teacher, with_heads=with_heads)
    if with_heads:
        _check_prototypes(config, heads)
    return teacher


def _heads_of(content: dict[str, Any], path: Path) -> HeadsConfig:
    if "heads" not in content:
        msg = f"{path}: the teacher comes without heads, got objective=heads. Set features."
        raise CheckpointError(msg)
    return HeadsConfig.model_validate_json(json.dumps(content["heads"]))


def _placeholder_heads() -> HeadsConfig:
    """Heads that nothing looks at: the smallest there are."""
    head = HeadConfig(num_prototypes=1, num_layers=1, hidden_dim=1, bottleneck_dim=1)
    return HeadsConfig(dino=head, ibot=head, last_layer_gain=1.0)


def _check_prototypes(config: DistillConfig, heads: HeadsConfig) -> None:
    for name, student in config.students.items():
        for kind in ("dino", "ibot"):
            ours = getattr(student.heads, kind).num_prototypes
            theirs = getattr(heads, kind).num_prototypes
            if ours != theirs:
                msg = (
                    f"students.{name}.heads.{kind}.num_prototypes: must be the teacher's {theirs}, "
                    f"got {ours}. Set it."
                )
                raise ConfigError(msg)


def _export(stage: Stage, name: str, trainer: Trainer, *, config: DistillConfig) -> None:
    """Weights of one student and a config that says all that opening it needs."""
    export_networks(stage, trainer.final_state(), name)
    student = config.students[name]
    content = {
        "phase": config.phase,
        "student": name,
        "model": student.model.model_dump(mode="json"),
        "heads": student.heads.model_dump(mode="json"),
        "objective": config.objective,
        "crops": {
            **config.crops.model_dump(mode="json"),
            **student.crops.model_dump(mode="json"),
        },
        # pixels of the student's crop for one of the teacher's
        "evaluation_scale": student.crops.global_size / config.crops.global_size,
        "recipe": dump(config),
    }
    atomic_write(stage.path(CONFIG_NAME), canonical_json(content))
