"""A trained dino.txt, opened over its frozen backbone.

The trained tensors lie in one folder, the backbone stays an artifact of its own; the record of the
first names the second, and any other backbone is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dinov3 import hub
from dinov3.data.tokenizer import tokenize
from dinov3.errors import CheckpointError, ConfigError, LineageBroken
from dinov3.evals.aligned import AlignedModel
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.release.record import RECORD_NAME, RecordError, file_sha256, parse_object, read_record
from dinov3.release.tensors import tensor_digest

WEIGHTS_NAME = "dinotxt.safetensors"

_FROZEN = "visual_model.backbone."


def open_dinotxt(folder: Path, backbone: Path, device: torch.device) -> AlignedModel:
    """Opens a trained dino.txt over the backbone it was trained on.

    Args:
        folder: Holds dinotxt.safetensors, config.json and record.json.
        backbone: Folder of the frozen backbone's artifact.
        device: Where to put both.

    Raises:
        CheckpointError: A folder does not hold exactly such a model.
        LineageBroken: The record of the first does not name the second.
    """
    require_same_backbone(folder, backbone)
    config = _read_config(folder / CONFIG_NAME)
    frozen = hub.load(backbone, role="teacher", device=device)
    try:
        fields = DinoTxtConfig.from_fields(config["model"])
        mean, std = (_colour(config["crops"][name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        msg = f"{folder / CONFIG_NAME}: not the config of a dino.txt, got {error!r}. Train it anew."
        raise CheckpointError(msg) from error
    model = DinoTxt(fields, frozen, device=device)
    _fill(model, folder / WEIGHTS_NAME)
    return AlignedModel(
        model=model.eval(),
        tokenize=lambda texts: tokenize(texts, fields.text.context_length),
        stride=frozen.patch_size or frozen.stride,
        patch_width=fields.embed_dim // fields.num_parts if fields.use_patch_tokens else None,
        mean=mean,
        std=std,
    )


def require_same_backbone(folder: Path, backbone: Path) -> None:
    """Refuses a backbone other than the one a dino.txt was trained on.

    Raises:
        CheckpointError: A file is missing.
        LineageBroken: The record names no such backbone, or cannot be read.
    """
    weights, record_path = backbone / BACKBONE_NAME, folder / RECORD_NAME
    made_by = next(
        (path for path in (backbone, backbone.parent) if (path / RECORD_NAME).is_file()), backbone
    )
    for needed in (weights, record_path, made_by / RECORD_NAME):
        if not needed.is_file():
            msg = f"{needed}: missing. Give the folders as their stages left them."
            raise CheckpointError(msg)
    try:
        inputs = read_record(record_path).inputs
    except RecordError as error:
        raise LineageBroken(str(error)) from error
    found = file_sha256(weights), file_sha256(made_by / RECORD_NAME)
    named = [edge for edge in inputs if Path(edge.name).name == BACKBONE_NAME]
    if found not in [(edge.sha256, edge.record) for edge in named]:
        known = ", ".join(edge.sha256 for edge in named) or "none"
        msg = (
            f"{weights}: not the backbone of {folder}, got sha256 {found[0]} instead of {known}. "
            f"Give the one it was trained on."
        )
        raise LineageBroken(msg)


def identity(folder: Path, backbone: Path) -> dict[str, Any]:
    """Digests of both: the files, their tensors, the record of the trained one."""
    weights, frozen = folder / WEIGHTS_NAME, backbone / BACKBONE_NAME
    return {
        "name": WEIGHTS_NAME,
        "sha256": file_sha256(weights),
        "tensors": tensor_digest(weights),
        "record": file_sha256(folder / RECORD_NAME),
        "backbone": {"sha256": file_sha256(frozen), "tensors": tensor_digest(frozen)},
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, RecordError) as error:
        msg = f"{path}: not readable, got {str(error)!r}. Give the folder of a dino.txt."
        raise CheckpointError(msg) from error


def _fill(model: torch.nn.Module, path: Path) -> None:
    """Puts exactly the trained tensors into the model; the frozen ones are there."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        msg = f"{path}: not a readable file of weights, got {str(error)!r}. Train it anew."
        raise CheckpointError(msg) from error
    expected = {
        name: value for name, value in model.state_dict().items() if not name.startswith(_FROZEN)
    }
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    if wrong := sorted(name for name, _ in shapes.items() ^ wanted.items()):
        msg = f"{path}: not the weights of this model, got other {', '.join(dict.fromkeys(wrong))}."
        raise CheckpointError(f"{msg:.400} Give its own folder.")
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        msg = f"{path}: NaN or infinity among the weights, got it in {broken[0]}. Train it anew."
        raise CheckpointError(msg)
    model.load_state_dict(tensors, strict=False)


def _colour(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
