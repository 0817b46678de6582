"""The other front door: what a shell's `dvc repro` made, Dagster learns from `dvc.lock`."""

from collections.abc import Iterator

import dagster as dg
from dagster import DagsterInstance, RunsFilter

from orchestration.events import is_news, root_events
from orchestration.lock import Lock, lock_digest, locked_outs, read_lock, version_tags
from orchestration.metadata import describe
from orchestration.stages import Pipeline

_INTERVAL = 30  # seconds
_RUNNING = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def dvc_lock_sensor(pipeline: Pipeline) -> dg.SensorDefinition:
    """A sensor that reports what is new in `dvc.lock`; its cursor is the digest of that file."""

    @dg.sensor(
        name="dvc_lock",
        minimum_interval_seconds=_INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports artifacts made by dvc outside Dagster.",
    )
    def dvc_lock(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        digest = lock_digest(pipeline.root)
        if digest == (context.cursor or ""):
            return dg.SkipReason("dvc.lock is as it was.")
        if _is_materializing(context.instance):
            return dg.SkipReason("A run is on its way and reports for itself.")
        reported = report_lock(context.instance, pipeline)
        context.update_cursor(digest)
        return dg.SkipReason(f"Reported from dvc.lock: {', '.join(reported) or 'nothing new'}.")

    return dvc_lock


def report_lock(instance: DagsterInstance, pipeline: Pipeline) -> list[str]:
    """Reports what Dagster does not know yet, upstream first; returns the keys reported."""
    lock = read_lock(pipeline.root)
    reported = []
    for event in _events(instance, pipeline, lock):
        instance.report_runless_asset_event(event)
        reported.append(event.asset_key.to_user_string())
    return reported


def _events(
    instance: DagsterInstance, pipeline: Pipeline, lock: Lock
) -> Iterator[dg.AssetMaterialization]:
    yield from root_events(instance, pipeline, pipeline.sources, lock)
    for stage in pipeline.stages.values():
        for artifact in stage.artifacts:
            made = bool(locked_outs(artifact, lock))
            tags = version_tags(pipeline, stage, artifact, lock) if made else {}
            if is_news(instance, artifact.key, tags):
                yield dg.AssetMaterialization(
                    artifact.key,
                    description="made by dvc outside Dagster",
                    metadata=describe(pipeline.root, artifact, lock),
                    tags=tags,
                )


def _is_materializing(instance: DagsterInstance) -> bool:
    return bool(instance.get_run_records(RunsFilter(statuses=_RUNNING), limit=1))
