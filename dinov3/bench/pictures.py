"""Pictures for benchmarks, drawn and kept in memory: nothing is downloaded."""

import io

import numpy as np
from PIL import Image


class DrawnImages:
    """Smooth random pictures as PNG files in memory: the benchmark needs no download."""

    def __init__(self, num_images: int, size: int) -> None:
        self._files = [_drawn_picture(number, size) for number in range(num_images)]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """The file."""
        return self._files[index]

    def name(self, index: int) -> str:
        """What to call it."""
        return f"drawn picture {index}"


def _drawn_picture(number: int, size: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    picture.save(stream, "PNG")
    return stream.getvalue()
