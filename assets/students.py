"""Students distilled together from one teacher: one run, an asset per student."""

from assets.judged import CHECKS
from orchestration.runner import stage_asset

distilled_students = stage_asset(
    "distilled_students", group="students", kinds={"pytorch", "safetensors"},
    checks=CHECKS["distilled_students"],
    description="A smaller model taught by the frozen teacher, beside its siblings in one run.",
)  # fmt: skip
