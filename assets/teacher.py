"""The teacher: a backbone pre-trained on the curated dataset."""

from assets.checks import training_health
from orchestration.runner import stage_asset

pretrained_checkpoint = stage_asset(
    "pretrained_checkpoint", group="teacher", kinds={"pytorch", "safetensors"},
    checks={"health": training_health},
    description="Student and EMA teacher after pre-training with DINO, iBOT and KoLeo.",
)  # fmt: skip
