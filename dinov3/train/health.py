"""Signs of collapse, measured on the features of probe images.

Collapse shows as features that all point one way (cosine near 1), vary along few directions (low
participation ratio or RankMe), or share one prototype (low usage entropy).
"""

# N images, P patches, D width, K prototypes

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import ConfigError, DataError
from dinov3.losses.gram import gram_loss

_CHUNK = 64  # probe images in one forward pass
_TINY = torch.finfo(torch.float64).tiny  # 0 / tiny is 0 for features that are all equal


def participation_ratio(features: Tensor) -> Tensor:
    """(sum s^2)^2 / sum s^4 over the singular values s of the centred features.

    The number of directions along which the features vary: 1 for a line, D for a round cloud,
    0 for equal features.

    Args:
        features: [N, D].

    Raises:
        DataError: There are fewer than two rows.
    """
    centred = _double(features) - _double(features).mean(dim=0)  # [N, D]
    covariance = centred.mT @ centred  # [D, D]; sums of powers of s need no decomposition
    power = covariance.square().sum()
    ratio: Tensor = covariance.trace().square() / power.clamp(min=_TINY)
    return ratio


def rankme(features: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (RankMe, arXiv 2210.02885).

    The features are taken as they are, not centred, as RankMe defines it. It is not a number where
    one of them is not finite.

    Args:
        features: [N, D].

    Raises:
        DataError: There are fewer than two rows.
    """
    rows = _double(features)
    if not is_finite(rows):  # the decomposition would raise
        return rows.new_tensor(math.nan)
    values = torch.linalg.svdvals(rows)
    shares = values / values.sum().clamp(min=_TINY)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine over all pairs of different rows of [N, D].

    Raises:
        DataError: There are fewer than two rows.
    """
    return _pairwise_cosine(_double(features))


def cls_patch_cosine(cls: Tensor, patches: Tensor) -> Tensor:
    """Mean cosine of each image's CLS feature [N, D] with its own patches [N, P, D]."""
    return F.cosine_similarity(cls.float().unsqueeze(1), patches.float(), dim=-1).mean()


def patch_patch_cosine(patches: Tensor) -> Tensor:
    """Mean cosine over all pairs of different patches [N, P, D] of the same image.

    Raises:
        DataError: There are fewer than two patches.
    """
    return _pairwise_cosine(patches.float()).mean()


def prototype_entropy(probs: Tensor) -> Tensor:
    """Entropy of the mean assignment, as a share of ln K: 0 where one prototype takes all.

    Args:
        probs: [N, K], before any balancing: Sinkhorn targets use all prototypes by construction.
    """
    usage = probs.double().mean(dim=0)  # [K]
    entropy: Tensor = torch.special.entr(usage).sum()
    return entropy / math.log(max(len(usage), 2))


def is_finite(loss: Tensor) -> bool:
    """Whether every value is a number; waits for the device."""
    return bool(torch.isfinite(loss).all())


@torch.no_grad()
def measure(
    backbone: Any, head: nn.Module, images: Tensor, *, temperature: float = 0.1
) -> dict[str, float]:
    """All signs at once, of a backbone and its DINO head, as they are set (eval or train).

    Args:
        backbone: The teacher's.
        head: Gives logits of CLS features.
        images: Probe images [N, 3, H, W], normalised.
        temperature: Of the assignment to prototypes, the student's.

    Raises:
        DataError: There are fewer than two images or two patches.
    """
    cls_parts, probs_parts, patch_signs = [], [], []
    for chunk in images.split(_CHUNK):
        features = backbone.forward_features(chunk)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        cls_parts.append(cls)
        probs_parts.append((head(cls).float() / temperature).softmax(dim=-1))
        signs = torch.stack([cls_patch_cosine(cls, patches), patch_patch_cosine(patches)])
        patch_signs.append(signs * len(chunk))
    cls = torch.cat(cls_parts)  # [N, D]
    of_cls, of_patches = (torch.stack(patch_signs).sum(dim=0) / len(images)).tolist()
    return {
        "participation_ratio": participation_ratio(cls).item(),
        "rankme": rankme(cls).item(),
        "mean_cosine": mean_cosine(cls).item(),
        "cls_patch_cosine": of_cls,
        "patch_patch_cosine": of_patches,
        "prototype_entropy": prototype_entropy(torch.cat(probs_parts)).item(),
    }


@torch.no_grad()
def gram_distance(backbone: Any, anchor: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Mean squared difference of a backbone's patch cosines and the Gram teacher's.

    Args:
        backbone: The EMA's.
        anchor: The Gram teacher's patches [n, P, D] of images, on the backbone's grid.
        images: Probe images [N, 3, H, W], normalised.
    """
    total = 0.0
    for chunk in images.split(_CHUNK):
        ours = backbone.forward_features(chunk)["x_norm_patchtokens"]
        total += gram_loss(ours, anchor(chunk)).item() * len(chunk)
    return total / len(images)


_LIMITS = ("min_participation_ratio", "max_mean_cosine", "min_prototype_entropy")


def collapse_reason(metrics: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
    """The first limit that is broken, in words, or None for a healthy state.

    Args:
        metrics: As `measure` gives them. A value that is not a number breaks its limit.
        thresholds: Any of min_participation_ratio, max_mean_cosine, min_prototype_entropy;
            other keys are not limits and are passed over.

    Raises:
        ConfigError: A limit is set on a metric that was not measured.
    """
    for name in _LIMITS:
        if name not in thresholds:
            continue
        side, metric = name.split("_", 1)
        if metric not in metrics:
            msg = f"{name}: {metric} was not measured, got {sorted(metrics)}. Measure it."
            raise ConfigError(msg)
        value, limit = metrics[metric], thresholds[name]
        holds = value >= limit if side == "min" else value <= limit
        if not holds:  # NaN holds neither way
            bound = "at least" if side == "min" else "at most"
            return f"{metric} is {value:.4g}, must be {bound} {limit:g}"
    return None


def _double(features: Tensor) -> Tensor:
    """[N, D] in fp64: near collapse all that counts is in the last digits."""
    if len(features) < 2:
        msg = f"features: at least two rows are needed, got {len(features)}. Use more images."
        raise DataError(msg)
    return features.double()


def _pairwise_cosine(rows: Tensor) -> Tensor:
    """Mean over different rows of [..., N, D]: the squared sum of unit rows holds every pair."""
    count = rows.shape[-2]
    if count < 2:
        msg = f"patches: at least two are needed, got {count}. Enlarge the images."
        raise DataError(msg)
    total = F.normalize(rows, dim=-1).sum(dim=-2)  # [..., D]
    return (total.square().sum(dim=-1) - count) / (count * (count - 1))
