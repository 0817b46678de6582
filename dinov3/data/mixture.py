"""A mixture of resolutions: every step has one, drawn by (seed, step) alone (paper, section 5.1).

So a whole batch has one size, whatever the number of ranks, and a resumed run sees the sizes it
would have seen.
"""

from dataclasses import dataclass

import numpy as np

from dinov3.data.augment import Augmentation
from dinov3.data.samplers import philox_words

_STREAM = int.from_bytes(b"sizes")  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class Mixture:
    """Pipelines that differ in their sizes, and how often each is drawn.

    Attributes:
        pipelines: One per resolution.
        probabilities: Of each; they sum to 1.
    """

    pipelines: tuple[Augmentation, ...]
    probabilities: tuple[float, ...]

    @property
    def cache_size(self) -> int | None:
        """That of all pipelines."""
        return self.pipelines[0].cache_size

    def of_step(self, seed: int, step: int) -> Augmentation:
        """The pipeline of one step."""
        word = philox_words(seed, _STREAM, (0, step, 0), 1)[0]
        draw = float(word >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        index = int(np.searchsorted(np.cumsum(self.probabilities), draw, side="right"))
        return self.pipelines[min(index, len(self.pipelines) - 1)]
