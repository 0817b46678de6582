r"""The stages of self-distillation: `pretrained_checkpoint`, `gram_checkpoint`, `highres_model`.

python -m dinov3 train pretrained_checkpoint --recipe demo --source folder:/my/pictures …
python -m dinov3 train gram_checkpoint --phase gram --init-from data/pretrained_checkpoint \\
        --gram-teacher data/gram_teacher …
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov3.config import TrainConfig, dump
from dinov3.data.loader import ImageSet
from dinov3.errors import ConfigError
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json
from dinov3.stage import Stage
from dinov3.train.build import needs_gram_backbone
from dinov3.train.frame import (
    CONFIG_NAME,
    TrainingInputs,
    TrainingStage,
    export_networks,
    export_snapshots,
    run_training,
    training_images,
)
from dinov3.train.init_from import load_gram_backbone, load_pair
from dinov3.train.self_distillation import SelfDistillationPhase
from dinov3.train.trainer import SNAPSHOTS, Method, Trainer


def train_phase(
    *,
    stage_name: str,
    inputs: TrainingInputs,
    output: Path,
    config: TrainConfig,
    init_from: Path | None = None,
    gram_teacher: Path | None = None,
    resume: Path | None = None,
) -> None:
    """Trains a phase and writes its files.

    Args:
        stage_name: Key of the stage.
        inputs: The training images.
        output: Folder of the result.
        config: The resolved recipe.
        init_from: Artifact the weights come from, where the recipe's `init` is not `random`.
        gram_teacher: Artifact of the Gram teacher, where `gram.teacher` is `checkpoint`.
        resume: A state to go on from, of this run or of a finished one to be extended.

    Raises:
        ConfigError: The recipe and the given artifacts contradict each other.
        Interrupted: Stopped by a signal; the same command goes on.
        TrainingDiverged: Non-finite or collapsed.
        DataError, CheckpointError, LineageBroken: Inputs or state that cannot be used.
    """
    check_inputs(config, init_from, gram_teacher)
    arguments = {
        **inputs.as_text(),
        "init_from": None if init_from is None else str(init_from),
        "gram_teacher": None if gram_teacher is None else str(gram_teacher),
    }
    run_training(
        TrainingStage(
            name=stage_name,
            outputs={"": (stage_name, output)},
            config=config,
            arguments=arguments,
            build=partial(build_phase, config=config, arguments=arguments),
            export=partial(_export, config=config),
            num_steps=config.schedules.num_steps,
            batch_size=config.optim.batch_size,
            snapshot_steps=config.snapshot_steps,
        ),
        resume=resume,
    )


def check_inputs(config: TrainConfig, init_from: Path | None, gram_teacher: Path | None) -> None:
    """Refuses artifacts the recipe does not ask for, and a recipe that lacks one.

    Raises:
        ConfigError: They contradict each other.
    """
    if (config.init == "random") != (init_from is None):
        msg = (
            f"init: random starts without an artifact and the others need one, got "
            f"init={config.init} and --init-from {init_from}. Correct one of them."
        )
        raise ConfigError(msg)
    asks = config.gram is not None and config.gram.teacher == "checkpoint"
    if asks != (gram_teacher is not None):
        teacher = None if config.gram is None else config.gram.teacher
        msg = (
            f"gram.teacher: checkpoint and --gram-teacher belong together, got {teacher} and "
            f"{gram_teacher}. Correct one of them."
        )
        raise ConfigError(msg)


def build_phase(
    stage: Stage, device: torch.device, *, config: TrainConfig, arguments: dict[str, Any]
) -> tuple[ImageSet, Method]:
    """Reads the inputs through the stage and builds the method at step 0."""
    images = training_images(stage, TrainingInputs.from_text(arguments))
    init_from, gram_from = arguments["init_from"], arguments["gram_teacher"]
    networks = None
    if init_from is not None:
        networks = load_pair(stage, Path(init_from), config)
    gram_backbone = None
    if needs_gram_backbone(config.gram):
        chosen = None if gram_from is None else Path(gram_from)
        gram_backbone = load_gram_backbone(stage, chosen, config)
    phase = SelfDistillationPhase(
        config, images, device, networks=networks, gram_backbone=gram_backbone
    )
    return images, phase


def _export(stage: Stage, name: str, trainer: Trainer, *, config: TrainConfig) -> None:
    export_networks(stage, trainer.final_state(), name)
    atomic_write(stage.path(CONFIG_NAME), canonical_json(dump(config)))
    if config.snapshot_steps:
        export_snapshots(stage, trainer.folder / SNAPSHOTS, config.snapshot_steps)
