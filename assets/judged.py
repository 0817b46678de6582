"""Which checks judge which stage: one table, for what Dagster runs and for what a shell made."""

from collections.abc import Mapping
from functools import wraps
from pathlib import Path

from assets.checks import (
    captions_whole,
    choice_bound,
    curation_sane,
    manifest_verdict,
    report_bound,
    training_health,
)
from assets.release_checks import gate_check, intact
from dinov3.errors import DinoError
from dinov3.release.policy import GATES
from orchestration.runner import Check, Judgement
from orchestration.stages import checkout_pipeline


def _red_when_unreadable(check: Check) -> Check:
    """A file that a stage left otherwise is a red verdict; a crash would leave the last one."""

    @wraps(check)
    def judge(folder: Path) -> Judgement:
        from polars.exceptions import PolarsError

        try:
            return check(folder)
        except (DinoError, PolarsError, OSError, LookupError, TypeError, ValueError) as error:
            return Judgement(False, f"A file is not as its stage writes it, got {error!r}.")

    return judge


_HEALTH: Mapping[str, Check] = {"health": training_health}
_BOUND: Mapping[str, Check] = {"bound": report_bound}
_RELEASE: Mapping[str, Check] = {**{name: gate_check(name) for name in GATES}, "intact": intact}

# by the key of the stage; each check takes the folder of an artifact
_WRITTEN: Mapping[str, Mapping[str, Check]] = {
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
CHECKS: Mapping[str, Mapping[str, Check]] = {
    key: {name: _red_when_unreadable(check) for name, check in checks.items()}
    for key, checks in _WRITTEN.items()
}
