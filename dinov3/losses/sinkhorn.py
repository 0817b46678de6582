"""Sinkhorn-Knopp targets: teacher logits to soft assignments that use all prototypes equally.

Prototypes and samples are normalised in turn, over all ranks of the group. The released code
exponentiates at once and overflows; here the first turn is taken on logarithms, which gives the
same numbers wherever the released code gives any. The number of samples, by which the published
algorithm divides, cancels in the next normalisation.
"""

# B samples of this rank, K prototypes

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.errors import ConfigError


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    *,
    temperature: float,
    num_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Assignment probabilities [B, K] in fp32; every row sums to 1.

    Args:
        logits: [B, K]; ranks may hold different numbers of rows. A rank without rows takes part
            in the collectives and gets an empty result.
        temperature: The teacher's.
        num_iterations: Turns of normalising first prototypes, then samples.
        group: Ranks that share the assignment; the default group if None. Where
            `torch.distributed` is not initialised, this process is alone.

    Raises:
        ConfigError: The temperature or the number of iterations is not positive.
    """
    if not temperature > 0:
        msg = f"temperature: must be positive, got {temperature}. Use e.g. 0.07."
        raise ConfigError(msg)
    if num_iterations < 1:
        msg = f"num_iterations: must be at least 1, got {num_iterations}. Use 3."
        raise ConfigError(msg)
    scores = logits.float() / temperature  # [B, K]
    scores -= _logsumexp_over_samples(scores, group)
    # From here on nothing can overflow or vanish: a row sums to 1, so the share of a prototype is
    # at least 1/K, and dividing by shares of at most the number of samples keeps rows above 0.
    probs = scores.softmax(dim=1)
    for _ in range(num_iterations - 1):
        probs /= _sum_over_samples(probs, group)
        probs /= probs.sum(dim=1, keepdim=True)
    return probs


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _sum_over_samples(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = values.sum(dim=0)  # [K]
    if not _is_alone():
        dist.all_reduce(total, group=group)
    return total


def _logsumexp_over_samples(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    local = scores.logsumexp(dim=0)  # [K]; -inf on a rank without rows
    if _is_alone():
        return local
    highest = local.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total = (local - highest).exp()
    dist.all_reduce(total, group=group)
    return highest + total.log()
