"""Whatever an image file can be: decoded properly, or refused with its reason."""

import hashlib
import io
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dinov3.data.decode import UndecodableImage, composite, decode_image, pixel_digest

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(mode: str = "RGB", size: tuple[int, int] = (50, 40)) -> Image.Image:
    """Smooth, upper left corner red."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.paste(RED, (0, 0, size[0] // 3, size[1] // 3))
    return image.convert(mode)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    between = b"".join(chunk(name.encode(), data) for name, data in extra.items())
    body = chunk(b"IHDR", header) + between + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


LOSSLESS = ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI"]
LOSSY = ["JPEG", "WEBP", "AVIF", "JPEG2000"]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_very_pixels(kind):
    decoded = decode_image(file_of(picture(), kind))
    assert decoded.mode == "RGB"
    assert pixel_digest(decoded) == pixel_digest(picture())


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_decode(kind):
    decoded = decode_image(file_of(picture(), kind, quality=95))
    assert (decoded.mode, decoded.size) == ("RGB", (50, 40))
    error = np.abs(np.asarray(decoded, dtype=int) - np.asarray(picture(), dtype=int))
    assert error.mean() < 8


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("L", "JPEG")]
)
def test_few_colours_become_rgb(mode, kind):
    source = picture(mode)
    decoded = decode_image(file_of(source, kind))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded, int) - np.asarray(source.convert("RGB"), int)).max() <= 12


def test_cmyk_keeps_its_colours():
    solid = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    red, green, blue = decode_image(file_of(solid, "JPEG", quality=95)).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = decode_image(file_of(Image.fromarray(values), "PNG"))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]


def test_sixteen_bit_grey_and_colour_agree():
    grey = bytes([0, 0x12, 0xFF, 0x80, 0x00])
    colour = bytes([0, *[0x12, 0xFF] * 3, *[0x80, 0x00] * 3])
    assert pixel_digest(decode_image(png(2, 1, 16, 0, grey))) == pixel_digest(
        decode_image(png(2, 1, 16, 2, colour))
    )


def test_sixteen_bit_grey_keeps_its_transparent_value():
    rows = bytes([0, 0x12, 0x34, 0x80, 0x00])
    decoded = decode_image(png(2, 1, 16, 0, rows, tRNS=bytes([0x12, 0x34])))
    assert decoded.mode == "RGBA"
    assert [decoded.getpixel((x, 0))[3] for x in (0, 1)] == [0, 255]


def test_sixteen_bit_colour_with_alpha():
    rows = bytes([0, 0xFF, 0xFF, 0, 0, 0, 0, 0x80, 0x12])
    decoded = decode_image(png(1, 1, 16, 6, rows))
    assert decoded.mode == "RGBA"
    assert decoded.getpixel((0, 0)) == (255, 0, 0, 128)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_kept_where_something_is_transparent(mode, kind):
    image = picture("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    options = {"lossless": True} if kind == "WEBP" else {}
    source = image.convert(mode) if kind != "WEBP" else image
    decoded = decode_image(file_of(source, kind, **options))
    assert decoded.mode == "RGBA"
    assert decoded.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_alpha_that_hides_nothing_is_dropped():
    decoded = decode_image(file_of(picture("RGBA"), "PNG"))
    assert decoded.mode == "RGB"
    assert pixel_digest(decoded) == pixel_digest(picture())


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 1), 1)
    decoded = decode_image(file_of(image, "PNG", transparency=1))
    assert decoded.mode == "RGBA"
    assert decoded.getpixel((1, 1))[3] == 0
    assert decoded.getpixel((0, 0)) == (*RED, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = decode_image(data)
    assert (decoded.mode, decoded.getpixel((3, 3))) == ("RGB", RED)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    # where the stored upper left corner belongs: (x, y) from the left and top, in [0, 1]
    list(enumerate([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), (0, 1)], start=1)),
)
def test_pictures_are_turned_upright(kind, orientation, corner):
    stored = Image.new("RGB", (60, 30), "white")
    stored.paste(RED, (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(file_of(stored, kind, exif=exif))
    assert decoded.size == ((60, 30) if orientation < 5 else (30, 60))
    place = tuple(
        3 if not far else side - 4 for far, side in zip(corner, decoded.size, strict=True)
    )
    red, green, blue = decoded.getpixel(place)
    assert red > 230
    assert max(green, blue) < 40


def test_damaged_exif_does_not_cost_the_picture():
    data = file_of(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(data).size == (50, 40)


def test_one_pixel_is_a_picture():
    assert decode_image(file_of(Image.new("RGB", (1, 1), RED), "PNG")).getpixel((0, 0)) == RED


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(UndecodableImage, match=r"\w") as caught:
        decode_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused_as_such(kind):
    data = file_of(picture(), kind)
    assert reason_of(data[: 2 * len(data) // 3]) == "truncated"


def test_what_is_no_image_is_refused_as_such():
    assert reason_of(b"") == "empty"
    assert reason_of(b"not a picture at all\n" * 20) == "not an image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"


def test_floating_point_pictures_are_refused_as_unsupported():
    image = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    assert reason_of(file_of(image, "TIFF")) == "unsupported pixel format"


@pytest.mark.parametrize("side", [10_000, 15_000, 60_000])
def test_decompression_bombs_are_refused_before_they_are_unpacked(side):
    data = png(side, side, 8, 2, b"")
    assert reason_of(data, max_pixels=1_000_000) == "decompression bomb"


def test_the_limit_of_pixels_is_inclusive():
    data = file_of(picture(), "PNG")
    assert decode_image(data, max_pixels=2000).size == (50, 40)
    assert reason_of(data, max_pixels=1999) == "decompression bomb"


def test_damage_of_any_kind_is_one_error_with_a_known_reason(capfd):
    kinds = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "QOI", "JPEG2000"]
    files = [file_of(picture(), kind) for kind in kinds]
    draw = random.Random(0)
    reasons = set()
    for _ in range(1500):
        data = bytearray(draw.choice(files))
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(min(len(data), draw.choice([60, 10**9])))] = draw.randrange(256)
        try:
            decode_image(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
        except UndecodableImage as error:
            reasons.add(error.reason)
    capfd.readouterr()  # libtiff has its own opinion on stderr
    assert reasons <= {
        "empty", "not an image", "truncated", "corrupt", "decompression bomb",
        "unsupported pixel format",
    }  # fmt: skip
    assert {"truncated", "corrupt", "not an image"} <= reasons


def test_no_warning_escapes():
    large = png(10_000, 10_000, 1, 0, b"\0" * 10_000 * 1251)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode_image(large).size == (10_000, 10_000)
    assert caught == []


def test_digest_depends_on_pixels_mode_and_shape_alone():
    image = picture()
    assert pixel_digest(decode_image(file_of(image, "PNG"))) == pixel_digest(
        decode_image(file_of(image, "BMP"))
    )
    turned = Image.frombytes("RGB", (40, 50), image.tobytes())
    changed = image.copy()
    changed.putpixel((7, 7), (1, 2, 3))
    digests = {pixel_digest(part) for part in (image, turned, changed, image.convert("RGBA"))}
    assert len(digests) == 4
    expected = hashlib.sha256(b"RGB 2 1\n" + bytes([*RED, *RED])).digest()
    assert pixel_digest(Image.new("RGB", (2, 1), RED)) == expected


def test_composite_blends_with_the_background():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    opaque = composite(image, (0, 0, 200))
    assert opaque.mode == "RGB"
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [RED, (0, 0, 200)]
    half = composite(Image.new("RGBA", (1, 1), (255, 255, 255, 128)), (0, 0, 0))
    assert half.getpixel((0, 0)) == (128, 128, 128)


def test_the_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(UndecodableImage("truncated", "3 bytes left")))
    assert (error.reason, error.detail) == ("truncated", "3 bytes left")
    assert str(error) == "truncated (3 bytes left)"


def test_decoding_needs_no_torch():
    code = "import sys, dinov3.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
