"""The teacher: pre-trained, anchored by Gram, and adapted to high resolution."""

from assets.judged import CHECKS
from orchestration.runner import stage_asset

pretrained_checkpoint = stage_asset(
    "pretrained_checkpoint", group="teacher", kinds={"pytorch", "safetensors"},
    checks=CHECKS["pretrained_checkpoint"],
    description="Student and EMA teacher after pre-training with DINO, iBOT and KoLeo.",
)  # fmt: skip

gram_teacher = stage_asset(
    "gram_teacher", group="teacher", kinds={"safetensors"},
    checks=CHECKS["gram_teacher"],
    description="The EMA snapshot of pre-training whose dense features shall be kept, and why it.",
)  # fmt: skip

gram_checkpoint = stage_asset(
    "gram_checkpoint", group="teacher", kinds={"pytorch", "safetensors"},
    checks=CHECKS["gram_checkpoint"],
    description="Trained on with patch similarities anchored to those of the Gram teacher.",
)  # fmt: skip

highres_model = stage_asset(
    "highres_model", group="teacher", kinds={"pytorch", "safetensors"},
    checks=CHECKS["highres_model"],
    description="Adapted to a mixture of high resolutions.",
)  # fmt: skip
