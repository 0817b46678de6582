"""What a model must beat: an untrained copy of itself, raw pixels, a constant guess.

The pixels are dressed as a backbone whose CLS feature is the picture at 16 x 16, so that every
protocol treats them exactly as it treats the model.
"""

# B pictures, P pixels, N samples, C classes

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3.evals.features import Backbone
from dinov3.evals.metrics import Integers

MODEL = "model"
RANDOM_INIT = "random init"
RAW_PIXELS = "raw pixels"
MAJORITY = "majority class"
SUBJECTS = (MODEL, RANDOM_INIT, RAW_PIXELS, MAJORITY)

PIXELS_SIDE = 16


class RawPixels(nn.Module):
    """The picture itself at 16 x 16, normalised as the model sees it.

    Normalised colours are the stronger baseline: plain ones are all alike on a white background.
    """

    def get_intermediate_layers(
        self, x: Tensor, *, n: int = 1, return_class_token: bool = False
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Pixels as patch tokens [B, P, 3] and together as CLS [B, 3*P], for each of n blocks."""
        small = F.interpolate(x, (PIXELS_SIDE, PIXELS_SIDE), mode="bicubic", antialias=True)
        return ((small.flatten(2).mT, small.flatten(1)),) * n


def random_init_name(seed: int) -> str:
    """Name of one untrained copy among the subjects."""
    return f"{RANDOM_INIT} {seed}"


def baseline_models(untrained: Callable[[int], Backbone], num_inits: int) -> dict[str, Backbone]:
    """Every baseline that has features.

    Args:
        untrained: Builds the model's architecture with the initial weights of a seed.
        num_inits: Seeds 0 … num_inits - 1.
    """
    models = {random_init_name(seed): untrained(seed) for seed in range(num_inits)}
    return {**models, RAW_PIXELS: RawPixels()}


def majority_scores(
    train_labels: Integers, num_queries: int, num_classes: int
) -> npt.NDArray[np.float64]:
    """The constant guess: every query gets the training pictures' class frequencies, [Q, C]."""
    counts = np.bincount(train_labels, minlength=num_classes).astype(np.float64)
    return np.tile(counts / max(1.0, counts.sum()), (num_queries, 1))


def constant_ranks(num_pictures: int) -> npt.NDArray[np.int64]:
    """The constant guess in retrieval: one fixed order of the gallery for every query, [N]."""
    return np.arange(1, num_pictures + 1)
