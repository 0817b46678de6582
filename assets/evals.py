"""Reports on every model; a new arm in `dvc.yaml` is a new asset."""

from assets.judged import CHECKS
from orchestration.runner import stage_asset
from orchestration.stages import checkout_pipeline

eval_reports = [
    stage_asset(
        key, group="evals", kinds={"pytorch", "html"},
        checks=CHECKS[key],
        description="k-NN, probes, segmentation and retrieval, with their baselines beside.",
    )
    for key in checkout_pipeline().arms("eval_reports")
]  # fmt: skip

eval_reports_dinotxt = stage_asset(
    "eval_reports_dinotxt", group="evals", kinds={"pytorch", "html"},
    checks=CHECKS["eval_reports_dinotxt"],
    description="Zero-shot classes, retrieval by text and open-vocabulary segmentation.",
)  # fmt: skip

eval_reports_phases = stage_asset(
    "eval_reports_phases", group="evals", kinds={"html"},
    checks=CHECKS["eval_reports_phases"],
    description="What each phase did to each metric and to the pictures of features.",
)  # fmt: skip
