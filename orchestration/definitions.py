"""Composition root: everything that Dagster shows, from `dvc.yaml` and `assets/`.

    dagster dev -w workspace.yaml

Steps run in the process of their run: they only wait for dvc, and a process per step would cost
ten seconds of imports each.
"""

import dagster as dg

from assets import data, evals, release, students, teacher, text
from assets.judged import CHECKS
from orchestration.reevaluation import KEY
from orchestration.runner import StageRunner
from orchestration.schedules import novelty_sensor, reevaluation_job, weekly_reevaluation
from orchestration.stages import checkout_pipeline
from orchestration.versions import dvc_lock_sensor

everything = dg.define_asset_job(
    "everything",
    selection=dg.AssetSelection.all().materializable() - dg.AssetSelection.assets(KEY),
    description="All artifacts; what is up to date is not made again.",
)

defs = dg.Definitions(
    assets=dg.load_assets_from_modules([data, teacher, students, text, evals, release]),
    jobs=[everything, reevaluation_job],
    schedules=[weekly_reevaluation()],
    sensors=[dvc_lock_sensor(checkout_pipeline(), CHECKS), novelty_sensor()],
    resources={"runner": StageRunner()},
    executor=dg.in_process_executor,
)
