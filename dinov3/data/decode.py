"""From the bytes of an image file to 8-bit RGB, or RGBA where something really is transparent.

Every kind of file either decodes properly or raises `UndecodableImage` with a reason of a fixed
vocabulary. Animations give their first frame, embedded colour profiles are ignored, pictures are
turned upright as their EXIF orientation says. Imports no torch: light processes decode, too.
"""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from dinov3.errors import DataError

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: larger values have no effect

Image.init()  # asked for a list of formats, Pillow looks among the loaded readers only
# Not all it knows: EPS would run an outside program. JPEG covers the MPO of phones.
_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_RARE = ("DIB", "ICO", "PCX", "QOI", "SGI", "TGA")
_FORMATS = [name for name in _COMMON + _RARE if name in Image.OPEN]
_EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"})
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers are known to raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


class UndecodableImage(DataError):
    """Bytes that are no usable image.

    Attributes:
        reason: One of `empty`, `not an image`, `truncated`, `corrupt`, `decompression bomb`,
            `unsupported pixel format`.
        detail: What the reader said, or nothing.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["UndecodableImage"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright picture in mode RGB, or RGBA when at least one pixel is not opaque.

    Args:
        data: The whole file.
        max_pixels: Larger pictures are refused as decompression bombs, before they are unpacked.

    Raises:
        UndecodableImage: With the reason.
    """
    if not data:
        raise UndecodableImage("empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata; bombs are judged by max_pixels
        image = _load(data, max_pixels)
        try:
            decoded = _upright(image, _eight_bit(image))
        except UndecodableImage:
            raise
        except _DAMAGE as error:
            raise UndecodableImage("corrupt", _said(error)) from error
    decoded.info.clear()  # profiles and thumbnails can outweigh the pixels
    return decoded


def pixel_digest(image: Image.Image) -> bytes:
    """sha256 of mode, width and height (`"RGB 640 480"`, a newline) and the rows of raw pixels.

    Equal for equal decoded pictures, whatever file format they came in without loss.
    """
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.digest()


def composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture in mode RGB, laid over a background of one colour."""
    if image.mode == "RGB":
        return image
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """Opens and unpacks the first frame, in the mode of the file."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UndecodableImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage("decompression bomb") from error
    except _DAMAGE as error:
        raise _damaged(data, error) from error
    if image.width * image.height > max_pixels:
        raise UndecodableImage("decompression bomb", f"{image.width} x {image.height} pixels")
    try:
        image.load()
    except Image.DecompressionBombError as error:  # a frame larger than the header said
        raise UndecodableImage("decompression bomb") from error
    except _DAMAGE as error:
        raise _damaged(data, error) from error
    return image


def _damaged(data: bytes, error: BaseException) -> UndecodableImage:
    text = _said(error)
    is_cut_short = any(part in text.lower() for part in ("truncated", "not enough image data"))
    if data.startswith(b"RIFF"):  # the reader of WebP does not say what was wrong
        is_cut_short = int.from_bytes(data[4:8], "little") + 8 > len(data)
    return UndecodableImage("truncated" if is_cut_short else "corrupt", text)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB or RGBA."""
    if image.mode.startswith("I"):
        image = _from_sixteen_bit(image)
    if image.mode not in _EIGHT_BIT:
        raise UndecodableImage("unsupported pixel format", image.mode)
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    lowest, _ = with_alpha.getchannel("A").getextrema()
    return with_alpha.convert("RGB") if lowest == 255 else with_alpha


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    """The high byte: exact for 8-bit values stored in 16 bits, and what 16-bit colour gets."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UndecodableImage("unsupported pixel format", f"{image.mode} beyond 16 bits")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one grey value stands for "nothing"
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _upright(original: Image.Image, image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says; unreadable EXIF says nothing, as in every viewer."""
    try:
        orientation = original.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
