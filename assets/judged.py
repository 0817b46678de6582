"""Which checks judge which stage: one table, for what Dagster runs and for what a shell made."""

from collections.abc import Mapping

from assets.checks import (
    captions_whole,
    choice_bound,
    curation_sane,
    manifest_verdict,
    report_bound,
    training_health,
)
from assets.release_checks import gate_check, intact
from dinov3.release.policy import GATES
from orchestration.runner import Check
from orchestration.stages import checkout_pipeline

_HEALTH: Mapping[str, Check] = {"health": training_health}
_BOUND: Mapping[str, Check] = {"bound": report_bound}
_RELEASE: Mapping[str, Check] = {**{name: gate_check(name) for name in GATES}, "intact": intact}

# by the key of the stage; each check takes the folder of an artifact
CHECKS: Mapping[str, Mapping[str, Check]] = {
    "image_manifest": {"verdict": manifest_verdict},
    "curated_dataset": {"sane": curation_sane},
    "pretrained_checkpoint": _HEALTH,
    "gram_teacher": {"choice": choice_bound},
    "gram_checkpoint": _HEALTH,
    "highres_model": _HEALTH,
    "distilled_students": _HEALTH,
    "caption_pairs": {"whole": captions_whole},
    "dinotxt": _HEALTH,
    **dict.fromkeys(checkout_pipeline().arms("eval_reports"), _BOUND),
    "eval_reports_dinotxt": _BOUND,
    "eval_reports_phases": _BOUND,
    **dict.fromkeys(checkout_pipeline().arms("release"), _RELEASE),
}
