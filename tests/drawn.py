"""Pictures drawn for tests: varied shapes in one family of colours, each seed another picture."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw


def draw(seed: int, hue: float = 0.0, size: tuple[int, int] = (120, 100)) -> Image.Image:
    """A picture of 12 shapes whose hues lie within a twelfth of a turn from `hue`."""
    rng = np.random.default_rng(seed)

    def colour() -> tuple[int, ...]:
        turn = (hue + rng.uniform(-1, 1) / 12) % 1
        rgb = colorsys.hsv_to_rgb(turn, rng.uniform(0.3, 1), rng.uniform(0.1, 1))
        return tuple(round(255 * value) for value in rgb)

    image = Image.new("RGB", size, colour())
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        width, height = rng.uniform(0.15, 0.5, 2) * size
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if rng.random() < 0.5:
            pen.ellipse(box, fill=colour())
        else:
            pen.rectangle(box, fill=colour())
    return image
