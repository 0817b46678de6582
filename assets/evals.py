"""Reports on every model; a new arm in `dvc.yaml` is a new asset."""

from assets.checks import report_bound
from orchestration.runner import stage_asset
from orchestration.stages import checkout_pipeline

eval_reports = [
    stage_asset(
        key, group="evals", kinds={"pytorch", "html"},
        checks={"bound": report_bound},
        description="k-NN, probes and retrieval beside random weights, pixels and majority class.",
    )
    for key in checkout_pipeline().arms("eval_reports")
]  # fmt: skip
