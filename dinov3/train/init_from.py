"""`init_from`: a phase starts from weights that exist, ours or in the published layout.

Missing and unexpected names are listed and refused, but for one case that is expected: a source
without any head (a published backbone), whose heads are then drawn from the recipe's seed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov3.checkpoint import load_tensors
from dinov3.config import TrainConfig
from dinov3.distributed import rank
from dinov3.errors import CheckpointError
from dinov3.models.backbone import build_backbone
from dinov3.release.record import file_sha256
from dinov3.stage import Stage
from dinov3.train.build import build_pair
from dinov3.train.network import Network
from dinov3.weight_files import read_tensors

BACKBONE_NAME = "backbone.safetensors"
HEADS_NAME = "heads.safetensors"
_SHOWN = 12  # names listed of each kind
UNKNOWN_LICENCE = "unknown"


def load_pair(stage: Stage, source: Path, config: TrainConfig) -> tuple[Network, Network]:
    """Student and EMA with the weights of an artifact or of a file.

    Args:
        stage: Gets the edges.
        source: Folder of an artifact, or a file in the published layout.
        config: `init` says which weights start which network.

    Raises:
        CheckpointError: Names or shapes differ, a weight is not finite, or the source has no
            student to continue.
    """
    student, ema = build_pair(config.model.model_dump(), config.heads, config.seed)
    if source.is_dir():
        found = read_artifact(stage, source)
    else:
        if config.init == "continue":
            msg = f"init: continue needs a student too, got one network in {source}. Use teacher."
            raise CheckpointError(msg)
        found = {"teacher": read_published(stage, source)}
    role = "student" if config.init == "continue" else "teacher"
    fill_network(student, found.get(role, {}), f"{source} ({role})")
    fill_network(ema, found.get("teacher", {}), f"{source} (teacher)")
    return student, ema


def load_network(stage: Stage, source: Path, network: Network, *, with_heads: bool) -> None:
    """Fills a frozen teacher from the EMA of an artifact, or from a published file.

    Raises:
        CheckpointError: Names or shapes differ, a weight is not finite, or heads are wanted and
            not there.
    """
    found = read_artifact(stage, source)["teacher"] if source.is_dir() else None
    tensors = read_published(stage, source) if found is None else found
    if not with_heads:
        tensors = {name: one for name, one in tensors.items() if name.startswith("backbone.")}
    elif not any(not name.startswith("backbone.") for name in tensors):
        msg = (
            f"{source}: the teacher comes without heads, got objective=heads. "
            "Set objective=features."
        )
        raise CheckpointError(msg)
    fill_network(network, tensors, f"{source} (teacher)", says=with_heads)


def load_gram_backbone(stage: Stage, source: Path | None, config: TrainConfig) -> nn.Module:
    """The Gram teacher's backbone; without a source its weights are still to be copied.

    Raises:
        CheckpointError: Names or shapes differ, or a weight is not finite.
    """
    backbone = build_backbone(config.model.model_dump())
    if source is None:
        return backbone
    if source.is_dir():
        tensors = _of_role(load_tensors(stage.read("gram teacher", source / BACKBONE_NAME)))
        found = tensors["teacher"]
    else:
        found = {
            name.removeprefix("backbone."): tensor
            for name, tensor in read_published(stage, source, "gram teacher").items()
            if name.startswith("backbone.")
        }
    _check(backbone.state_dict(), found, str(source))
    backbone.load_state_dict(found)
    return backbone


def read_artifact(stage: Stage, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Both networks of one of our artifacts, each with the names of a `Network`."""
    backbone = _of_role(load_tensors(stage.read("init", folder / BACKBONE_NAME)))
    found = {
        role: {f"backbone.{name}": tensor for name, tensor in tensors.items()}
        for role, tensors in backbone.items()
    }
    if (folder / HEADS_NAME).is_file():
        heads = _of_role(load_tensors(stage.read("init heads", folder / HEADS_NAME)))
        for role, tensors in heads.items():
            found.setdefault(role, {}).update(tensors)
    return found


def read_published(stage: Stage, path: Path, role: str = "init") -> dict[str, Tensor]:
    """A file in the published layout: a backbone, or a teacher with its heads.

    Its training data are unknown; the record says so by its licence.
    """
    tensors = read_tensors(path, with_heads=True)
    stage.read_root(role, path.name, file_sha256(path), {UNKNOWN_LICENCE})
    if any(name.startswith("backbone.") for name in tensors):
        return tensors
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def fill_network(
    network: Network, tensors: Mapping[str, Tensor], source: str, *, says: bool = True
) -> None:
    """Loads exactly these weights; without any head the network keeps its own, and says so.

    Raises:
        CheckpointError: Names or shapes differ, or a weight is not finite.
    """
    wanted = network.state_dict()
    backbone = {name for name in wanted if name.startswith("backbone.")}
    if tensors and all(name.startswith("backbone.") for name in tensors):
        _check({name: wanted[name] for name in backbone}, tensors, source)
        if says and rank() == 0:
            sys.stderr.write(f"{source}: no heads in it; they are drawn from the recipe's seed\n")
        network.load_state_dict({**wanted, **tensors})
        return
    _check(wanted, tensors, source)
    network.load_state_dict(dict(tensors))


def _of_role(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    roles: dict[str, dict[str, Tensor]] = {"teacher": {}}
    for name, tensor in tensors.items():
        role, _, rest = name.partition(".")
        roles.setdefault(role, {})[rest] = tensor
    return roles


def _check(wanted: Mapping[str, Any], found: Mapping[str, Tensor], source: str) -> None:
    """Names and shapes must be exactly those, and every value finite."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    other = [
        f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if missing or unexpected or other:
        msg = (
            f"{source}: not the network of the recipe, got missing: {_some(missing)}; unexpected: "
            f"{_some(unexpected)}; of another shape: {_some(other)}. Use the recipe it was made "
            "with."
        )
        raise CheckpointError(msg)
    if broken := sorted(name for name, tensor in found.items() if not tensor.isfinite().all()):
        msg = (
            f"{source}: NaN or infinity among the weights, got it in {_some(broken)}. Start from "
            "others."
        )
        raise CheckpointError(msg)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
