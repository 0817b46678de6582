"""The other front door: what a shell's `dvc repro` made, Dagster learns from `dvc.lock`.

Its checks are told with it: the same functions of the same files as in a run of Dagster.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import psutil
from dagster import DagsterEventType, DagsterInstance, RunsFilter

from dinov3.release.record import RECORD_NAME
from orchestration.events import is_news, root_events
from orchestration.lock import Lock, lock_digest, locked_outs, read_lock, version_tags
from orchestration.metadata import describe
from orchestration.stages import Artifact, Pipeline

_NOT_JUDGED = (
    "Not judged: the files that dvc.lock names are not here. Materialize it to bring them."
)
_INTERVAL = 30  # seconds
_RUNNING = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class Judged(Protocol):
    """What a check says of the files of a stage."""

    @property
    def passed(self) -> bool:
        """Whether they are as they shall be."""
        ...

    @property
    def description(self) -> str:
        """Why, in a sentence."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Figures to show."""
        ...


Check = Callable[[Path], Judged]  # of the stage's folder
Checks = Mapping[str, Mapping[str, Check]]  # by the key of a stage and the name of the check


def dvc_lock_sensor(pipeline: Pipeline, checks: Checks | None = None) -> dg.SensorDefinition:
    """A sensor that reports what is new in `dvc.lock`; its cursor is the digest of that file.

    Args:
        pipeline: Of that lock.
        checks: Those that the assets of its stages have.
    """

    @dg.sensor(
        name="dvc_lock",
        minimum_interval_seconds=_INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports artifacts made by dvc outside Dagster, and their checks.",
    )
    def dvc_lock(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        digest = lock_digest(pipeline.root)
        if digest == (context.cursor or ""):
            return dg.SkipReason("dvc.lock is as it was.")
        if _is_materializing(context.instance):
            return dg.SkipReason("A run is on its way and reports for itself.")
        reported = report_lock(context.instance, pipeline, checks)
        context.update_cursor(digest)
        return dg.SkipReason(f"Reported from dvc.lock: {', '.join(reported) or 'nothing new'}.")

    return dvc_lock


def report_lock(
    instance: DagsterInstance, pipeline: Pipeline, checks: Checks | None = None
) -> list[str]:
    """Reports what Dagster does not know yet, upstream first, each artifact with its checks.

    Args:
        instance: To report to.
        pipeline: As it is written now.
        checks: See `dvc_lock_sensor`.

    Returns:
        The keys reported.
    """
    lock = read_lock(pipeline.root)
    reported = []
    for root in root_events(instance, pipeline, pipeline.sources, lock):
        instance.report_runless_asset_event(root)
        reported.append(root.asset_key.to_user_string())
    for stage in pipeline.stages.values():
        for artifact in stage.artifacts:
            made = bool(locked_outs(artifact, lock))
            tags = version_tags(pipeline, stage, artifact, lock) if made else {}
            if is_news(instance, artifact.key, tags):
                instance.report_runless_asset_event(_made(pipeline, artifact, lock, tags))
                judges = (checks or {}).get(stage.key, {})
                for evaluation in _evaluations(pipeline, artifact, lock, judges):
                    instance.report_runless_asset_event(evaluation)
                reported.append(artifact.key)
    return reported


def _made(
    pipeline: Pipeline, artifact: Artifact, lock: Lock, tags: Mapping[str, str]
) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        artifact.key,
        description="made by dvc outside Dagster",
        metadata=describe(pipeline.root, artifact, lock),
        tags=dict(tags),
    )


def _evaluations(
    pipeline: Pipeline, artifact: Artifact, lock: Lock, checks: Mapping[str, Check]
) -> Iterator[dg.AssetCheckEvaluation]:
    """What the checks say of an artifact.

    While other files lie in its folder, a warning: without one, Dagster would go on showing what
    was said of the artifact before.
    """
    key, is_there = dg.AssetKey(artifact.key), _is_there(pipeline, artifact, lock)
    for name, check in checks.items():
        if not is_there:
            warning = dg.AssetCheckSeverity.WARN
            yield dg.AssetCheckEvaluation(
                key, name, passed=False, description=_NOT_JUDGED, severity=warning
            )
            continue
        found = check(pipeline.root / artifact.folder)
        yield dg.AssetCheckEvaluation(
            key,
            name,
            passed=found.passed,
            description=found.description,
            metadata=dict(found.facts),
            blocking=True,
        )


def _is_there(pipeline: Pipeline, artifact: Artifact, lock: Lock) -> bool:
    """Whether the folder holds the record that dvc wrote down."""
    named = locked_outs(artifact, lock).get(f"{artifact.folder}/{RECORD_NAME}")
    path = pipeline.root / artifact.folder / RECORD_NAME
    if named is None or not path.is_file():
        return False
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == named


def _is_materializing(instance: DagsterInstance) -> bool:
    runs = instance.get_runs(RunsFilter(statuses=_RUNNING))
    return any(_has_process(instance, run.run_id) for run in runs)


def _has_process(instance: DagsterInstance, run_id: str) -> bool:
    """Whether a run's process is there: killed with the daemon, a run is called running for ever.

    Runs are processes of this machine, as the state of Dagster is a file of it.
    """
    started = instance.get_records_for_run(
        run_id, of_type={DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START}
    ).records
    if not started:
        return False
    entry = started[-1].event_log_entry
    pid = entry.get_dagster_event().pid
    try:
        return pid is None or psutil.Process(pid).create_time() <= entry.timestamp
    except psutil.NoSuchProcess:
        return False
