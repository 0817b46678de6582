"""Text aligned with the frozen backbone."""

from assets.judged import CHECKS
from orchestration.runner import stage_asset

caption_pairs = stage_asset(
    "caption_pairs", group="text", kinds={"polars", "parquet"},
    checks=CHECKS["caption_pairs"],
    description="Pictures with a line of text each; what was left out is counted by reason.",
)  # fmt: skip

dinotxt = stage_asset(
    "dinotxt", group="text", kinds={"pytorch", "safetensors"},
    checks=CHECKS["dinotxt"],
    description="Text tower and vision head, trained to agree over the frozen backbone.",
)  # fmt: skip
