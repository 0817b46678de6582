"""`python -m dinov3 export`: the weights of one network as a single file for other code.

    .safetensors   plain names, config.json beside it
    .pth           {"teacher": {name: tensor}}, as published training checkpoints are laid out

With heads the names are backbone.*, dino_head.*, ibot_head.*; without, those of the backbone, as
released backbones have them. `hub.load_backbone` and `--init-from` read both kinds of .pth.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.checkpoint import load_tensors, save_tensors
from dinov3.errors import CheckpointError, ConfigError
from dinov3.release.atomic import atomic_write
from dinov3.release.contents import HEADS_NAME, MODEL_NAME, RELEASE_NAME
from dinov3.release.record import RECORD_NAME, canonical_json, read_record
from dinov3.stage import Stage
from dinov3.state import read_facts, read_tensors
from dinov3.verified_weights import VerifiedRelease, open_verified

_CONFIG = "config.json"
_BACKBONE = "backbone.safetensors"
_HEADS = "heads.safetensors"
_STATE = "state.json"
_JOB = "job.json"
_HEAD_NAMES = ("dino_head.", "ibot_head.")
_IN_STATE = {"teacher": "ema", "student": "student"}
_DESCRIBED = ("model", "heads", "crops")  # what opening the weights needs

Kind = Literal["safetensors", "pth"]


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and to where.

    Attributes:
        source: Folder of an artifact, a release, or a state `step_…`.
        target: The file.
        role: `teacher` or `student`.
        kind: `safetensors` or `pth`; by the ending of the file if None.
        student: Which of several, in a state of a distillation; else empty.
        with_heads: Whether heads go with the backbone, where there are any.
        force: Replace what is there.
        key: Public key that must have signed the release; None leaves open who did.
    """

    source: Path
    target: Path
    role: str = "teacher"
    kind: str | None = None
    student: str = ""
    with_heads: bool = True
    force: bool = False
    key: Path | None = None


def export_weights(request: ExportRequest) -> list[Path]:
    """Writes the file, and for safetensors its config.json; returns what was written.

    Raises:
        ConfigError: The ending of the file is not that of its kind.
        CheckpointError: A file is in the way, the folder is that of an artifact, or the source
            lacks what is asked for.
        LineageBroken: The artifact's bytes differ from its record, or the release is refused.
        DataError: The artifact has no record.
    """
    kind = _kind_of(request)
    beside = request.target.with_name(_CONFIG)
    written = [request.target] if kind == "pth" else [request.target, beside]
    _check_place(written, force=request.force)
    tensors, describe = _open(request)
    if not request.with_heads:
        tensors = _backbone_alone(tensors)
    request.target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pth":
        _write(request.target, lambda path: torch.save({"teacher": tensors}, path))
        return written
    atomic_write(beside, canonical_json(describe()))
    _write(request.target, lambda path: save_tensors(path, tensors))
    return written


def _open(request: ExportRequest) -> tuple[dict[str, Tensor], Callable[[], dict[str, Any]]]:
    """The tensors, and how to say what they are."""
    if (request.source / _STATE).is_file():
        return _of_state(request), lambda: _config_of_state(request)
    if (request.source / RELEASE_NAME).is_file():
        release = open_verified(request.source, request.key)
        return _of_release(release, request), lambda: _config_of_release(release, request)
    return _of_artifact(request), lambda: _config_of_artifact(request)


def _kind_of(request: ExportRequest) -> Kind:
    """The kind of file, which must agree with its ending: readers go by that."""
    ending = request.target.suffix.removeprefix(".")
    kind = request.kind or ending
    if kind != ending or kind not in {"safetensors", "pth"}:
        msg = (
            f"--to: must end with .safetensors or .pth, as --format says, got "
            f"{request.target.name} for format {request.kind or 'by its ending'}. Rename it."
        )
        raise ConfigError(msg)
    return "pth" if kind == "pth" else "safetensors"


def _check_place(written: Sequence[Path], *, force: bool) -> None:
    """Refuses to replace anything unasked, and to touch the files a record names at all."""
    folder = written[0].parent
    for name in (RECORD_NAME, _STATE, RELEASE_NAME):
        if (folder / name).is_file():
            msg = (
                f"--to: {folder} is vouched for by its {name}, got {written[0].name}. Go elsewhere."
            )
            raise CheckpointError(msg)
    for path in written:
        if path.exists() and not force:
            msg = f"{path}: is there already, got no --force. Choose another --to, or force it."
            raise CheckpointError(msg)


def _of_artifact(request: ExportRequest) -> dict[str, Tensor]:
    """Weights of an artifact, whose bytes are compared with its record first."""
    folder = request.source
    if not (folder / _BACKBONE).is_file():
        msg = (
            f"{folder}: neither an artifact with {_BACKBONE}, a release nor a state. "
            "Give a trained model's folder, a release's, or a folder step_…."
        )
        raise CheckpointError(msg)
    reader = Stage("export", request.target, {})
    backbone = load_tensors(reader.read("weights", folder / _BACKBONE))
    heads = {}
    if request.with_heads and (folder / _HEADS).is_file():
        heads = load_tensors(reader.read("heads", folder / _HEADS))
    return _of_role(request, folder / _BACKBONE, backbone, heads)


def _of_release(release: VerifiedRelease, request: ExportRequest) -> dict[str, Tensor]:
    """Weights of a release, from the very bytes that were verified."""
    heads = release.tensors(HEADS_NAME) if request.with_heads else {}
    path = release.folder / MODEL_NAME
    return _of_role(request, path, release.tensors(MODEL_NAME), heads)


def _of_role(
    request: ExportRequest, path: Path, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    prefix = f"{request.role}."
    found = {f"backbone.{name}": one for name, one in _without(backbone, prefix).items()}
    if not found:
        msg = f"{path}: no tensor of the {request.role}, got {prefix!r}. Use teacher."
        raise CheckpointError(msg)
    return found | _without(heads, prefix)


def _of_state(request: ExportRequest) -> dict[str, Tensor]:
    """Whole weights of a resumable state, however many ranks wrote it."""
    learners = sorted(_learners(request.source))
    if request.student not in learners:
        names = ", ".join(learners) or "one without a name"
        msg = f"--student: not one of the state's, got {request.student!r}. Use one of: {names}."
        raise ConfigError(msg)
    prefix = f"{request.student}." if request.student else ""
    found = read_tensors(request.source, f"{prefix}{_IN_STATE[request.role]}.")
    if not any(name.startswith("backbone.") for name in found):
        msg = (
            f"{request.source}: no backbone of its own in it, got {min(found)}. Give a state of "
            "pre-training or of a distillation."
        )
        raise CheckpointError(msg)
    return found


def _learners(state: Path) -> list[str]:
    try:
        return list(read_facts(state)["method"]["learners"])
    except (KeyError, TypeError) as error:
        msg = f"{state}: not a state of training, got no {error}. Give another one."
        raise CheckpointError(msg) from error


def _backbone_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_HEAD_NAMES)
    }


def _config_of_artifact(request: ExportRequest) -> dict[str, Any]:
    reader = Stage("export", request.target, {})
    path = reader.read("config", request.source / _CONFIG)
    made = {"role": request.role, "record": reader.edges[0].record}
    return {**_described(json.loads(path.read_bytes()), path), "exported": made}


def _config_of_release(release: VerifiedRelease, request: ExportRequest) -> dict[str, Any]:
    made = {"role": request.role, "release": release.digest}
    return {**_described(release.config(), release.folder / _CONFIG), "exported": made}


def _config_of_state(request: ExportRequest) -> dict[str, Any]:
    """From the run's description, or from the record of a finished run."""
    path, config = _recipe_of_state(request)
    made: dict[str, Any] = {"role": request.role, "step": read_facts(request.source)["step"]}
    if request.student:
        made["student"], own = request.student, config["students"][request.student]
        config = {**own, "crops": {**config["crops"], **own["crops"]}}
    return {**_described(config, path), "exported": made}


def _recipe_of_state(request: ExportRequest) -> tuple[Path, Mapping[str, Any]]:
    folder = request.source.parent
    for path in (folder / _JOB, folder.parent / _JOB):
        if path.is_file():
            return path, json.loads(path.read_bytes())["config"]
    record = folder / (f"{request.student}.{RECORD_NAME}" if request.student else RECORD_NAME)
    if record.is_file():
        return record, read_record(record).config
    msg = f"{request.source}: no {_JOB} of its run, got {folder}. Leave it there, or export a .pth."
    raise CheckpointError(msg)


def _described(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if "model" not in config:
        msg = f"{path}: no model in it, got {', '.join(config) or 'nothing'}. Use --format pth."
        raise CheckpointError(msg)
    return {name: config[name] for name in _DESCRIBED if name in config}


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, work: Callable[[Path], Any]) -> None:
    """The file under its name when it is whole and on disk."""
    try:
        with _partial(path) as temporary:
            work(temporary)
    except OSError as error:
        msg = f"{path}: cannot be written, got {error}. Free the disk or choose another folder."
        raise CheckpointError(msg) from error
