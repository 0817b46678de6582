"""Models that put pictures and texts into one space: what an evaluation asks of them."""

# B pictures or texts of a batch, M texts, N pictures, P patches, E width of the space

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov3.errors import DataError

Embeddings = npt.NDArray[np.float32]
Tokenize = Callable[[Sequence[str]], Tensor]
Transform = Callable[[Image.Image], Tensor]


class TextAligned(Protocol):
    """What an evaluation asks of a model of pictures and texts, in evaluation mode."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in the common space, [B, E]."""
        ...

    def encode_image_with_patch_tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, E], patches aligned with text [B, P, E'], and those of the backbone."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] in the common space, [B, E]."""
        ...


@dataclass(frozen=True)
class AlignedModel:
    """A model with what is needed to show it pictures and texts.

    Attributes:
        model: On the device of the evaluation, in evaluation mode.
        tokenize: Texts to tokens [B, N].
        stride: Pixels per patch.
        patch_width: So many of a text's last E features were held to patches; None: not trained.
        mean: Of the normalisation it was trained with.
        std: Likewise.
    """

    model: TextAligned
    tokenize: Tokenize
    stride: int
    patch_width: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@torch.inference_mode()
def embed_texts(
    aligned: AlignedModel, texts: Sequence[str], batch_size: int, device: torch.device
) -> Embeddings:
    """Texts in the common space, not normalised, [M, E].

    Raises:
        DataError: There is no text.
    """
    if not texts:
        msg = "texts: nothing to embed, got 0. Give captions or class names."
        raise DataError(msg)
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = aligned.tokenize(texts[start : start + batch_size]).to(device)
        parts.append(aligned.model.encode_text(tokens).float().cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def embed_pictures(
    aligned: AlignedModel,
    images: Iterable[Image.Image],
    transform: Transform,
    batch_size: int,
    device: torch.device,
) -> Embeddings:
    """Pictures in the common space, not normalised, [N, E]; read once, never held all at once.

    Raises:
        DataError: There is no picture.
    """
    parts = [
        aligned.model.encode_image(batch.to(device)).float().cpu().numpy()
        for batch in picture_batches(images, transform, batch_size)
    ]
    if not parts:
        msg = "pictures: nothing to embed, got 0. Choose a source with pictures."
        raise DataError(msg)
    return np.concatenate(parts)


def picture_batches(
    images: Iterable[Image.Image], transform: Transform, batch_size: int
) -> Iterator[Tensor]:
    """Pictures as the model sees them, [B, 3, S, S]; never more than one batch in memory."""
    stream = iter(images)
    while pictures := [transform(image) for image in islice(stream, batch_size)]:
        yield torch.stack(pictures)  # [B, 3, S, S]
