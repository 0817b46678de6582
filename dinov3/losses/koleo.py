"""KoLeo: spread the CLS features of a batch over the sphere (paper, L_DKoleo).

Nearest neighbours are searched within small groups of the batch, as the paper does; over a whole
large batch the similarity matrix would cost O(B^2).
"""

# B samples, G group size, D width

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import ConfigError

_EPS = 1e-8


def koleo_loss(cls: Tensor, *, topk: int = 1, group_size: int | None = None) -> Tensor:
    """Mean of -log(distance to the nearest neighbours); both sides of a pair get gradient.

    Args:
        cls: CLS features [B, D] before the head, of one crop of each image.
        topk: Neighbours of each sample.
        group_size: Consecutive rows that are each other's candidates; all B if None.

    Raises:
        ConfigError: The groups do not divide the batch, or are too small for `topk` neighbours.
    """
    size = cls.shape[0] if group_size is None else group_size
    _check_groups(cls.shape[0], size, topk)
    wide = torch.promote_types(cls.dtype, torch.float32)  # in bf16 small distances are rounding
    with torch.autocast(cls.device.type, enabled=False):
        unit = F.normalize(cls.to(wide), dim=-1, eps=_EPS)  # [B, D]
        groups = unit.unflatten(0, (-1, size))  # [B/G, G, D]
        with torch.no_grad():
            similarity = groups @ groups.mT  # [B/G, G, G]
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)  # never its own neighbour
            nearest = similarity.topk(topk, dim=-1).indices  # [B/G, G, topk]
        within = torch.arange(groups.shape[0], device=cls.device)[:, None, None]
        neighbours = groups[within, nearest]  # [B/G, G, topk, D]
        distance = F.pairwise_distance(groups.unsqueeze(2), neighbours, eps=_EPS)
        return -torch.log(distance + _EPS).mean()


def _check_groups(batch_size: int, size: int, topk: int) -> None:
    if size < 1 or batch_size % size:
        msg = f"group_size: must divide the batch of {batch_size}, got {size}. Choose a divisor."
        raise ConfigError(msg)
    if not 0 < topk < size:
        msg = (
            f"topk: a group of {size} has {size - 1} neighbours to choose from, got {topk}. "
            "Enlarge the group or the batch."
        )
        raise ConfigError(msg)
