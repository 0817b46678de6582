"""Local files of weights: read one, check it against its name, put it into a model.

A file is data: only tensors are read from it, and they fit the model exactly or are refused.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov3.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|safetensors)$")
_HEAD_PREFIXES = ("dino_head.", "ibot_head.")  # stand beside the backbone in training checkpoints


def hash_in_name(path: Path) -> str | None:
    """The beginning of the sha256 that the names of released files end with."""
    found = _HASH_IN_NAME.search(path.name)
    return found[1] if found else None


def check_hash(path: Path) -> None:
    """Compare a file with the hash in its name.

    Raises:
        CheckpointError: There is no such file, no hash in its name, or another one.
    """
    promised = hash_in_name(path)
    if promised is None:
        msg = f"{path}: no hash in the file name to check. Rename it or pass check_hash=False."
        raise CheckpointError(msg)
    with _existing(path).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(promised):
        msg = f"{path}: sha256 is not that of the file name, got {digest}. Fetch the file again."
        raise CheckpointError(msg)


def read_tensors(path: Path, *, with_heads: bool = False) -> dict[str, Tensor]:
    """Tensors of a .pth or .safetensors file by their name in the backbone.

    Args:
        path: The file.
        with_heads: Keep the heads of a training checkpoint, and `backbone.` before the others.

    Raises:
        CheckpointError: There is no such file, or it holds anything but tensors.
    """
    content = _read_file(_existing(path))
    if not isinstance(content, Mapping):
        msg = f"{path}: not a state dict, got a {type(content).__name__}. Pass the weights alone."
        raise CheckpointError(msg)
    teacher = content.get("teacher")
    if isinstance(teacher, Mapping):
        content = teacher
    is_nested = any(str(name).startswith("backbone.") for name in content)
    if is_nested and not with_heads and all(isinstance(name, str) for name in content):
        content = _backbone_of(content)
    foreign = [str(name) for name, value in content.items() if not _is_plain(name, value)]
    if foreign:
        msg = f"{path}: not a state dict of tensors, got {_some(foreign)}. Pass the weights alone."
        raise CheckpointError(msg)
    return dict(content)


def _is_plain(name: object, value: object) -> bool:
    """Whether it is a named tensor that holds each of its elements, as a model's do.

    One number may be spread over any shape: few bytes in the file, and no end of memory as a copy.
    """
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _backbone_of(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the backbone of a training checkpoint, by its name there."""
    return {
        name.removeprefix("backbone."): value
        for name, value in content.items()
        if not name.startswith(_HEAD_PREFIXES)
    }


def fill(
    model: Module, tensors: Mapping[str, Tensor], path: Path, *, device: torch.device | str | None
) -> Module:
    """Put exactly these tensors into a model built on the meta device; it is in eval mode then.

    Args:
        model: Takes the tensors in its own dtypes.
        tensors: By their name in the model.
        path: The file they come from, for messages.
        device: Where the model goes; the default device if None.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape or not finite.
    """
    expected = model.state_dict()
    _check_names_and_shapes(tensors, expected, path)
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
    _check_aliases(model, state, path)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _check_names_and_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    differences = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            f"{name} {list(tensors[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
        "without their scale": [  # whole numbers of a quantised file
            f"{name} {tensors[name].dtype}"
            for name, value in expected.items()
            if name in tensors
            and value.is_floating_point()
            and not tensors[name].is_floating_point()
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in differences.items() if names]
    if found:
        got = "; ".join(found)
        msg = f"{path}: not the weights of this architecture, got {got}. Name the one they are of."
        raise CheckpointError(msg)


def _check_aliases(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse two values for one parameter (a ConvNeXt has its last norm under two names)."""
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(parameter, name)
        if not (state[name].is_meta or torch.equal(state[name], state[first])):
            msg = f"{path}: one parameter with two values, got {first} unlike {name}. Export again."
            raise CheckpointError(msg)


def _existing(path: Path) -> Path:
    if not path.is_file():
        msg = f"{path}: no such file of weights. Pass the path of a .pth or .safetensors file."
        raise CheckpointError(msg)
    return path


# what torch's reader raises on damaged files, found by flipping their bits
_DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError),
    *(RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError),
)


def _read_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # only the zip format, the usual one, can be mapped into memory
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGED as error:
        first = str(error).partition("\n")[0]
        msg = f"{path}: not a readable file of weights, got {first!r}. Fetch or export it again."
        raise CheckpointError(msg) from error


def _is_finite(name: str, value: Tensor) -> bool:
    exempt = value.is_meta or value.numel() == 0 or name.endswith(".bias_mask")  # NaN until filled
    return exempt or bool(torch.stack(torch.aminmax(value)).isfinite().all())


def _some(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    shown = (name if name.isprintable() else ascii(name) for name in names[:limit])
    return ", ".join(shown) + rest
