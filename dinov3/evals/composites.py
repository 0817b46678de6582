"""Composites: cut-out pictures on photographs, with exact label masks, for dense evaluation.

    photograph ──► a crop of it, S x S ──► 3 to 6 cut-outs, one over the other ──► scene and mask

Mask: 0 is the background, 1 … C are the classes, 255 is ignored (alpha between .05 and .95). A
scene is a pure function of its pictures, the seed and its number. Clutter behind the objects is
the point: on a plain background colour alone solves the task.
"""

# N scenes, S side in pixels, C classes

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dinov3.data.decode import UndecodableImage, composite, decode_image, pixel_digest
from dinov3.data.samplers import philox_words
from dinov3.data.sources import open_source
from dinov3.errors import DataError
from dinov3.evals.metrics import Integers
from dinov3.release.record import digest_of

BACKGROUND = 0
IGNORED = 255
MAX_CLASSES = IGNORED - 1

# Photographs in the package of scikit-image, all free to use (CC0 or public domain). Left out:
# drawings, masks, nearly empty ones, and the second view of the stereo pair.
PACKAGED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)

_STREAM = int.from_bytes(b"scenes")
_SPLIT_STREAM = int.from_bytes(b"photos")
_CLEAR, _SOLID = 0.05, 0.95  # of alpha: below is background, from there on the object
_MIN_SHARE = 0.05  # of clear and of solid pixels: less is a picture without a shape of its own
_OBJECT_SIDE = (0.3, 0.6)  # long side of an object, of the scene's
_CROP_SIDE = (0.4, 1.0)  # side of the background's crop, of the photograph's short side
_MAX_PHOTOGRAPH = 512  # pixels of the short side that are kept
_DRAWS = 16  # per scene and per object
_WHITE, _BLACK = 255, 0
_TURNS = (None, *Image.Transpose)
_ORDERS = tuple(permutations(range(3)))  # of the channels


@dataclass(frozen=True)
class Layout:
    """What scenes look like.

    Attributes:
        size: Side, pixels.
        num_objects: Fewest and most objects of a scene.
    """

    size: int
    num_objects: tuple[int, int]


@dataclass(frozen=True)
class Scenes:
    """Composed pictures and what is where in them."""

    classes: tuple[str, ...]  # mask values 1 … C
    pictures: npt.NDArray[np.uint8]  # [N, S, S, 3]
    masks: npt.NDArray[np.uint8]  # [N, S, S]

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self) -> Iterator[Image.Image]:
        """The pictures, as evaluations take them."""
        for picture in self.pictures:
            yield Image.fromarray(picture)


@dataclass(frozen=True)
class Half:
    """What the scenes of one half are made of."""

    cutouts: tuple[tuple[Image.Image, ...], ...]  # class by class, mode RGBA
    photographs: tuple[Image.Image, ...]  # modes L and RGB


def cut_outs(
    images: Iterable[Image.Image], labels: Integers, num_classes: int, max_side: int
) -> tuple[tuple[Image.Image, ...], ...]:
    """The pictures that have a shape of their own, class by class, cut to what is visible.

    Args:
        images: Decoded pictures, RGBA where something is transparent.
        labels: [N], their classes.
        num_classes: C.
        max_side: Larger ones are reduced to this, pixels.
    """
    found: list[list[Image.Image]] = [[] for _ in range(num_classes)]
    for image, label in zip(images, labels, strict=True):
        if _has_shape(image):
            box = image.getchannel("A").point(lambda value: value if value > 255 * _CLEAR else 0)
            cut = image.crop(box.getbbox())
            cut.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
            found[label].append(cut)
    return tuple(tuple(cuts) for cuts in found)


def packaged_photographs() -> dict[str, Image.Image]:
    """Photographs that come with scikit-image, by the digest of their pixels.

    Raises:
        DataError: The package is not installed, or lacks one of them.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        msg = "backgrounds: scikit-image is not installed, got no package. Name a source of photos."
        raise DataError(msg)
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in PACKAGED if not (folder / name).is_file()]
    if missing:
        msg = (
            f"backgrounds: scikit-image comes without {', '.join(missing)}, got {folder}. Install "
            f"the locked version."
        )
        raise DataError(msg)
    return _by_digest((name, (folder / name).read_bytes()) for name in PACKAGED)


def source_photographs(spec: str) -> dict[str, Image.Image]:
    """Photographs of a source, `kind:path`, by the digest of their pixels.

    Raises:
        DataError: There is no such source, or something in it is no picture.
    """
    source = open_source(spec)
    entries = list(source.entries())
    refused = [entry for entry in entries if entry.refused is not None]
    if refused:
        msg = f"{refused[0].path}: no background, got {refused[0].refused}. Remove it from {spec}."
        raise DataError(msg)
    return _by_digest((entry.path, source.read(entry.path)) for entry in entries)


def split_photographs(
    photographs: dict[str, Image.Image], seed: int
) -> tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]:
    """Two halves drawn by the seed: backgrounds to learn from and others to be judged on.

    Raises:
        DataError: There are fewer than two.
    """
    if len(photographs) < 2:
        msg = (
            f"backgrounds: at least two different photographs are needed, got {len(photographs)}. "
            f"Add some."
        )
        raise DataError(msg)
    digests = sorted(photographs)
    words = philox_words(seed, _SPLIT_STREAM, (0, 0, 0), len(digests))
    drawn = [digests[place] for place in np.argsort(words, kind="stable")]
    half = len(drawn) // 2
    first, second = (
        tuple(photographs[digest] for digest in part) for part in (drawn[:half], drawn[half:])
    )
    return first, second


def photographs_digest(photographs: dict[str, Image.Image]) -> str:
    """What identifies a collection of photographs: sha256 over the digests of their pixels."""
    return digest_of(sorted(photographs))


def shared_classes(
    classes: Sequence[str], first: Half, second: Half
) -> tuple[tuple[str, ...], Half, Half]:
    """Only the classes that both halves have a cut-out of, in the same order; at most 254."""
    kept = [
        index for index in range(len(classes)) if first.cutouts[index] and second.cutouts[index]
    ][:MAX_CLASSES]
    one, other = (
        Half(tuple(half.cutouts[index] for index in kept), half.photographs)
        for half in (first, second)
    )
    return tuple(classes[index] for index in kept), one, other


def build_composites(
    classes: tuple[str, ...], half: Half, layout: Layout, num: int, *, seed: int, stream: int
) -> Scenes:
    """Scenes 0 … num - 1 of one half.

    Args:
        classes: Of the cut-outs.
        half: What they are made of.
        layout: What they look like.
        num: How many; a longer row begins with the shorter one.
        seed: Of the draws.
        stream: Keeps the draws of the halves apart.

    Raises:
        DataError: There is no class.
    """
    if not classes:
        msg = "composites: needs pictures with transparency, got none. Choose another source."
        raise DataError(msg)
    scenes = [compose(half, layout, seed, stream, number) for number in range(num)]
    return Scenes(
        classes,
        np.stack([picture for picture, _ in scenes]),
        np.stack([mask for _, mask in scenes]),
    )


def compose(
    half: Half, layout: Layout, seed: int, stream: int, number: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """One scene: its picture [S, S, 3] and its mask [S, S].

    Every class is equally likely, and every picture within its class.
    """
    fewest, most = layout.num_objects
    words = philox_words(seed, _STREAM, (0, number, stream), _DRAWS * (1 + most))
    draws = (words >> np.uint64(11)).astype(np.float64) / 2**53  # [0, 1)
    first, *others = draws.reshape(-1, _DRAWS).tolist()
    scene = _backdrop(half.photographs, layout.size, first)
    mask = np.full((layout.size, layout.size), BACKGROUND, dtype=np.uint8)
    for of_object in others[: fewest + int(first[-1] * (most - fewest + 1))]:
        _paste(scene, mask, half.cutouts, of_object)
    return np.asarray(scene), mask


def _backdrop(photographs: Sequence[Image.Image], size: int, draws: list[float]) -> Image.Image:
    """A crop of a photograph, turned and in other colours.

    A handful of photographs as they are would be learnt by heart, and grey ones would let colour
    alone tell the objects.
    """
    which, scale, left, top, turn, order, *tint = draws
    photograph = photographs[int(which * len(photographs))]
    side = max(1, round(min(photograph.size) * _between(_CROP_SIDE, scale)))
    x, y = int(left * (photograph.width - side + 1)), int(top * (photograph.height - side + 1))
    box = (x, y, x + side, y + side)
    crop = photograph.resize((size, size), Image.Resampling.BICUBIC, box=box)
    chosen = _TURNS[int(turn * len(_TURNS))]
    if chosen is not None:
        crop = crop.transpose(chosen)
    if crop.mode == "RGB":
        channels = crop.split()
        return Image.merge("RGB", [channels[place] for place in _ORDERS[int(order * len(_ORDERS))]])
    dark = tuple(int(128 * value) for value in tint[:3])
    light = tuple(128 + int(128 * value) for value in tint[3:6])
    return ImageOps.colorize(crop, dark, light, blackpoint=_BLACK, whitepoint=_WHITE)


def _paste(
    scene: Image.Image,
    mask: npt.NDArray[np.uint8],
    cutouts: Sequence[Sequence[Image.Image]],
    draws: list[float],
) -> None:
    """Lays one object over the scene, wholly inside it."""
    which_class, which, scale, left, top, flip, *_ = draws
    index = int(which_class * len(cutouts))
    cut = cutouts[index][int(which * len(cutouts[index]))]
    ratio = scene.width * _between(_OBJECT_SIDE, scale) / max(cut.size)
    width, height = (max(1, round(side * ratio)) for side in cut.size)
    shown = cut.resize((width, height), Image.Resampling.BICUBIC)
    if flip < 0.5:
        shown = ImageOps.mirror(shown)
    x, y = int(left * (scene.width - width + 1)), int(top * (scene.height - height + 1))
    alpha = shown.getchannel("A")
    scene.paste(shown, (x, y), alpha)
    share = np.asarray(alpha) / 255
    part = mask[y : y + height, x : x + width]
    part[share > _CLEAR] = IGNORED
    part[share >= _SOLID] = index + 1


def _between(ends: tuple[float, float], draw: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * draw


def _has_shape(image: Image.Image) -> bool:
    """Whether both enough of the picture and enough around it is there."""
    if image.mode != "RGBA":
        return False
    share = np.asarray(image.getchannel("A")) / 255
    return bool((share <= _CLEAR).mean() >= _MIN_SHARE and (share >= _SOLID).mean() >= _MIN_SHARE)


def _by_digest(files: Iterable[tuple[str, bytes]]) -> dict[str, Image.Image]:
    """Each photograph once, whatever its name: a copy must not stand on both sides."""
    found = {}
    for name, data in files:
        try:
            image = composite(decode_image(data), (_WHITE, _WHITE, _WHITE))
        except UndecodableImage as error:
            msg = f"{name}: no background, got {error}. Remove it."
            raise DataError(msg) from error
        found[pixel_digest(image).hex()] = _reduced(image)
    return found


def _reduced(image: Image.Image) -> Image.Image:
    """At most so large, and in one channel if it is grey."""
    scale = _MAX_PHOTOGRAPH / min(image.size)
    if scale < 1:
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    red, green, blue = (np.asarray(channel) for channel in image.split())
    is_grey = np.array_equal(red, green) and np.array_equal(green, blue)
    return image.convert("L") if is_grey else image


def digest_half(pixel_sha256: str) -> int:
    """Which half of a training set a picture belongs to, 0 or 1: by its pixels alone.

    Hashed once more, since the split of the table may have looked at the same digits.
    """
    return hashlib.sha256(f"scenes {pixel_sha256}".encode()).digest()[0] & 1
