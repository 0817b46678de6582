r"""Stage `dinotxt`: a text tower and a vision head learn to agree over a frozen backbone.

python -m dinov3 align dinotxt --recipe demo --source folder:/my/pictures \\
        --pairs data/caption_pairs/pairs.parquet --backbone data/highres_model …
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch

from dinov3 import hub
from dinov3.checkpoint import save_tensors
from dinov3.config import DinotxtConfig, dump
from dinov3.data.loader import ImageSet
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.errors import ConfigError, DataError
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, parse_json
from dinov3.stage import Stage
from dinov3.state import read_tensors
from dinov3.train.alignment_phase import AlignmentPhase
from dinov3.train.frame import BACKBONE_NAME, CONFIG_NAME, TrainingStage, run_training
from dinov3.train.text_probe import Captioned
from dinov3.train.trainer import Method, Trainer

WEIGHTS_NAME = "dinotxt.safetensors"
_COLUMNS = ("path", "sha256", "caption", "split")


@dataclass(frozen=True)
class AlignmentInputs:
    """Where the pairs and the backbone come from."""

    source: str
    pairs: Path
    backbone: Path

    def as_text(self) -> dict[str, str]:
        """As it is kept beside the state."""
        return {
            "source": self.source,
            "pairs": str(self.pairs),
            "backbone": str(self.backbone),
        }

    @classmethod
    def from_text(cls, text: Mapping[str, Any]) -> "AlignmentInputs":
        """From what `as_text` gave."""
        return cls(text["source"], Path(text["pairs"]), Path(text["backbone"]))


def align_text(
    *,
    stage_name: str,
    source: str,
    pairs: Path,
    backbone: Path,
    output: Path,
    config: DinotxtConfig,
    resume: Path | None,
) -> None:
    """Trains and writes `dinotxt.safetensors`, its config and the files of every training stage.

    Args:
        stage_name: Key of the stage.
        source: Of the pictures that the pairs name.
        pairs: `pairs.parquet` of `caption_pairs`; its training half is used.
        backbone: Folder of the artifact whose EMA teacher is aligned with.
        output: Folder of the result.
        config: The resolved recipe.
        resume: A state to go on from, of this run or of a finished one to be extended.

    Raises:
        ConfigError: The batch is larger than the table, or a width does not suit the backbone.
        Interrupted: Stopped by a signal; the same command goes on.
        TrainingDiverged: Non-finite.
        DataError, CheckpointError, LineageBroken: Inputs or state that cannot be used.
    """
    inputs = AlignmentInputs(source, pairs, backbone)
    run_training(
        TrainingStage(
            name=stage_name,
            outputs={"": (stage_name, output)},
            config=config,
            arguments=inputs.as_text(),
            build=partial(build_alignment, config=config, inputs=inputs),
            export=partial(_export, config=config, backbone=backbone),
            num_steps=config.schedules.num_steps,
            batch_size=config.optim.batch_size,
            weights_name=WEIGHTS_NAME,
        ),
        resume=resume,
    )


def build_alignment(
    stage: Stage, device: torch.device, *, config: DinotxtConfig, inputs: AlignmentInputs
) -> tuple[ImageSet, Method]:
    """Reads pairs and backbone through the stage and builds the method at step 0.

    Raises:
        ConfigError: The batch is larger than the table, or a width does not suit the backbone.
        DataError, CheckpointError, LineageBroken: Inputs that cannot be used.
    """
    pairs = read_pairs(stage, inputs.source, inputs.pairs)
    if len(pairs.captions) < config.optim.batch_size:
        msg = (
            "optim.batch_size: a pair must not stand in a batch twice, where it would repel "
            f"itself, got {config.optim.batch_size} for {len(pairs.captions)} pairs. "
            f"Use {len(pairs.captions)} or less, as overrides.dinotxt of params.yaml."
        )
        raise ConfigError(msg)
    for name in (BACKBONE_NAME, CONFIG_NAME):
        stage.read("backbone", inputs.backbone / name)
    backbone = hub.load(inputs.backbone, role="teacher")
    return pairs.images, AlignmentPhase(config, pairs, backbone, device)


def read_pairs(stage: Stage, source: str, path: Path) -> Captioned:
    """The training half of a table of caption pairs, one picture and caption per row.

    Raises:
        DataError: It lacks a column, or has fewer than two such pairs.
    """
    try:
        table = pl.read_parquet(stage.read("pairs", path))
    except pl.exceptions.PolarsError as error:
        msg = f"{path}: not a table of parquet, got {str(error)!r}. Make it anew."
        raise DataError(msg) from error
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        msg = f"{path}: got no column {', '.join(missing)}. Give pairs.parquet of caption_pairs."
        raise DataError(msg)
    table = table.filter(split="train")
    if table.height < 2:
        msg = f"{path}: too few pairs to train on, got {table.height}. Give more captions."
        raise DataError(msg)
    stage.facts["num_pairs"] = table.height
    images = SourceImages(open_source(source), table["path"].to_list(), table["sha256"].to_list())
    return Captioned(images, images.sha256, table["caption"].to_list())


def _export(
    stage: Stage, name: str, trainer: Trainer, *, config: DinotxtConfig, backbone: Path
) -> None:
    """All that was trained, by the names of a `DinoTxt`; the backbone stays where it is."""
    save_tensors(stage.path(WEIGHTS_NAME), read_tensors(trainer.final_state(), "student."))
    recipe = dump(config)
    described = {
        "model": recipe["model"],
        "backbone": parse_json((backbone / CONFIG_NAME).read_bytes())["model"],
        "crops": recipe["crops"],
    }
    atomic_write(stage.path(CONFIG_NAME), canonical_json(described))
