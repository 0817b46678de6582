"""`python -m dinov3 adopt`: outside weights enter the graph as a declared root.

    dinov3 adopt dinov3_vits16_pretrain_lvd1689m-08c60483.pth --arch dinov3_vits16 \
        --origin https://… --licence LicenseRef-DINOv3 --output data/outside_vits16
    dinov3 adopt folder/of/a/hugging-face-model --origin … --licence … --output data/outside

The result is an artifact like those we train: everything that takes one takes it. Its record says
where the weights came from, and that nobody here knows what they were trained on; every record
below says so too, and carries the licence. Only tensors are read: no code in a file is executed.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3 import hub
from dinov3.checkpoint import save_tensors
from dinov3.convert import config_from_transformers, from_transformers
from dinov3.errors import CheckpointError, ConfigError, DinoError
from dinov3.models.backbone import Backbone, BackboneConfig, backbone_config
from dinov3.models.convnext import ConvNeXtConfig
from dinov3.models.vit import ViTConfig
from dinov3.release.atomic import atomic_write
from dinov3.release.licences import normal_form, unknown_in
from dinov3.release.record import (
    RecordError,
    canonical_json,
    file_sha256,
    parse_object,
    read_bounded,
)
from dinov3.release.spdx import LicenceError
from dinov3.stage import TRAINING_DATA, UNKNOWN, open_stage
from dinov3.weight_files import read_tensors

STAGE = "outside_weights"
ROLE = "outside weights"
BACKBONE_NAME = "backbone.safetensors"
CONFIG_NAME = "config.json"

_PREPROCESSOR_NAME = "preprocessor_config.json"
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # whole, or cut up by NAME.index.json
_SATELLITE = "sat493m"  # in the names of released files
_SATELLITE_CROPS = {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
_CROPS = {"mean": list(hub.IMAGENET_MEAN), "std": list(hub.IMAGENET_STD)}
_MAX_ORIGIN = 500  # characters
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARED = ("num_heads", "patch_size", "norm", "rope_base", "num_registers")  # no shape shows them


@dataclass(frozen=True)
class AdoptRequest:
    """Which weights, and what is known of them.

    Attributes:
        source: A .pth or .safetensors file in the published layout, or a Hugging Face directory.
        output: Folder of the artifact.
        origin: Where they were got: a URL, or a sentence; no path of this machine.
        licence: SPDX expression, such as LicenseRef-DINOv3.
        arch: A name of the hub, or a config.json with a `model`; a directory describes itself.
    """

    source: Path
    output: Path
    origin: str
    licence: str
    arch: str | None = None


@dataclass(frozen=True)
class _Found:
    """An opened network, the normalisation it expects, and the files it was read from."""

    backbone: Backbone
    crops: Mapping[str, Any]
    weights: Sequence[Path]
    descriptions: Sequence[Path] = ()


def adopt_weights(request: AdoptRequest) -> Path:
    """Writes the artifact; returns its folder.

    Raises:
        CheckpointError: The weights are unreadable, hold anything but tensors, or do not fit.
        ConfigError: The architecture, the origin or the licence is missing or malformed.
        DataError: The output cannot be written.
    """
    origin, licence = _origin(request.origin), _licence(request.licence)
    source = request.source.expanduser()
    found = (_open_folder if source.is_dir() else _open_file)(source, request.arch)
    config = {
        "arch": None if request.arch is None else Path(request.arch).name,
        "described_by": {path.name: file_sha256(path) for path in found.descriptions},
        "licence": licence,
        "origin": origin,
    }
    with open_stage(STAGE, request.output, config=config) as stage:
        for path in found.weights:
            stage.read_root(ROLE, path.name, file_sha256(path), {licence})
        stage.facts |= {TRAINING_DATA: UNKNOWN, "origin": origin}
        named = {f"teacher.{name}": one for name, one in found.backbone.state_dict().items()}
        save_tensors(stage.path(BACKBONE_NAME), named)
        content = {"model": _fields(found.backbone.config), "crops": found.crops}
        atomic_write(stage.path(CONFIG_NAME), canonical_json(content))
    return request.output


def main(argv: Sequence[str]) -> int:
    """The verb `adopt`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dinov3 adopt", description="Make outside weights an artifact with a declared root."
    )
    parser.add_argument("source", type=Path, help="A .pth or .safetensors file, or a HF directory.")
    parser.add_argument("--origin", required=True, help="Where they were got: a URL or a sentence.")
    parser.add_argument("--licence", required=True, help="SPDX: LicenseRef-DINOv3, CC-BY-NC-4.0, …")
    parser.add_argument("--arch", help="For a file: a name of the hub, or a config.json of ours.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the artifact.")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 2
    try:
        folder = adopt_weights(AdoptRequest(**vars(options)))
    except DinoError as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("dinov3: interrupted; nothing was written\n")
        return 130
    sys.stdout.write(f"{folder}: outside weights, training data unknown\n")
    return 0


def _open_file(path: Path, arch: str | None) -> _Found:
    if arch is None:
        msg = f"--arch: a file does not say its architecture, got none for {path.name}. Name it."
        raise ConfigError(msg)
    crops = _SATELLITE_CROPS if _SATELLITE in path.name.lower() else _CROPS
    if arch in hub.ARCHITECTURES:
        return _Found(hub.load_backbone(path, arch, device="cpu"), crops, [path])
    config_path, config = _own_config(arch)
    backbone = hub.backbone_from(config, read_tensors(path), path, device="cpu")
    return _Found(backbone, crops, [path], [config_path])


def _open_folder(folder: Path, arch: str | None) -> _Found:
    config_path = folder / CONFIG_NAME
    config = config_from_transformers(_object(config_path), config_path)
    descriptions = [config_path]
    if arch is not None:
        config = _agreed(config, arch, config_path)
    tensors, weights = _read_parts(folder)
    named = from_transformers(tensors, config, folder)
    backbone = hub.backbone_from(config, named, folder, device="cpu")
    crops: Mapping[str, Any] = _CROPS
    preprocessor = folder / _PREPROCESSOR_NAME
    if preprocessor.is_file():
        crops = _normalisation(_object(preprocessor), preprocessor)
        descriptions.append(preprocessor)
    return _Found(backbone, crops, weights, descriptions)


def _own_config(arch: str) -> tuple[Path, BackboneConfig]:
    path = Path(arch)
    if not path.is_file():
        known = ", ".join(hub.ARCHITECTURES)
        msg = f"--arch: neither a config.json nor a name of the hub, got {arch!r}. Use of: {known}."
        raise ConfigError(msg)
    try:
        return path, backbone_config(_object(path)["model"])
    except (KeyError, TypeError) as error:
        msg = f"{path}: no model in it, got {error}. Give a config.json of ours."
        raise ConfigError(msg) from error


def _agreed(found: BackboneConfig, arch: str, path: Path) -> BackboneConfig:
    """The named architecture, when a directory's own description does not contradict it.

    What only training looks at is taken from the name; shapes are compared when it is filled.
    """
    named = hub.ARCHITECTURES.get(arch) or _own_config(arch)[1]
    if isinstance(named, ViTConfig):  # theirs leaves out the norm that only training uses
        named = dataclasses.replace(named, untie_global_and_local_cls_norm=False)
    theirs, ours = ({"family": type(one).__name__} for one in (found, named))
    if theirs == ours and isinstance(named, ViTConfig):
        theirs, ours = ({name: getattr(one, name) for name in _SHARED} for one in (found, named))
    for name, value in ours.items():
        if theirs[name] != value:
            msg = f"--arch: {arch} has {name} {value}, got {theirs[name]} in {path}. Leave it out."
            raise ConfigError(msg)
    return named


def _read_parts(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """All tensors of a directory, and the files that hold them."""
    for name in _WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_tensors(folder / name), [folder / name]
        if index.is_file():
            parts = _parts_of(index)
            tensors: dict[str, Tensor] = {}
            for part in parts:
                tensors |= read_tensors(part)
            return tensors, parts
    msg = f"{folder}: no weights in it, got none of {', '.join(_WEIGHT_NAMES)}. Give the model's."
    raise CheckpointError(msg)


def _parts_of(index: Path) -> list[Path]:
    """The files that an index names; they lie beside it."""
    places = _object(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    if not names or not all(isinstance(one, str) and _PART_NAME.fullmatch(one) for one in names):
        msg = (
            f"{index}: not an index of files beside it, got {sorted(map(str, names))}. Fetch anew."
        )
        raise CheckpointError(msg)
    return [index.with_name(name) for name in sorted(names)]


def _normalisation(content: Mapping[str, Any], path: Path) -> dict[str, list[float]]:
    found = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        values = content.get(theirs)
        if not isinstance(values, list) or [type(one) for one in values] != [float] * 3:
            msg = f"{path}: {theirs}: must be three numbers, got {values!r}. Save the model again."
            raise ConfigError(msg)
        found[ours] = values
    return found


def _fields(config: BackboneConfig) -> dict[str, Any]:
    family = "convnext" if isinstance(config, ConvNeXtConfig) else "vit"
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"arch": family, **fields}


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            msg = "not a regular file"
            raise RecordError(msg)
        return parse_object(read_bounded(path))
    except (OSError, RecordError) as error:
        msg = f"{path}: not readable, got {error}. Fetch or save it again."
        raise CheckpointError(msg) from error


def _origin(text: str) -> str:
    """It goes into the record, which others read: one line, and nothing of this machine."""
    stripped = text.strip()
    if not 0 < len(stripped) <= _MAX_ORIGIN or not stripped.isprintable():
        msg = f"--origin: must be one line of at most {_MAX_ORIGIN} characters, got {text!r}."
        raise ConfigError(f"{msg} Say where the weights were got.")
    if stripped.startswith(("/", "~", "file:")):
        msg = f"--origin: names a place on this machine, got {text!r}. Say where they were got."
        raise ConfigError(msg)
    return stripped


def _licence(text: str) -> str:
    try:
        licence = normal_form(text)
    except LicenceError as error:
        msg = f"--licence: {error}. Write an SPDX expression, such as LicenseRef-DINOv3."
        raise ConfigError(msg) from error
    if strange := sorted(unknown_in(licence)):
        listed = ", ".join(strange)
        sys.stderr.write(f"--licence: no rule for {listed}; releases below it will be refused\n")
    return licence
