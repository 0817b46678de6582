"""Colour operations on a batch of crops with a value per crop, equal to torchvision's on floats.

Crops are planes [3, N, H, W] with values in [0, 1]: the three colours lie apart, so that whatever
mixes them runs over long rows. Functions named `…_` overwrite what they are given.
"""

# N crops, H x W pixels, T taps of the blur

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

BLUR_TAPS = 9
# What rounds to 128 or more of 255. Halfway, so that a rounding error cannot make a visible step.
SOLARIZE_THRESHOLD = 0.5
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


def to_planes(crops: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] as float planes [3, N, H, W]."""
    planes = crops.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(1 / 255)


def normalize(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Planes [3, N, H, W] as crops [N, 3, H, W], centred and scaled per colour."""
    crops = torch.empty_like(planes.transpose(0, 1), memory_format=torch.contiguous_format)
    for colour in range(3):
        torch.sub(planes[colour], mean[colour], out=crops[:, colour])
        crops[:, colour].mul_(1 / std[colour])
    return crops


def luma_of(planes: Tensor) -> Tensor:
    """Luma [N, H, W]."""
    red, green, blue = planes.unbind()
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def blend_(planes: Tensor, own: Tensor, luma: Tensor, mean_luma: Tensor) -> Tensor:
    """Brightness, contrast and saturation as one operation, which one says the weights [N].

    Each is own * crop + luma * its luma + mean_luma * the mean of its luma, cut off at 0 and 1:

        brightness f   f, 0, 0
        contrast f     f, 0, 1 - f
        saturation f   f, 1 - f, 0
        nothing        1, 0, 0
    """
    own, luma, mean_luma = (weight.view(-1, 1, 1) for weight in (own, luma, mean_luma))
    grey = luma_of(planes)
    mean = grey.mean((-2, -1), keepdim=True)
    offset = grey.mul_(luma).add_(mean.mul_(mean_luma))
    return planes.mul_(own).add_(offset).clamp_(0, 1)


def adjust_hue_(planes: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by the shifts [N], in turns; value and chroma stay.

    HSV is not needed: with hue h and the nearest whole number [.], a colour of the turned picture
    is low + chroma * (6 clamp(|y - [y]|, 1/6, 1/3) - 1), y = h + shift + (1/2, 1/6, -1/6).
    """
    red, green, blue = planes.unbind()
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    high = torch.maximum(high, blue, out=high)
    low = torch.minimum(low, blue, out=low)
    chroma = high - low
    hue = _sixths_of_hue(planes, high, chroma).mul_(1 / 6).add_(shift.view(-1, 1, 1))
    base = low.sub_(chroma)
    chroma.mul_(6)
    for colour, offset in enumerate((1 / 2, 1 / 6, -1 / 6)):
        turned = torch.add(hue, offset, out=planes[colour])
        turned.sub_(turned.round()).abs_().clamp_(1 / 6, 1 / 3)
        turned.mul_(chroma).add_(base)
    return planes.clamp_(0, 1)


def _sixths_of_hue(planes: Tensor, high: Tensor, chroma: Tensor) -> Tensor:
    """Hue [N, H, W] in sixths of a turn; 0 where there is no colour."""
    red, green, blue = planes.unbind()
    # comparisons as 0 and 1 in floats, mixed by lerp: several times faster than torch.where on CPU
    is_red = red.clone().eq_(high)
    is_green = green.clone().eq_(high)
    hue = torch.sub(red, green).add_(chroma, alpha=4)
    hue.lerp_(torch.sub(blue, red).add_(chroma, alpha=2), is_green)
    hue.lerp_(torch.sub(green, blue), is_red)
    return hue.div_(chroma.clamp(min=1e-12))


def to_grey_(planes: Tensor) -> Tensor:
    """Sets all three colours to the luma."""
    return planes.copy_(luma_of(planes))


def solarize_(planes: Tensor) -> Tensor:
    """Inverts what is at least as bright as the threshold."""
    is_bright = planes.clone().ge_(SOLARIZE_THRESHOLD)  # 0 or 1
    return planes.lerp_(1 - planes, is_bright)


def blur_(planes: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of 9 taps with mirrored borders and a sigma [N] per crop.

    Rows and columns are filtered by one banded matrix per crop: matrix products of whole batches
    are faster than convolutions whose kernel changes with every crop.
    """
    height, width = planes.shape[-2:]
    kernel = gaussian_kernel(sigma)
    down = _banded(kernel, height)  # [N, H, H]
    along = down if width == height else _banded(kernel, width)  # [N, W, W]
    for plane in planes:
        torch.bmm(torch.bmm(down, plane), along.mT, out=plane)
    return planes


def gaussian_kernel(sigma: Tensor) -> Tensor:
    """Kernels [N, T] that sum to 1."""
    reach = (BLUR_TAPS - 1) / 2
    taps = torch.linspace(-reach, reach, BLUR_TAPS, device=sigma.device)
    return torch.softmax(-((taps / sigma[:, None]) ** 2) / 2, dim=-1)


def _banded(kernel: Tensor, size: int) -> Tensor:
    """Matrices [N, size, size] that filter a column of pixels."""
    taps = _mirrored_taps(size).to(kernel.device)
    return (kernel @ taps).view(-1, size, size)


@lru_cache(maxsize=8)
def _mirrored_taps(size: int) -> Tensor:
    """[T, size * size]: 1 where tap t of output row y meets input row x, mirrored at the ends."""
    reach = BLUR_TAPS // 2
    rows = torch.arange(size)
    taps = torch.zeros(BLUR_TAPS, size, size)
    for tap in range(BLUR_TAPS):
        source = (rows + tap - reach).abs()
        source = (size - 1) - ((size - 1) - source).abs()
        taps[tap, rows, source] = 1
    return taps.flatten(1)
