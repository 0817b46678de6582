"""Signed releases with their gates as checks, and how the published ones have fared since."""

from assets.judged import CHECKS
from orchestration.reevaluation import reevaluation_asset
from orchestration.runner import stage_asset
from orchestration.stages import checkout_pipeline

releases = [
    stage_asset(
        key, group="release", kinds={"safetensors", "json"},
        checks=CHECKS[key],
        description="Weights with their whole chain of records, gated and signed.",
    )
    for key in checkout_pipeline().arms("release")
]  # fmt: skip

reevaluations = reevaluation_asset(group="release", deps=checkout_pipeline().arms("release"))
