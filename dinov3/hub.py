"""Public constructors: name to backbone, with checked local weights, in eval mode.

Nothing is ever downloaded: Meta hands the released weights out through a form of its own, so
`weights=` takes the path of a file. `load` opens what this project trained.
"""

import dataclasses
import enum
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinov3.errors import CheckpointError, ConfigError
from dinov3.models.vit import VisionTransformer, ViTConfig

if TYPE_CHECKING:
    from PIL import Image

Device = torch.device | str | None
Role = Literal["teacher", "student"]

WEIGHTS_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_IMAGE_SIZE = 8192  # pixels per side; a float picture of this size takes 0.8 GB
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|safetensors)$")
_SATELLITE_HASH = {"dinov3_vitl16": "eadcf0ff", "dinov3_vit7b16": "a6675841"}
_HEAD_PREFIXES = ("dino_head.", "ibot_head.")  # stand beside the backbone in training checkpoints


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
ARCHITECTURES: Mapping[str, ViTConfig] = {
    "dinov3_vits16": _released(384, 12, 6),
    "dinov3_vits16plus": _released(384, 12, 6, **_GATED),
    "dinov3_vitb16": _released(768, 12, 12),
    "dinov3_vitl16": _released(1024, 24, 16),
    "dinov3_vitl16plus": _released(1024, 24, 16, **_GATED),
    "dinov3_vith16plus": _released(1280, 32, 20, **_GATED),
    "dinov3_vit7b16": _released(4096, 40, 32, **_WIDE, untie_global_and_local_cls_norm=True),
}


def _builder(name: str) -> Callable[..., VisionTransformer]:
    def build(
        *,
        pretrained: bool = True,
        weights: Weights | str | Path | None = None,
        check_hash: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> VisionTransformer:
        chosen = _parse_weights(name, weights)
        fields = dataclasses.asdict(ARCHITECTURES[name])
        if _is_satellite(name, chosen):
            fields["untie_global_and_local_cls_norm"] = True
        config = ViTConfig.from_fields({**fields, **overrides})
        _check_source(name, chosen, pretrained)
        if isinstance(chosen, Weights):
            return VisionTransformer(config, device=device, dtype=dtype).eval()
        if check_hash:
            _check_hash(chosen)
        return _fill(config, _read_tensors(chosen), chosen, device=device, dtype=dtype)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build {name.removeprefix("dinov3_")} in eval mode.

    Args:
        pretrained: Read the weights; otherwise they are random.
        weights: Path of a .pth or .safetensors file with the released weights. Weights.SAT493M
            or its name selects the satellite variant of the architecture.
        check_hash: Compare the file with the beginning of its sha256 in the file name.
        device: Where the model goes; "meta" builds the architecture alone.
        dtype: Of the parameters; float32 if None, whatever the file holds.
        **overrides: Fields of `dinov3.models.vit.ViTConfig` that differ from the released model.

    Raises:
        CheckpointError: There is no such file, or it does not hold exactly this model.
        ConfigError: An override or the name of the weights is unknown.
    """
    return build


dinov3_vits16 = _builder("dinov3_vits16")
dinov3_vits16plus = _builder("dinov3_vits16plus")
dinov3_vitb16 = _builder("dinov3_vitb16")
dinov3_vitl16 = _builder("dinov3_vitl16")
dinov3_vitl16plus = _builder("dinov3_vitl16plus")
dinov3_vith16plus = _builder("dinov3_vith16plus")
dinov3_vit7b16 = _builder("dinov3_vit7b16")


def load(
    directory: str | Path, *, role: Role = "teacher", device: Device = None
) -> VisionTransformer:
    """Open a backbone this project trained, in eval mode.

    Args:
        directory: Holds config.json and backbone.safetensors.
        role: The EMA teacher, which is what to use, or the student.
        device: Where the model goes.

    Raises:
        CheckpointError: The directory does not hold exactly such a model.
    """
    folder = Path(directory)
    config = _read_config(folder)
    path = folder / "backbone.safetensors"
    prefix = f"{role}."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in _read_tensors(path).items()
        if name.startswith(prefix)
    }
    if not tensors:
        msg = f"{path}: no tensor of the {role} in it, got role={role!r}. Use teacher or student."
        raise CheckpointError(msg)
    return _fill(config, tensors, path, device=device)


def load_backbone(path: str | Path, arch: str, *, device: Device = None) -> VisionTransformer:
    """Open one file of released weights as the architecture called `arch`, in eval mode.

    Raises:
        CheckpointError: There is no such file, or it does not hold exactly this model.
        ConfigError: No architecture has that name.
    """
    if arch not in ARCHITECTURES:
        msg = f"arch: no such architecture, got {arch!r}. Use one of {', '.join(ARCHITECTURES)}."
        raise ConfigError(msg)
    return _builder(arch)(weights=Path(path), device=device)


def random_init(
    source: ViTConfig | str | Path, seed: int, *, device: Device = None
) -> VisionTransformer:
    """Build the same architecture with random weights, the baseline of every evaluation.

    The draws depend on `seed` alone; the default generator is left as it was.

    Args:
        source: A config, the name of an architecture, or a directory as for `load`.
        seed: Of the weights.
        device: Where the model goes; the draws are the same on every device.
    """
    if isinstance(source, ViTConfig):
        config = source
    else:
        config = ARCHITECTURES.get(str(source)) or _read_config(Path(source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(config, device="cpu")
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
    found = _HASH_IN_NAME.search(weights.name)
    return found is not None and found[1][:8] == _SATELLITE_HASH.get(name)


def _check_hash(path: Path) -> None:
    found = _HASH_IN_NAME.search(path.name)
    if not found:
        msg = f"{path}: no hash in the file name to check. Rename it or pass check_hash=False."
        raise CheckpointError(msg)
    with _existing(path).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(found[1]):
        msg = f"{path}: sha256 is not that of the file name, got {digest}. Fetch the file again."
        raise CheckpointError(msg)


def _read_config(folder: Path) -> ViTConfig:
    path = folder / "config.json"
    try:
        return ViTConfig.from_fields(json.loads(path.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        msg = f"{path}: not the config of a backbone, got {error!r}. Pass a model's directory."
        raise CheckpointError(msg) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        msg = f"{path}: no such file of weights. Pass the path of a .pth or .safetensors file."
        raise CheckpointError(msg)
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth or .safetensors file by their name in the backbone."""
    content = _read_file(_existing(path))
    if not isinstance(content, Mapping):
        msg = f"{path}: not a state dict, got a {type(content).__name__}. Pass the weights alone."
        raise CheckpointError(msg)
    teacher = content.get("teacher")
    if isinstance(teacher, Mapping):
        content = {
            name.removeprefix("backbone."): value
            for name, value in teacher.items()
            if not name.startswith(_HEAD_PREFIXES)
        }
    foreign = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        msg = f"{path}: not a state dict of tensors, got {_some(foreign)}. Pass the weights alone."
        raise CheckpointError(msg)
    return dict(content)


def _read_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # only the zip format, the usual one, can be mapped into memory
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).partition("\n")[0]
        msg = f"{path}: not a readable file of weights, got {first!r}. Fetch or export it again."
        raise CheckpointError(msg) from error


def _fill(
    config: ViTConfig,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """Put exactly these tensors into a model that holds no other memory before."""
    model = VisionTransformer(config, device="meta", dtype=dtype)
    expected = model.state_dict()
    differences = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            f"{name} {list(tensors[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in differences.items() if names]
    if found:
        msg = f"{path}: not the weights of this architecture, got {'; '.join(found)}. Pass its own."
        raise CheckpointError(msg)
    target = device or torch.get_default_device()
    # copies: a tensor mapped from the file would change or vanish with it
    state = {
        name: tensors[name].to(device=target, dtype=value.dtype, copy=True)
        for name, value in expected.items()
    }
    broken = [name for name, value in state.items() if not _is_finite(name, value)]
    if broken:
        msg = (
            f"{path}: NaN or infinity among the weights, got it in {_some(broken, 3)}. Train anew."
        )
        raise CheckpointError(msg)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _is_finite(name: str, value: Tensor) -> bool:
    exempt = value.is_meta or value.numel() == 0 or name.endswith(".bias_mask")  # NaN until filled
    return exempt or bool(torch.stack(torch.aminmax(value)).isfinite().all())


def _some(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
