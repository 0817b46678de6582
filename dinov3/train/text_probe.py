"""Retrieval inside a few training pairs: whether pictures and captions find each other yet."""

# n pairs of the probe

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov3.config import DinotxtConfig
from dinov3.data.loader import ImageSet
from dinov3.data.tokenizer import tokenize
from dinov3.models.dinotxt import DinoTxt
from dinov3.train.probe import load_probe

_PROBE_SIZE = 128  # pairs among which retrieval is measured
_CHUNK = 64  # of them in one forward pass


@dataclass(frozen=True)
class Captioned:
    """Pictures by number, with the sha256 and the caption of each; a picture may come again."""

    images: ImageSet
    sha256: Sequence[str]
    captions: Sequence[str]


class TextProbe:
    """A fixed few of the training pairs, pictures seen whole, among which captions are found."""

    def __init__(self, pairs: Captioned, config: DinotxtConfig, device: torch.device) -> None:
        """Decodes the pictures: every n-th pair's."""
        chosen = _spread(min(_PROBE_SIZE, len(pairs.captions)), len(pairs.captions))
        crops = config.crops
        normalize = (crops.mean, crops.std)
        pictures = load_probe(_Some(pairs.images, chosen), len(chosen), crops.size, normalize)
        captions = [pairs.captions[index] for index in chosen]
        tokens = tokenize(captions, config.model.text.context_length)
        self.pictures, self.tokens = pictures.to(device), tokens.to(device)
        same = _equal([pairs.sha256[index] for index in chosen]) | _equal(captions)
        self.is_right = same.to(device)  # [pictures, captions]

    @torch.no_grad()
    def measure(self, model: DinoTxt) -> dict[str, float]:
        """How often the nearest caption of a picture is right, and the nearest picture of one."""
        model.eval()
        image = torch.cat(
            [model.encode_image(part, normalize=True) for part in self.pictures.split(_CHUNK)]
        )
        text = torch.cat(
            [model.encode_text(part, normalize=True) for part in self.tokens.split(_CHUNK)]
        )
        model.train()
        cosines = image @ text.mT
        is_finite = cosines.isfinite()
        return {
            "image_to_text": _share_right(cosines, self.is_right),
            "text_to_image": _share_right(cosines.mT, self.is_right.mT),
            "finite_similarities": float(is_finite.float().mean()),
            "logit_scale": model.logit_scale.item(),
        }


class _Some:
    """Some of the pictures, numbered anew."""

    def __init__(self, images: ImageSet, chosen: Sequence[int]) -> None:
        self.images, self.chosen = images, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes:
        return self.images.read(self.chosen[index])

    def name(self, index: int) -> str:
        return self.images.name(self.chosen[index])


def _spread(count: int, total: int) -> list[int]:
    return [int(place) for place in np.linspace(0, total - 1, count).round()]


def _equal(values: Sequence[str]) -> Tensor:
    """Which are the same, bool [n, n]."""
    _, numbers = np.unique(np.array(values), return_inverse=True)
    return torch.from_numpy(numbers[:, None] == numbers)


def _share_right(similarities: Tensor, is_right: Tensor) -> float:
    nearest = similarities.argmax(dim=1, keepdim=True)
    return float(is_right.gather(1, nearest).float().mean())
