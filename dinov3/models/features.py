"""What a backbone of either family says of images, batch by batch."""

# B images, R registers, P patches, N = 1 + R + P tokens, D width

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from dinov3.errors import DataError


class Features(TypedDict):
    """What `forward_features` returns for one batch."""

    x_norm_clstoken: Tensor  # [B, D]
    x_storage_tokens: Tensor  # [B, R, D]
    x_norm_patchtokens: Tensor  # [B, P, D]
    x_prenorm: Tensor  # [B, N, D], before the final norm
    masks: Tensor | None  # as passed


def cls_tokens(features: Features | list[Features]) -> Tensor | list[Tensor]:
    """The CLS feature [B, D] of each image, of a batch or of a list of batches."""
    if isinstance(features, list):
        return [each["x_norm_clstoken"] for each in features]
    return features["x_norm_clstoken"]


def mask_of_each(
    batches: Sequence[Tensor], masks: Sequence[Tensor | None] | None
) -> Sequence[Tensor | None]:
    """One entry per batch; none of them has a mask where `masks` is None.

    Raises:
        DataError: There are other numbers of them, or no batch.
    """
    found = [None] * len(batches) if masks is None else masks
    if len(found) != len(batches) or not batches:
        got = f"{len(found)} for {len(batches)} batches"
        msg = f"masks: one entry per batch is needed, got {got}. Pass None where there is none."
        raise DataError(msg)
    return found
