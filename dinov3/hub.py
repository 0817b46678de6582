"""Public constructors: name to backbone, with checked local weights, in eval mode.

Nothing is ever downloaded: Meta hands the released weights out through a form of its own, so
`weights=` takes the path of a file. `load` opens what this project trained.
"""

import dataclasses
import enum
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from dinov3.errors import CheckpointError, ConfigError
from dinov3.models.backbone import (
    Backbone,
    BackboneConfig,
    backbone_config,
    backbone_of,
)
from dinov3.models.convnext import ConvNeXt, ConvNeXtConfig, build_convnext
from dinov3.models.vit import VisionTransformer, ViTConfig, build_vit
from dinov3.weight_files import check_hash as check_file_hash
from dinov3.weight_files import fill, hash_in_name, read_tensors

if TYPE_CHECKING:
    from PIL import Image

Device = torch.device | str | None
Role = Literal["teacher", "student"]
Family = TypeVar("Family", VisionTransformer, ConvNeXt)

WEIGHTS_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BACKBONE_NAME = "backbone.safetensors"  # in an artifact
RELEASED_NAME = "model.safetensors"  # the same bytes in a release
MAX_IMAGE_SIZE = 8192  # pixels per side; a float picture of this size takes 0.8 GB
_MAX_CONFIG = 2**20  # characters of a config.json
_SATELLITE_HASH = {"dinov3_vitl16": "eadcf0ff", "dinov3_vit7b16": "a6675841"}


class Weights(enum.Enum):
    """The data a released model was trained on."""

    LVD1689M = "LVD1689M"
    SAT493M = "SAT493M"


def _released(embed_dim: int, depth: int, num_heads: int, **fields: Any) -> ViTConfig:
    """What all released models share is the default of ViTConfig, but for the rescaling."""
    size = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return ViTConfig.from_fields({**size, "rope_rescale": 2.0, **fields})


_GATED: dict[str, Any] = {"ffn": "swiglu", "ffn_ratio": 6.0}
_WIDE: dict[str, Any] = {"ffn": "swiglu64", "ffn_ratio": 3.0, "qkv_bias": False}
ARCHITECTURES: Mapping[str, BackboneConfig] = {
    "dinov3_vits16": _released(384, 12, 6),
    "dinov3_vits16plus": _released(384, 12, 6, **_GATED),
    "dinov3_vitb16": _released(768, 12, 12),
    "dinov3_vitl16": _released(1024, 24, 16),
    "dinov3_vitl16plus": _released(1024, 24, 16, **_GATED),
    "dinov3_vith16plus": _released(1280, 32, 20, **_GATED),
    "dinov3_vit7b16": _released(4096, 40, 32, **_WIDE, untie_global_and_local_cls_norm=True),
    "dinov3_convnext_tiny": ConvNeXtConfig(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "dinov3_convnext_small": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "dinov3_convnext_base": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "dinov3_convnext_large": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}


def _builder(name: str, family: Callable[..., Family]) -> Callable[..., Family]:
    def build(
        *,
        pretrained: bool = True,
        weights: Weights | str | Path | None = None,
        check_hash: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> Family:
        chosen = _parse_weights(name, weights)
        _check_source(name, chosen, pretrained)
        fields = dataclasses.asdict(ARCHITECTURES[name])
        if _is_satellite(name, chosen):
            fields["untie_global_and_local_cls_norm"] = True
        fields |= overrides
        is_file = isinstance(chosen, Path)
        model = family(device="meta" if is_file else device, dtype=dtype, **fields)
        if isinstance(chosen, Weights):
            return model.eval()
        if check_hash:
            check_file_hash(chosen)
        return fill(model, read_tensors(chosen), chosen, device=device)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build {name.removeprefix("dinov3_")} in eval mode.

    Args:
        pretrained: Read the weights; otherwise they are random.
        weights: Path of a .pth or .safetensors file with the released weights. Weights.SAT493M
            or its name selects the satellite variant of the architecture.
        check_hash: Compare the file with the beginning of its sha256 in the file name.
        device: Where the model goes; "meta" builds the architecture alone.
        dtype: Of the parameters; float32 if None, whatever the file holds.
        **overrides: Fields of `ViTConfig` or `ConvNeXtConfig` that differ from the released model.

    Raises:
        CheckpointError: There is no such file, or it does not hold exactly this model.
        ConfigError: An override or the name of the weights is unknown.
    """
    return build


dinov3_vits16 = _builder("dinov3_vits16", build_vit)
dinov3_vits16plus = _builder("dinov3_vits16plus", build_vit)
dinov3_vitb16 = _builder("dinov3_vitb16", build_vit)
dinov3_vitl16 = _builder("dinov3_vitl16", build_vit)
dinov3_vitl16plus = _builder("dinov3_vitl16plus", build_vit)
dinov3_vith16plus = _builder("dinov3_vith16plus", build_vit)
dinov3_vit7b16 = _builder("dinov3_vit7b16", build_vit)
dinov3_convnext_tiny = _builder("dinov3_convnext_tiny", build_convnext)
dinov3_convnext_small = _builder("dinov3_convnext_small", build_convnext)
dinov3_convnext_base = _builder("dinov3_convnext_base", build_convnext)
dinov3_convnext_large = _builder("dinov3_convnext_large", build_convnext)


def load(
    directory: str | Path,
    *,
    role: Role = "teacher",
    key: str | Path | None = None,
    expect: str | None = None,
    device: Device = None,
) -> Backbone:
    """Open a backbone this project trained, in eval mode.

    Args:
        directory: Holds config.json and backbone.safetensors, or a release.
        role: The EMA teacher, which is what to use, or the student.
        key: Public key of a release's publisher: the release is verified, and the model is made of
            the very bytes that were.
        expect: With a key, `MODEL@VERSION` that the release must be.
        device: Where the model goes.

    Raises:
        CheckpointError: The directory does not hold exactly such a model, or cannot be verified.
        LineageBroken: With a key: the release is refused.
        ConfigError: `expect` without a key.
    """
    folder = Path(directory)
    path = weights_in(folder)
    if key is not None:
        from dinov3.verified_weights import open_verified  # lazily: plain weights need no verifier

        release = open_verified(folder, Path(key), expect)
        config = _config_of(release.config(), folder / "config.json")
        content = release.tensors(RELEASED_NAME)
    elif expect is not None:
        msg = f"expect: says nothing without the publisher's key, got {expect!r}. Give key=."
        raise ConfigError(msg)
    else:
        config, content = _read_config(folder), read_tensors(path)
    prefix = f"{role}."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in content.items()
        if name.startswith(prefix)
    }
    if not tensors:
        msg = f"{path}: no tensor of the {role} in it, got role={role!r}. Use teacher or student."
        raise CheckpointError(msg)
    return backbone_from(config, tensors, path, device=device)


def backbone_from(
    config: BackboneConfig, tensors: Mapping[str, Tensor], path: Path, *, device: Device = None
) -> Backbone:
    """Build the network that a config describes, of exactly these tensors, in eval mode.

    Both may be anybody's: what has more layers than there are tensors is not even begun.

    Raises:
        CheckpointError: They do not fit, or no memory holds a network of that size.
    """
    num_layers = sum(config.depths) if isinstance(config, ConvNeXtConfig) else config.depth
    if num_layers > len(tensors):
        msg = f"{path}: of fewer tensors than layers, got {len(tensors)} for {num_layers}. "
        raise CheckpointError(f"{msg}Pass the weights that belong to the config.")
    try:
        model = backbone_of(config, device="meta")
    except (RuntimeError, TypeError, OverflowError) as error:  # how torch refuses such sizes
        msg = f"{path}: no network has the sizes of its config, got {str(error)[:200]!r}. "
        raise CheckpointError(f"{msg}Pass a model's directory.") from error
    return fill(model, tensors, path, device=device)


def weights_in(folder: Path) -> Path:
    """The file of a backbone's weights in the folder of an artifact or of a release."""
    is_release = (folder / RELEASED_NAME).exists() and not (folder / BACKBONE_NAME).exists()
    return folder / (RELEASED_NAME if is_release else BACKBONE_NAME)


def load_backbone(path: str | Path, arch: str, *, device: Device = None) -> Backbone:
    """Open one file of released weights as the architecture called `arch`, in eval mode.

    Raises:
        CheckpointError: There is no such file, or it does not hold exactly this model.
        ConfigError: No architecture has that name.
    """
    if arch not in ARCHITECTURES:
        msg = f"arch: no such architecture, got {arch!r}. Use one of {', '.join(ARCHITECTURES)}."
        raise ConfigError(msg)
    if isinstance(ARCHITECTURES[arch], ConvNeXtConfig):
        return _builder(arch, build_convnext)(weights=Path(path), device=device)
    return _builder(arch, build_vit)(weights=Path(path), device=device)


def random_init(
    source: BackboneConfig | str | Path, seed: int, *, device: Device = None
) -> Backbone:
    """Build the same architecture with random weights, the baseline of every evaluation.

    The draws depend on `seed` alone; the default generator is left as it was.

    Args:
        source: A config, the name of an architecture, or a directory as for `load`.
        seed: Of the weights.
        device: Where the model goes; the draws are the same on every device.
    """
    if isinstance(source, BackboneConfig):
        config = source
    else:
        config = ARCHITECTURES.get(str(source)) or _read_config(Path(source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = backbone_of(config, device="cpu")
    return model.to(device).eval()


def transform(
    size: int, *, resize: int | None = None, background: str = "white"
) -> "Callable[[Image.Image], Tensor]":
    """Make the evaluation transform: a picture in, a normalised tensor [3, size, size] out.

    The short side is resized (bicubic, antialiased), the centre is cut out, and the values are
    normalised by ImageNet's mean and deviation. Transparency is composited over the background.

    Args:
        size: Side of the result in pixels; a multiple of the patch size loses no border.
        resize: Short side before the cut; 8/7 of `size` if None, as 256 is to 224.
        background: Colour name or "#rrggbb".

    Raises:
        ConfigError: A size or the colour is impossible.
    """
    _check_sizes(size, resize)
    short_side = round(size * 8 / 7) if resize is None else resize
    from torchvision.transforms import v2  # lazily: a backbone does not need torchvision

    steps = v2.Compose(
        [
            v2.Resize(short_side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    colour = _colour(background)

    def apply(image: "Image.Image") -> Tensor:
        result: Tensor = steps(v2.functional.pil_to_tensor(_flatten(image, colour)))
        return result

    return apply


def _check_sizes(size: int, resize: int | None) -> None:
    short_side = size if resize is None else resize
    for name, value, low in (("size", size, 1), ("resize", short_side, size)):
        if type(value) is not int or not low <= value <= MAX_IMAGE_SIZE:
            rule = f"not a whole number from {low} to {MAX_IMAGE_SIZE}"
            msg = f"{name}: {rule}, got {value!r}. Change it."
            raise ConfigError(msg)


def _colour(name: str) -> tuple[int, ...]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        msg = f'background: not a colour, got {name!r}. Use a name or "#rrggbb".'
        raise ConfigError(msg) from error


def _flatten(image: "Image.Image", background: tuple[int, ...]) -> "Image.Image":
    """Any picture as upright RGB without transparency, a very long one cut to its middle."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    longest = 8 * min(upright.size)  # enlarging a line of pixels whole would fill the memory
    if max(upright.size) > longest:
        width, height = (min(side, longest) for side in upright.size)
        left, top = (upright.width - width) // 2, (upright.height - height) // 2
        upright = upright.crop((left, top, left + width, top + height))
    if upright.mode.startswith("I"):  # 16 bits per value; Pillow itself would clip them to 255
        return upright.convert("F").point(lambda value: value / 256).convert("L").convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    behind = Image.new("RGBA", upright.size, background)
    return Image.alpha_composite(behind, upright.convert("RGBA")).convert("RGB")


def _parse_weights(name: str, weights: Weights | str | Path | None) -> Weights | Path:
    if weights is None:
        return Weights.LVD1689M
    if isinstance(weights, str) and weights in Weights.__members__:
        weights = Weights[weights]
    if isinstance(weights, Weights):
        if weights is Weights.SAT493M and name not in _SATELLITE_HASH:
            known = ", ".join(_SATELLITE_HASH)
            msg = f"weights: SAT493M is published for {known} only, got {name}. Use LVD1689M."
            raise ConfigError(msg)
        return weights
    if re.match(r"[a-z]{2,}:/", str(weights)):
        msg = (
            f"weights: nothing is ever downloaded, got {weights}. Fetch the file by Meta's form "
            f"({WEIGHTS_FORM}) and pass its path."
        )
        raise CheckpointError(msg)
    return Path(weights).expanduser()


def _check_source(name: str, weights: Weights | Path, pretrained: bool) -> None:
    if pretrained and isinstance(weights, Weights):
        msg = (
            f"weights: no local file for {name} ({weights.name}), got pretrained=True alone. Get "
            f"it by Meta's form ({WEIGHTS_FORM}) for weights=PATH, or pass pretrained=False."
        )
        raise CheckpointError(msg)
    if not pretrained and isinstance(weights, Path):
        msg = f"weights: a file is given with pretrained=False, got {weights}. Leave one out."
        raise ConfigError(msg)


def _is_satellite(name: str, weights: Weights | Path) -> bool:
    if isinstance(weights, Weights):
        return weights is Weights.SAT493M
    promised = hash_in_name(weights)
    return promised is not None and promised[:8] == _SATELLITE_HASH.get(name)


def _read_config(folder: Path) -> BackboneConfig:
    path = folder / "config.json"
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            msg = "not a regular file"
            raise ValueError(msg)
        with path.open(encoding="utf-8") as stream:
            fields = json.loads(stream.read(_MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path}: not the config of a backbone, got {error!r}. Pass a model's directory."
        raise CheckpointError(msg) from error
    return _config_of(fields, path)


def _config_of(fields: Any, path: Path) -> BackboneConfig:
    try:
        return backbone_config(fields["model"])
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        msg = f"{path}: not the config of a backbone, got {error!r}. Pass a model's directory."
        raise CheckpointError(msg) from error
