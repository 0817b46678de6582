"""The model to be judged: opened from our own folder or from a file of released weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov3 import hub
from dinov3.errors import CheckpointError, ConfigError
from dinov3.evals.features import Backbone
from dinov3.release.record import RECORD_NAME, file_sha256
from dinov3.release.tensors import tensor_digest

BACKBONE_NAME = "backbone.safetensors"
CONFIG_NAME = "config.json"

Colour = tuple[float, float, float]

_SATELLITE = "sat493m"  # in the names of the released files
_SATELLITE_MEAN = (0.430, 0.411, 0.296)
_SATELLITE_STD = (0.213, 0.156, 0.143)


@dataclass(frozen=True)
class Candidate:
    """A frozen backbone and what is needed to judge it.

    Attributes:
        backbone: On the device of the evaluation, in evaluation mode.
        untrained: The same architecture with the initial weights of a seed.
        patch_size: Pixels.
        mean: Of the normalisation it was trained with.
        std: Likewise.
        weights: The file its weights come from.
    """

    backbone: Backbone
    untrained: Callable[[int], Backbone]
    patch_size: int
    mean: Colour
    std: Colour
    weights: Path

    def identity(self) -> dict[str, str | None]:
        """Digests: the file, its tensors, the record beside it (None without one)."""
        safe = self.weights.suffix == ".safetensors"
        record = self.weights.parent / RECORD_NAME
        return {
            "name": self.weights.name,
            "sha256": file_sha256(self.weights),
            "tensors": tensor_digest(self.weights) if safe else None,
            "record": file_sha256(record) if record.is_file() else None,
        }

    def require_divisible(self, crop: int) -> None:
        """Refuses a crop whose border no patch would see.

        Raises:
            ConfigError: The crop is not a multiple of the patch size.
        """
        if crop % self.patch_size:
            msg = f"crop: not a multiple of the patch size {self.patch_size}, got {crop}. Round it."
            raise ConfigError(msg)


def open_candidate(model: str | Path, weights: Path | None, device: torch.device) -> Candidate:
    """Opens a model by the folder of a training stage, or by a hub name and a file.

    Args:
        model: A folder with config.json and backbone.safetensors (its EMA teacher is judged), or a
            name such as dinov3_vits16.
        weights: The file of a hub model; None for a folder.
        device: Where to put it.

    Raises:
        CheckpointError: Neither such a folder nor such a name, or the weights do not fit.
    """
    folder = Path(model)
    if folder.is_dir():
        if weights is not None:
            msg = f"weights: a folder brings its own, got {weights}. Leave it out."
            raise CheckpointError(msg)
        return _from_folder(folder, device)
    name = str(model)
    if name not in hub.ARCHITECTURES:
        known = ", ".join(hub.ARCHITECTURES)
        msg = f"model: neither a folder nor one of {known}, got {name!r}. Choose one."
        raise CheckpointError(msg)
    if weights is None:
        msg = f"weights: a hub model needs a local file, got none for {name}. Give its path."
        raise CheckpointError(msg)
    backbone = hub.load_backbone(weights, name, device=device)
    satellite = _SATELLITE in weights.name.lower()
    return Candidate(
        backbone=backbone,
        untrained=lambda seed: hub.random_init(name, seed, device=device),
        patch_size=hub.ARCHITECTURES[name].patch_size,
        mean=_SATELLITE_MEAN if satellite else hub.IMAGENET_MEAN,
        std=_SATELLITE_STD if satellite else hub.IMAGENET_STD,
        weights=weights,
    )


def _from_folder(folder: Path, device: torch.device) -> Candidate:
    backbone = hub.load(folder, role="teacher", device=device)
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
        mean, std = (_colour(config["crops"][name]) for name in ("mean", "std"))
        patch_size = int(config["model"]["patch_size"])
    except (ValueError, KeyError, TypeError) as error:
        msg = (
            f"{path}: crops.mean, crops.std or model.patch_size missing: {error}. Export it again."
        )
        raise CheckpointError(msg) from error
    return Candidate(
        backbone=backbone,
        untrained=lambda seed: hub.random_init(folder, seed, device=device),
        patch_size=patch_size,
        mean=mean,
        std=std,
        weights=folder / BACKBONE_NAME,
    )


def _colour(values: list[float]) -> Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
