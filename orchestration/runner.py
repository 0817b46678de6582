"""Materializing a stage is running it through dvc, as a shell would; this is the bridge.

Dagster Pipes is left out on purpose: the core speaks files (`record.json`, `events.jsonl`) and
plain lines on stderr, and dvc may restore a stage without running it, so what there is to say is
read after dvc ended, in one way for a stage that ran, was restored or had nothing to do.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from dinov3.errors import Interrupted, JudgementFailed, LineageBroken
from dinov3.launch import DEFAULT_GRACE, start, stop
from orchestration.events import root_events
from orchestration.lock import DATA_VERSION, Lock, code_version, read_lock, version_tags
from orchestration.metadata import describe
from orchestration.output import LINES_SHOWN, follow
from orchestration.rwlock import remove_stale_locks
from orchestration.stages import CHECKOUT, Artifact, Pipeline, PipelineStage, checkout_pipeline

_EXIT = re.compile(r"exited with (-?\d+)\s*$", re.MULTILINE)
_MISSING = re.compile(r"No such file or directory: '([^']+)'|missing data '[^']*': (\S+)")
_BUSY = "is busy, it is being blocked by"
_DONE = {
    "didn't change, skipping": "up to date",
    "is cached - skipping run": "restored",
    "Running stage": "ran",
}
_ADVICE = {
    2: "It cannot be done as asked; the last line says what to change.",
    JudgementFailed.exit_code: "Its own checks refuse the result; nothing downstream was made.",
    LineageBroken.exit_code: "It failed, or an input differs from its record; see the last lines.",
    Interrupted.exit_code: "It was interrupted; materialize it again to go on where it stopped.",
}


@dataclass(frozen=True)
class Judgement:
    """What a check says of the files of a stage."""

    passed: bool
    description: str
    facts: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[Path], Judgement]  # of the stage's folder


@dataclass(frozen=True)
class Outcome:
    """How dvc ended and what was said meanwhile."""

    code: int
    text: str
    seconds: float

    @property
    def done(self) -> str:
        """`ran`, `restored` from the cache, or `up to date`."""
        return next((word for mark, word in _DONE.items() if mark in self.text), "unknown")

    @property
    def is_busy(self) -> bool:
        """Another process reads what this one writes, or writes what it reads."""
        return bool(self.code) and _BUSY in self.text

    @property
    def stage_code(self) -> int | None:
        """Exit code of the stage's own command, None when it was not the command that failed."""
        found = _EXIT.findall(self.text)
        return int(found[-1]) if self.code and found else None


class StageRunner(dg.ConfigurableResource):
    """Runs stages by dvc; whoever stops or kills us, nothing of them is left.

    Attributes:
        dvc: The command; relative paths are taken from the checkout.
        grace_seconds: Time in which a stopped stage may save its state.
        log_seconds: Output reaches Dagster's log at most this often.
        max_retries: How often a stage is tried again while another process holds its files.
        retry_seconds: Time between two such tries.
    """

    dvc: str = "tools/dvc"
    grace_seconds: float = DEFAULT_GRACE
    log_seconds: float = 2.0
    max_retries: int = 60
    retry_seconds: float = 10.0

    def repro(self, stage: PipelineStage, root: Path, log: Callable[[str], None]) -> Outcome:
        """Runs one stage and passes on its output; stops the whole tree on any exception."""
        remove_stale_locks(root)
        started = time.monotonic()
        command = [str(CHECKOUT / self.dvc), "--wait-for-lock", "repro", "-s", stage.name]
        with tempfile.TemporaryFile() as output:
            process = start(
                command, output=output, cwd=root, env=_environment(), grace=self.grace_seconds
            )
            try:
                text = follow(process, output, log, self.log_seconds)
            finally:
                stop(process, self.grace_seconds)
                remove_stale_locks(root)
        return Outcome(process.returncode, text, time.monotonic() - started)


def stage_asset(
    key: str,
    *,
    group: str,
    kinds: set[str],
    description: str,
    checks: Mapping[str, Check] | None = None,
    pipeline: Pipeline | None = None,
) -> dg.AssetsDefinition:
    """The assets of a stage, one per artifact; commands, paths and edges come from `dvc.yaml`.

    One run of the stage makes all of its artifacts, so that they are selected together.

    Args:
        key: Key of the stage.
        group: Chapter of the graph.
        kinds: Badges in the UI.
        description: One sentence, the same for each artifact.
        checks: Name to function of an artifact's folder. They block: a red one stops downstream.
            They run inside the step, so that a stage which refuses its own result shows them too.
        pipeline: None for that of this checkout.
    """
    graph = pipeline or checkout_pipeline()
    stage, judges = graph.stage(key), checks or {}

    @dg.multi_asset(
        name=key,
        specs=[
            _spec(graph, stage, artifact).replace_attributes(
                group_name=group, kinds=kinds, description=description
            )
            for artifact in stage.artifacts
        ],
        check_specs=[
            dg.AssetCheckSpec(name, asset=artifact.key, blocking=True, description=check.__doc__)
            for artifact in stage.artifacts
            for name, check in judges.items()
        ],
    )
    def materialize(context: dg.AssetExecutionContext, runner: StageRunner) -> Iterator[Any]:
        outcome = runner.repro(stage, graph.root, context.log.info)
        if outcome.is_busy:
            raise dg.RetryRequested(runner.max_retries, runner.retry_seconds)
        yield from _report(context.instance, graph, stage, judges, outcome)

    return materialize


def _spec(graph: Pipeline, stage: PipelineStage, artifact: Artifact) -> dg.AssetSpec:
    """What `dvc.yaml` and the code say of an artifact."""
    return dg.AssetSpec(
        artifact.key,
        deps=[*stage.upstream, *stage.roots],
        code_version=code_version(graph, stage),
        metadata={"command": stage.command, "outputs": "\n".join(artifact.outs)},
        skippable=True,  # a failed stage makes nothing
    )


def _report(
    instance: dg.DagsterInstance,
    graph: Pipeline,
    stage: PipelineStage,
    checks: Mapping[str, Check],
    outcome: Outcome,
) -> Iterator[Any]:
    """What Dagster is told after dvc ended; a failure shows the verdicts and makes nothing."""
    judged = {one.key: _judge(graph.root, one, checks, outcome) for one in stage.artifacts}
    if outcome.code:
        yield from (result for results in judged.values() for result in results)
        raise _failure(stage, outcome)
    lock = read_lock(graph.root)
    yield from root_events(instance, graph, stage.roots, lock)
    for artifact in stage.artifacts:
        yield _result(graph, stage, artifact, lock, outcome, judged[artifact.key])


def _judge(
    root: Path, artifact: Artifact, checks: Mapping[str, Check], outcome: Outcome
) -> list[dg.AssetCheckResult]:
    """After a refusal the stage leaves its verdict in the folder; after other failures, nothing."""
    if outcome.code and outcome.stage_code != JudgementFailed.exit_code:
        return []
    return [
        check_result(artifact.key, name, check(root / artifact.folder))
        for name, check in checks.items()
    ]


def _result(
    graph: Pipeline,
    stage: PipelineStage,
    artifact: Artifact,
    lock: Lock,
    outcome: Outcome,
    judged: Sequence[dg.AssetCheckResult],
) -> dg.MaterializeResult:
    """What Dagster keeps of an artifact that dvc has made."""
    tags = version_tags(graph, stage, artifact, lock)
    return dg.MaterializeResult(
        asset_key=artifact.key,
        metadata={
            "dvc": outcome.done,
            "seconds": round(outcome.seconds, 1),
            **describe(graph.root, artifact, lock),
        },
        data_version=dg.DataVersion(tags[DATA_VERSION]),
        tags=tags,
        check_results=judged,
    )


def check_result(key: str, name: str, judgement: Judgement) -> dg.AssetCheckResult:
    """A judgement of the asset of a key in Dagster's words."""
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=name,
        passed=judgement.passed,
        description=judgement.description,
        metadata=dict(judgement.facts),
    )


def _failure(stage: PipelineStage, outcome: Outcome) -> dg.Failure:
    """Why it failed and what to do, with the last lines that were said."""
    missing = _MISSING.search(outcome.text)
    if outcome.stage_code is not None:
        advice = _ADVICE.get(outcome.stage_code, "Its command ended in an unknown way.")
    elif missing:
        path = missing[1] or missing[2]
        advice = f"{path} is missing; materialize what makes it first, or run dvc checkout."
    else:
        advice = "dvc itself failed; see the last lines."
    last = "\n".join(outcome.text.splitlines()[-LINES_SHOWN:])
    return dg.Failure(
        f"{stage.name}: {advice}\n{last}",
        metadata={"exit_code": outcome.code if outcome.stage_code is None else outcome.stage_code},
        allow_retries=False,
    )


def _environment() -> dict[str, str]:
    """Pins the interpreter and the shell: dvc takes `python` from PATH and its shell from SHELL."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, "SHELL": "/bin/sh", "PYTHONUNBUFFERED": "1"}
