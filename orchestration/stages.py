"""The pipeline as `dvc.yaml` states it: the only source of commands, inputs, outputs and edges.

    pretrained_checkpoint ──> eval_reports@pretrained, asset key eval_reports_pretrained

Reading it ourselves takes milliseconds where `dvc` takes seconds; a test holds the two equal.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dinov3.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parent.parent
DATA = "data"  # artifacts live in data/<stage>/, sources are seen as data/<root>/
RUN_NAME = "run.json"
# written by a stage, but not determined by its inputs: when, where, how long
UNDETERMINED = frozenset({RUN_NAME, "events.jsonl", "tensorboard"})

_REFERENCE = re.compile(r"\$\{\s*([\w.\-]+)\s*\}")
_KNOWN = {"cmd", "deps", "outs", "metrics", "plots", "params", "desc", "meta"}


@dataclass(frozen=True)
class PipelineStage:
    """One stage or arm of `dvc.yaml`, with everything interpolated."""

    name: str  # as dvc addresses it: eval_reports@pretrained
    key: str  # as Dagster shows it: eval_reports_pretrained
    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    upstream: tuple[str, ...]  # keys of the stages that make its inputs
    roots: tuple[str, ...]  # keys of the sources it reads, which no stage makes
    code: tuple[str, ...]  # the deps that are neither

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
class Pipeline:
    """All stages by key, each after its upstreams."""

    root: Path
    stages: Mapping[str, PipelineStage]

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of the sources, sorted."""
        return tuple(sorted({root for stage in self.stages.values() for root in stage.roots}))

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
        ConfigError: Something in them that we cannot read the way dvc does, or two stages with one
            asset key.
    """
    described = _load(root / "dvc.yaml")
    refused = sorted(set(described) - {"stages"})
    if refused:
        msg = f"dvc.yaml: only stages are read here, got {', '.join(refused)}. Move them away."
        raise ConfigError(msg)
    params = _load(root / "params.yaml") if (root / "params.yaml").is_file() else {}
    raw = dict(_expand(described.get("stages") or {}, params))
    keys = _unique_keys(raw)
    makers = {path: keys[name] for name, body in raw.items() for path in _outs(body)}
    stages = {keys[name]: _stage(name, body, keys[name], makers) for name, body in raw.items()}
    return Pipeline(root, {stage.key: stage for stage in _in_order(stages)})


def _load(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        msg = f"{path}: cannot be read: {error}. Mend the file."
        raise ConfigError(msg) from error
    return value or {}


def _expand(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One (address, interpolated body) per stage and per arm of a `foreach`."""
    for name, body in stages.items():
        if "foreach" not in body:
            yield name, _interpolate(body, params, name)
            continue
        arms = _interpolate(body["foreach"], params, name)
        if isinstance(arms, list):
            arms = {_text(arm): arm for arm in arms}
            contexts = {arm: {"item": item} for arm, item in arms.items()}
        else:
            contexts = {arm: {"item": item, "key": arm} for arm, item in arms.items()}
        for arm, context in contexts.items():
            address = f"{name}@{arm}"
            yield address, _interpolate(body["do"], {**params, **context}, address)


def _interpolate(value: Any, context: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {
            _interpolate(key, context, where): _interpolate(one, context, where)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_interpolate(one, context, where) for one in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1], context, where)
    return _REFERENCE.sub(lambda found: _text(_look_up(found[1], context, where)), value)


def _look_up(reference: str, context: Mapping[str, Any], where: str) -> Any:
    value: Any = context
    for part in reference.split("."):
        if not isinstance(value, Mapping) or part not in value:
            msg = (
                f"dvc.yaml: {where}: unknown name, got ${{{reference}}}. Define it in params.yaml."
            )
            raise ConfigError(msg)
        value = value[part]
    return value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unique_keys(names: Iterable[str]) -> dict[str, str]:
    """Asset key by dvc address; Dagster knows only letters, digits and underscores."""
    keys = {name: re.sub(r"\W", "_", name, flags=re.ASCII) for name in names}
    for key in keys.values():
        culprits = sorted(name for name, other in keys.items() if other == key)
        if len(culprits) > 1:
            msg = f"dvc.yaml: one asset key {key!r} for {', '.join(culprits)}. Rename one of them."
            raise ConfigError(msg)
    return keys


def _outs(body: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(path for field in ("outs", "metrics", "plots") for path in _paths(body, field))


def _paths(body: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Paths of a list whose entries are `path` or `{path: settings}`."""
    entries = body.get(field) or []
    return tuple(next(iter(one)) if isinstance(one, dict) else one for one in entries)


def _stage(
    name: str, body: Mapping[str, Any], key: str, makers: Mapping[str, str]
) -> PipelineStage:
    unknown = sorted(set(body) - _KNOWN)
    if unknown:
        msg = f"dvc.yaml: {name}: not read here, got {', '.join(unknown)}. Write it without."
        raise ConfigError(msg)
    command = body["cmd"] if isinstance(body["cmd"], str) else "\n".join(body["cmd"])
    deps = _paths(body, "deps")
    upstream, roots, code = [], [], []
    for dep in deps:
        made_by = [maker for out, maker in makers.items() if _overlap(dep, out)]
        if made_by and dep not in makers:
            msg = f"dvc.yaml: {name}: part of an output, got {dep}. Name whole outputs as deps."
            raise ConfigError(msg)
        upstream += made_by
        if not made_by and PurePosixPath(dep).parts[0] == DATA:
            roots.append(PurePosixPath(dep).parts[1])
        elif not made_by:
            code.append(dep)
    return PipelineStage(
        name=name,
        key=key,
        command=command,
        deps=deps,
        outs=_outs(body),
        upstream=tuple(dict.fromkeys(upstream)),
        roots=tuple(dict.fromkeys(roots)),
        code=tuple(code),
    )


def _overlap(one: str, other: str) -> bool:
    """Whether one path is the other or lies inside it."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def _in_order(stages: Mapping[str, PipelineStage]) -> list[PipelineStage]:
    """Each stage after its upstreams, otherwise as written."""
    ordered: dict[str, PipelineStage] = {}
    waiting = dict(stages)
    while waiting:
        ready = [one for one in waiting.values() if all(up in ordered for up in one.upstream)]
        if not ready:
            msg = f"dvc.yaml: stages in a circle, got {', '.join(waiting)}. Break it."
            raise ConfigError(msg)
        for stage in ready:
            ordered[stage.key] = waiting.pop(stage.key)
    return list(ordered.values())
