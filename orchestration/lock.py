"""Versions from `dvc.lock`: plain YAML, read in milliseconds.

A version is a digest of what dvc hashed, so both front doors name it alike: the data version of an
artifact from the hashes of its outputs, the code version from the command and the hashes of the
code it depends on, the consumed versions from the hashes of the inputs it was made from.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dinov3.errors import DataError
from dinov3.release.record import digest_of
from orchestration.stages import UNDETERMINED, Artifact, Pipeline, PipelineStage

DATA_VERSION = "dagster/data_version"
_USER_PROVIDED = "dagster/data_version_is_user_provided"
CODE_VERSION = "dagster/code_version"
INPUT_VERSION = "dagster/input_data_version/"
SUPERSEDED = "superseded-"  # begins the version of an input that was made anew since
_INPUT_POINTER = "dagster/input_event_pointer/"


@dataclass(frozen=True)
class LockedStage:
    """What dvc wrote down after a stage: hashes by path."""

    command: str
    deps: Mapping[str, str]
    outs: Mapping[str, str]
    sizes: Mapping[str, int]


Lock = Mapping[str, LockedStage]


def read_lock(root: Path) -> Lock:
    """Reads `dvc.lock` by dvc's stage names; empty before the first run.

    Raises:
        DataError: The file is damaged.
    """
    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        stages = yaml.safe_load(path.read_text("utf-8"))["stages"]
        return {name: _locked(body) for name, body in stages.items()}
    except (yaml.YAMLError, UnicodeError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()) or repr(error)
        msg = (
            f"{path}: not a lock file of dvc, got {said}. Restore it from git, or remove it and "
            "run dvc repro."
        )
        raise DataError(msg) from error


def lock_digest(root: Path) -> str:
    """sha256 of `dvc.lock`, empty before the first run."""
    path = root / "dvc.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def locked_outs(artifact: Artifact, lock: Lock) -> dict[str, str]:
    """Hashes by path of what an artifact consists of; empty while dvc has not made it."""
    if artifact.stage not in lock:
        return {}
    outs = lock[artifact.stage].outs
    return {path: value for path, value in outs.items() if path in artifact.outs}


def data_version(artifact: Artifact, lock: Lock) -> str:
    """Digest of the outputs, less those that the inputs do not determine."""
    determined = {
        path: value
        for path, value in locked_outs(artifact, lock).items()
        if PurePosixPath(path).name not in UNDETERMINED
    }
    return digest_of(determined)


def code_version(pipeline: Pipeline, stage: PipelineStage) -> str:
    """Digest of a stage's command and code as they stand in the working tree now."""
    hashes = {path: _hash_path(pipeline.root / path) for path in stage.code}
    return _code_digest(stage.command, hashes)


def root_version(pipeline: Pipeline, root: str, lock: Lock) -> str | None:
    """Version of a source as the first stage that reads it saw it; None when none ran yet."""
    for stage in pipeline.stages.values():
        if root in stage.roots and stage.name in lock:
            return _seen(lock[stage.name].deps, root)
    return None


def version_tags(
    pipeline: Pipeline, stage: PipelineStage, artifact: Artifact, lock: Lock
) -> dict[str, str]:
    """The tags by which Dagster judges a materialization in the lock fresh or stale.

    Both tags per upstream are needed, else it is stale for ever. An input that was made anew since
    gets a version that no event has, and so shows stale.

    Args:
        pipeline: As it is written now.
        stage: A stage that is in the lock.
        artifact: The one of its artifacts to judge; code and inputs are those of the stage.
        lock: As dvc wrote it.
    """
    locked = lock[stage.name]
    code = {path: locked.deps[path] for path in stage.code if path in locked.deps}
    tags = {
        DATA_VERSION: data_version(artifact, lock),
        _USER_PROVIDED: "true",
        CODE_VERSION: _code_digest(locked.command, code),
    }
    for key in stage.upstream:
        tags[f"{INPUT_VERSION}{key}"] = _consumed(pipeline, key, locked, lock)
    for root in stage.roots:
        tags[f"{INPUT_VERSION}{root}"] = _seen(locked.deps, root)
    for key in (*stage.upstream, *stage.roots):
        tags[f"{_INPUT_POINTER}{key}"] = "NULL"
    return tags


def _locked(body: Mapping[str, Any]) -> LockedStage:
    command = body["cmd"] if isinstance(body["cmd"], str) else "\n".join(body["cmd"])
    deps, outs = body.get("deps", []), body.get("outs", [])
    return LockedStage(
        command=command,
        deps={one["path"]: one[one.get("hash", "md5")] for one in deps},
        outs={one["path"]: one[one.get("hash", "md5")] for one in outs},
        sizes={one["path"]: one["size"] for one in outs},
    )


def _consumed(pipeline: Pipeline, key: str, locked: LockedStage, lock: Lock) -> str:
    artifact = pipeline.artifacts[key]
    made = locked_outs(artifact, lock)
    read = {path: value for path, value in locked.deps.items() if path in artifact.outs}
    if read and all(made.get(path) == value for path, value in read.items()):
        return data_version(artifact, lock)
    return SUPERSEDED + digest_of(read)


def _seen(deps: Mapping[str, str], root: str) -> str:
    return digest_of({path: value for path, value in deps.items() if root in path.split("/")[:2]})


def _code_digest(command: str, hashes: Mapping[str, str | None]) -> str:
    return digest_of({"command": " ".join(command.split()), "code": hashes})


def _hash_path(path: Path) -> str | None:
    """The hash dvc gives a file or folder; None when it is missing."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if not path.is_dir():
        return None
    files = [one for one in path.rglob("*") if one.is_file() and "__pycache__" not in one.parts]
    names = sorted(tuple(one.relative_to(path).parts) for one in files)
    tree = [
        {"md5": _hash_path(path.joinpath(*parts)), "relpath": "/".join(parts)} for parts in names
    ]
    text = json.dumps(tree, sort_keys=True).encode()
    return f"{hashlib.md5(text, usedforsecurity=False).hexdigest()}.dir"
