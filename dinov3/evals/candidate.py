"""The model to be judged: opened from our own folder or from a file of released weights."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov3 import hub
from dinov3.errors import CheckpointError, ConfigError
from dinov3.evals.features import Backbone, Preparation
from dinov3.models.backbone import Backbone as Network
from dinov3.models.convnext import ConvNeXt
from dinov3.release.record import RECORD_NAME, file_sha256
from dinov3.release.tensors import tensor_digest

BACKBONE_NAME = hub.BACKBONE_NAME
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
        stride: Pixels of what it sees between neighbouring patches.
        scale: How much larger it sees pictures than the recipe says: a student of stride 32 sees
            a teacher of patch 8 at four times its size, so that their patches correspond.
        mean: Of the normalisation it was trained with.
        std: Likewise.
        weights: The file its weights come from.
    """

    backbone: Backbone
    untrained: Callable[[int], Backbone]
    stride: int
    scale: float
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

    @property
    def name(self) -> str:
        """For people: the folder of a trained model, the file of released weights."""
        is_ours = self.weights.name in (BACKBONE_NAME, hub.RELEASED_NAME)
        return self.weights.parent.name if is_ours else self.weights.name

    @property
    def cell(self) -> int:
        """Side of a patch in the recipe's pixels; at least 1."""
        return max(1, round(self.stride / self.scale))

    def side(self, size: int) -> int:
        """Side of what the model sees for `size` pixels of the recipe."""
        return round(size * self.scale)

    def view(self, prepare: Preparation) -> Preparation:
        """The recipe's view of a picture at the size this model sees it."""
        return prepare.enlarged(self.side(prepare.crop))

    def require_divisible(self, size: int, field: str = "crop") -> None:
        """Refuses a size whose border no patch would see.

        Args:
            size: Pixels of the recipe.
            field: Its name.

        Raises:
            ConfigError: The size is not a multiple of the patch size.
        """
        whole = math.isclose(self.side(size), size * self.scale)
        if not whole or self.side(size) % self.stride:
            step = f"{self.stride / self.scale:g}"
            msg = f"{field}: not a multiple of the patch size {step}, got {size}. Round it."
            raise ConfigError(msg)


def open_candidate(model: str | Path, weights: Path | None, device: torch.device) -> Candidate:
    """Opens a model by the folder of a training stage, or by a hub name and a file.

    Args:
        model: The folder of an artifact or a release (its EMA teacher is judged), or a name such
            as dinov3_vits16.
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
    backbone = _on_own_grid(hub.load_backbone(weights, name, device=device))
    satellite = _SATELLITE in weights.name.lower()
    return Candidate(
        backbone=backbone,
        untrained=lambda seed: _on_own_grid(hub.random_init(name, seed, device=device)),
        stride=backbone.stride,
        scale=1.0,
        mean=_SATELLITE_MEAN if satellite else hub.IMAGENET_MEAN,
        std=_SATELLITE_STD if satellite else hub.IMAGENET_STD,
        weights=weights,
    )


def _from_folder(folder: Path, device: torch.device) -> Candidate:
    backbone = _on_own_grid(hub.load(folder, role="teacher", device=device))
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
        mean, std = (_colour(config["crops"][name]) for name in ("mean", "std"))
        scale = _scale(config.get("evaluation_scale", 1))
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path}: crops.mean, crops.std, evaluation_scale: {error}. Export it again."
        raise CheckpointError(msg) from error
    return Candidate(
        backbone=backbone,
        untrained=lambda seed: _on_own_grid(hub.random_init(folder, seed, device=device)),
        stride=backbone.stride,
        scale=scale,
        mean=mean,
        std=std,
        weights=hub.weights_in(folder),
    )


def _on_own_grid(network: Network) -> Network:
    """A ConvNeXt resizes its maps to a `patch_size`; judged are the positions it was trained on."""
    if isinstance(network, ConvNeXt):
        network.patch_size = None
    return network


def _scale(value: object) -> float:
    """Raises ValueError unless it is a finite positive number."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        msg = f"must be a positive number, got {value!r}"
        raise ValueError(msg)
    return float(value)


def _colour(values: list[float]) -> Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
