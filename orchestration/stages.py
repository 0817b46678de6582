"""The pipeline as `dvc.yaml` states it: the only source of commands, inputs, outputs and edges.

    pretrained_checkpoint ──> eval_reports@pretrained, asset key eval_reports_pretrained

An artifact is a folder with a record.json and an asset. Most stages make one, which has the
stage's key; outs in several folders with a record each are several, `<stage>_<folder>`.
Reading it ourselves takes milliseconds where `dvc` takes seconds; a test holds the two equal.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.errors import ConfigError
from dinov3.release.record import RECORD_NAME
from orchestration.dvcfile import read_stages

CHECKOUT = Path(__file__).resolve().parent.parent
DATA = "data"  # artifacts live in data/<stage>/, sources are seen as data/<root>/
RELEASE_LOG = "data/release_log"  # decisions of people, in git as code is
RUN_NAME = "run.json"
# written by a stage, but not determined by its inputs: when, where, how long
UNDETERMINED = frozenset({RUN_NAME, "events.jsonl", "tensorboard"})

_KNOWN = {"cmd", "deps", "outs", "metrics", "plots", "params", "desc", "meta"}


@dataclass(frozen=True)
class Artifact:
    """What a stage makes: a folder with its record, in Dagster an asset."""

    key: str  # as Dagster shows it: distilled_students_vits
    stage: str  # the stage that makes it, as dvc addresses it: distilled_students
    outs: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder its outputs share, relative to the pipeline."""
        parents = [PurePosixPath(out).parent.parts for out in self.outs]
        shared = parents[0]
        for parts in parents[1:]:
            same = [one for one, other in zip(shared, parts, strict=False) if one == other]
            shared = tuple(same)
        return str(PurePosixPath(*shared))


@dataclass(frozen=True)
class PipelineStage:
    """One stage or arm of `dvc.yaml`, with everything interpolated."""

    name: str  # as dvc addresses it: eval_reports@pretrained
    key: str  # the same in letters, digits and underscores: eval_reports_pretrained
    command: str
    deps: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    upstream: tuple[str, ...]  # keys of the artifacts among its inputs
    roots: tuple[str, ...]  # keys of the sources it reads, which no stage makes
    code: tuple[str, ...]  # the deps that are neither


@dataclass(frozen=True)
class Pipeline:
    """All stages by key, each after those that make its inputs."""

    root: Path
    stages: Mapping[str, PipelineStage]

    @cached_property
    def artifacts(self) -> Mapping[str, Artifact]:
        """All artifacts by key, in the order of their stages."""
        return {one.key: one for stage in self.stages.values() for one in stage.artifacts}

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of the sources, sorted."""
        return tuple(sorted({root for stage in self.stages.values() for root in stage.roots}))

    def stage(self, key: str) -> PipelineStage:
        """The stage of a key.

        Raises:
            ConfigError: `dvc.yaml` has none.
        """
        if key not in self.stages:
            msg = f"dvc.yaml: no stage of that key, got {key!r}. Name one that is there."
            raise ConfigError(msg)
        return self.stages[key]

    def arms(self, name: str) -> tuple[str, ...]:
        """Keys of the arms of a `foreach`.

        Raises:
            ConfigError: `dvc.yaml` has no arms of that name.
        """
        keys = tuple(key for key, one in self.stages.items() if one.name.startswith(f"{name}@"))
        if not keys:
            msg = f"dvc.yaml: no foreach of that name, got {name!r}. Name one that is there."
            raise ConfigError(msg)
        return keys


@cache
def checkout_pipeline() -> Pipeline:
    """The pipeline of this checkout."""
    return read_pipeline(CHECKOUT)


def read_pipeline(root: Path) -> Pipeline:
    """Reads `dvc.yaml` and `params.yaml` of a folder.

    Raises:
        ConfigError: Something in them that we cannot read the way dvc does, outputs beside the
            folders of a stage's artifacts, or one key for two stages or artifacts.
    """
    raw = read_stages(root)
    _refuse_shared_keys((_key(name), name) for name in raw)
    artifacts = {name: _artifacts(name, _outs(body)) for name, body in raw.items()}
    every = [artifact for made in artifacts.values() for artifact in made]
    _refuse_shared_keys((artifact.key, artifact.stage) for artifact in every)
    makers = {out: artifact.key for artifact in every for out in artifact.outs}
    stages = [_stage(name, body, artifacts[name], makers) for name, body in raw.items()]
    return Pipeline(root, {stage.key: stage for stage in _in_order(stages)})


def _key(name: str) -> str:
    """Dagster knows only letters, digits and underscores."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _refuse_shared_keys(keyed: Iterable[tuple[str, str]]) -> None:
    names: dict[str, list[str]] = {}
    for key, name in keyed:
        names.setdefault(key, []).append(name)
    for key, culprits in names.items():
        if len(culprits) > 1:
            said = ", ".join(sorted(culprits))
            msg = f"dvc.yaml: one asset key {key!r} for {said}. Rename one of them."
            raise ConfigError(msg)


def _artifacts(name: str, outs: tuple[str, ...]) -> tuple[Artifact, ...]:
    """One, or one per folder with a record where there are several."""
    paths = [PurePosixPath(out) for out in outs]
    folders = [path.parent for path in paths if path.name == RECORD_NAME]
    if len(folders) < 2:
        return (Artifact(_key(name), name, outs),)
    for path in paths:
        if sum(path.is_relative_to(folder) for folder in folders) != 1:
            said = ", ".join(map(str, folders))
            msg = (
                f"dvc.yaml: {name}: each output belongs to one folder with a {RECORD_NAME} "
                f"({said}), got {path}. Move it into one of them."
            )
            raise ConfigError(msg)
    return tuple(
        Artifact(
            key=_key(f"{name}_{folder.name}"),
            stage=name,
            outs=tuple(str(path) for path in paths if path.is_relative_to(folder)),
        )
        for folder in folders
    )


def _outs(body: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(path for field in ("outs", "metrics", "plots") for path in _paths(body, field))


def _paths(body: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Paths of a list whose entries are `path` or `{path: settings}`."""
    entries = body.get(field) or []
    return tuple(next(iter(one)) if isinstance(one, dict) else one for one in entries)


def _stage(
    name: str,
    body: Mapping[str, Any],
    artifacts: tuple[Artifact, ...],
    makers: Mapping[str, str],
) -> PipelineStage:
    unknown = sorted(set(body) - _KNOWN)
    if unknown:
        msg = f"dvc.yaml: {name}: not read here, got {', '.join(unknown)}. Write it without."
        raise ConfigError(msg)
    command = body["cmd"] if isinstance(body["cmd"], str) else "\n".join(body["cmd"])
    deps = _paths(body, "deps")
    upstream, roots, code = _kinds_of(deps, name, makers)
    return PipelineStage(
        name=name,
        key=_key(name),
        command=command,
        deps=deps,
        artifacts=artifacts,
        upstream=tuple(dict.fromkeys(upstream)),
        roots=tuple(dict.fromkeys(roots)),
        code=tuple(code),
    )


def _kinds_of(
    deps: Iterable[str], name: str, makers: Mapping[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Artifacts and sources by their keys, which may repeat, and the files that are neither."""
    upstream, roots, code = [], [], []
    for dep in deps:
        made_by = [maker for out, maker in makers.items() if _overlap(dep, out)]
        if made_by and dep not in makers:
            msg = f"dvc.yaml: {name}: part of an output, got {dep}. Name whole outputs as deps."
            raise ConfigError(msg)
        upstream += made_by
        in_git = PurePosixPath(dep).is_relative_to(RELEASE_LOG)
        if not made_by and not in_git and PurePosixPath(dep).parts[0] == DATA:
            roots.append(PurePosixPath(dep).parts[1])
        elif not made_by:
            code.append(dep)
    return upstream, roots, code


def _overlap(one: str, other: str) -> bool:
    """Whether one path is the other or lies inside it."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def _in_order(stages: Iterable[PipelineStage]) -> list[PipelineStage]:
    """Each stage after those that make its inputs, otherwise as written."""
    ordered: list[PipelineStage] = []
    made: set[str] = set()
    waiting = list(stages)
    while waiting:
        ready = [one for one in waiting if made.issuperset(one.upstream)]
        if not ready:
            names = ", ".join(one.key for one in waiting)
            msg = f"dvc.yaml: stages in a circle, got {names}. Break it."
            raise ConfigError(msg)
        ordered += ready
        made.update(artifact.key for one in ready for artifact in one.artifacts)
        waiting = [one for one in waiting if one not in ready]
    return ordered
