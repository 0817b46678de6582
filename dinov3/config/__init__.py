"""What a recipe may say: one typed, frozen tree per phase; unknown keys are refused.

`run:` cannot change results and stays outside the digest. `dinov3.recipe` reads the YAML files.
"""

from typing import TypeAlias

from dinov3.config.base import Colour, InferenceRun, Section, config_digest, dump
from dinov3.config.data import (
    CurationConfig,
    DedupConfig,
    EmbeddingsConfig,
    ExpectationsConfig,
    ManifestConfig,
    SplitConfig,
)
from dinov3.config.distill import DistillConfig, StudentConfig
from dinov3.config.evals import (
    CompositesConfig,
    EvalsConfig,
    GramTeacherConfig,
    SegmentationConfig,
)
from dinov3.config.models import AnyModel, ConvNextModel, HeadConfig, HeadsConfig, VitModel
from dinov3.config.reevaluation import ReevaluationConfig
from dinov3.config.release import (
    CardConfig,
    PolicyConfig,
    ReleaseConfig,
    ThresholdConfig,
    resolved_policy,
)
from dinov3.config.schedules import ComputeConfig, HealthConfig, ScheduleConfig, TrainRun
from dinov3.config.text import AlignmentHealth, CaptionsConfig, DinotxtConfig
from dinov3.config.train import (
    CropsConfig,
    GramConfig,
    LossesConfig,
    MultiCropConfig,
    RefreshConfig,
    Resolution,
    TrainConfig,
)

TrainingConfig: TypeAlias = TrainConfig | DistillConfig | DinotxtConfig
"""A phase that trains; each has seed, compute, health and run."""

type_of_phase: dict[str, type[Section]] = {
    "manifest": ManifestConfig,
    "embeddings": EmbeddingsConfig,
    "curation": CurationConfig,
    "pretrain": TrainConfig,
    "gram_teacher": GramTeacherConfig,
    "gram": TrainConfig,
    "highres": TrainConfig,
    "distill": DistillConfig,
    "captions": CaptionsConfig,
    "dinotxt": DinotxtConfig,
    "evals": EvalsConfig,
    "release": ReleaseConfig,
    "reevaluation": ReevaluationConfig,
}

__all__ = [
    "AlignmentHealth",
    "AnyModel",
    "CaptionsConfig",
    "CardConfig",
    "Colour",
    "CompositesConfig",
    "ComputeConfig",
    "ConvNextModel",
    "CropsConfig",
    "CurationConfig",
    "DedupConfig",
    "DinotxtConfig",
    "DistillConfig",
    "EmbeddingsConfig",
    "EvalsConfig",
    "ExpectationsConfig",
    "GramConfig",
    "GramTeacherConfig",
    "HeadConfig",
    "HeadsConfig",
    "HealthConfig",
    "InferenceRun",
    "LossesConfig",
    "ManifestConfig",
    "MultiCropConfig",
    "PolicyConfig",
    "ReevaluationConfig",
    "RefreshConfig",
    "ReleaseConfig",
    "Resolution",
    "ScheduleConfig",
    "Section",
    "SegmentationConfig",
    "SplitConfig",
    "StudentConfig",
    "ThresholdConfig",
    "TrainConfig",
    "TrainRun",
    "TrainingConfig",
    "VitModel",
    "config_digest",
    "dump",
    "resolved_policy",
    "type_of_phase",
]
