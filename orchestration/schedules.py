"""When published releases are judged again: every week, and when something is new.

Both are off until somebody switches them on in the UI: judging takes the device from whatever is
being trained there.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from dagster import DagsterInstance

from dinov3.release.record import digest_of
from orchestration.reevaluation import KEY, RELEASES, read_settings
from orchestration.stages import CHECKOUT

_WEEKLY = "0 5 * * 1"  # Monday, five in the morning, UTC
_INTERVAL = 600  # seconds

reevaluation_job = dg.define_asset_job(
    "reevaluate_releases",
    selection=dg.AssetSelection.assets(KEY),
    description="Judges one published release again; outside dvc.yaml, a partition per release.",
)


def weekly_reevaluation(root: Path = CHECKOUT) -> dg.ScheduleDefinition:
    """A schedule that re-evaluates every release in the store.

    Args:
        root: Folder of `params.yaml`.
    """

    @dg.schedule(
        name="weekly_reevaluation",
        job=reevaluation_job,
        cron_schedule=_WEEKLY,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Judges every published release again, Mondays at 05:00 UTC.",
    )
    def weekly(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        names = [entry.name for entry in read_settings(root).entries()]
        if not names:
            return dg.SkipReason("Nothing is published in the store yet.")
        _add_partitions(context.instance, names)
        moment = context.scheduled_execution_time.isoformat()
        return [dg.RunRequest(run_key=f"{moment} {name}", partition_key=name) for name in names]

    return weekly


def novelty_sensor(root: Path = CHECKOUT) -> dg.SensorDefinition:
    """A sensor that re-evaluates what is new: a release, or all releases on new pictures.

    Its cursor holds the fingerprint of the benchmark and the release digest by name.

    Args:
        root: Folder of `params.yaml`.
    """

    @dg.sensor(
        name="new_release_or_benchmark",
        job=reevaluation_job,
        minimum_interval_seconds=_INTERVAL,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Judges a release when it is published, and all when the benchmark changes.",
    )
    def novelty(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        settings = read_settings(root)
        benchmark = settings.fingerprint()
        if benchmark is None:
            return dg.SkipReason("The pipeline has not made the pictures to judge on yet.")
        seen = json.loads(context.cursor or '{"benchmark": null, "releases": {}}')
        known = seen["releases"] if seen["benchmark"] == benchmark else {}
        now = {entry.name: entry.digest for entry in settings.entries()}
        news = [name for name, digest in now.items() if known.get(name) != digest]
        if not news:
            return dg.SkipReason("No new release, and the benchmark is as it was.")
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(run_key=digest_of([benchmark, name, now[name]]), partition_key=name)
                for name in news
            ],
            dynamic_partitions_requests=[RELEASES.build_add_request(news)],
            cursor=json.dumps({"benchmark": benchmark, "releases": now}),
        )

    return novelty


def _add_partitions(instance: DagsterInstance, names: Sequence[str]) -> None:
    """A schedule's requests must name partitions that are there."""
    instance.add_dynamic_partitions(str(RELEASES.name), names)
