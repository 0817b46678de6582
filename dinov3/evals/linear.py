"""Linear probe trained by SGD on frozen features (SPEC 5.3).

Protocol:
    Features: CLS and mean of the patch tokens of the last block, both after the norm, concatenated;
              computed once, without augmentation (the reference crops anew at every step).
    Trained:  one linear head per learning rate, all at once: cross entropy, SGD with momentum .9,
              no weight decay, cosine to 0; rates are scaled by batch / 256; weights N(0, .01).
    Chosen:   the learning rate by top-1, then by loss, on 10 % of each class of the training
              pictures; then all heads are trained again on all of them and that one is tested.
    Metric:   top-1 and, from six classes on, top-5 accuracy over the test pictures.
    Cost:     6 x num_steps x heads x batch x D x C multiplications; the features cost more.
    Controls: one-hot features score 1; random features or shuffled labels score chance.
"""

# N training pictures, Q queries, D width, C classes, H heads (learning rates), B batch

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3.errors import DataError
from dinov3.evals.logreg import validation_part
from dinov3.evals.metrics import Floats, Integers

_MOMENTUM = 0.9
_INIT_STD = 0.01
_REFERENCE_BATCH = 256


@dataclass(frozen=True)
class LinearGrid:
    """The learning rates to choose from, and how long every head is trained.

    Attributes:
        learning_rates: Before scaling by batch_size / 256.
        num_steps: Steps of SGD, of the choice and of the final training alike.
        batch_size: Pictures of one step, drawn from permutations of the training pictures.
        val_fraction: Share of each class for the choice.
    """

    learning_rates: Sequence[float]
    num_steps: int
    batch_size: int
    val_fraction: float


@dataclass(frozen=True)
class LinearResult:
    """Scores of the test pictures and how they came about."""

    scores: npt.NDArray[np.float32]  # [Q, C], probabilities
    chosen_lr: float  # before scaling by the batch
    val_accuracy: float


def linear_scores(
    train: Floats,
    train_labels: Integers,
    queries: Floats,
    *,
    num_classes: int,
    grid: LinearGrid,
    seed: int,
) -> LinearResult:
    """Trains one head per learning rate, chooses on a part of the training pictures, scores.

    Args:
        train: [N, D].
        train_labels: [N], in 0 … C-1.
        queries: [Q, D].
        num_classes: C.
        grid: What to choose from, and how long to train.
        seed: Of the validation draw, the initial weights and the order.

    Raises:
        DataError: No class has two pictures.
    """
    held = validation_part(train_labels, grid.val_fraction, seed)
    if not held.any():
        msg = (
            f"linear probe: needs a class of two pictures, got {len(train)} pictures. Add pictures."
        )
        raise DataError(msg)
    rates = torch.tensor(grid.learning_rates, dtype=torch.float32)
    features, sought = _tensor(train), _tensor(queries)
    labels = torch.from_numpy(np.ascontiguousarray(train_labels, dtype=np.int64))
    scaled = rates * (grid.batch_size / _REFERENCE_BATCH)
    order = _Order(grid.num_steps, grid.batch_size, seed)
    inner = torch.from_numpy(~held)
    heads = _train(features[inner], labels[inner], num_classes, scaled, order)
    best, accuracy = _choose(_logits(heads, features[~inner]), labels[~inner])
    heads = _train(features, labels, num_classes, scaled, order)
    scores = torch.softmax(_logits(heads, sought)[best], dim=-1)  # [Q, C]
    return LinearResult(scores.numpy(), float(grid.learning_rates[best]), accuracy)


@dataclass(frozen=True)
class _Order:
    """Which pictures each step sees."""

    num_steps: int
    batch_size: int
    seed: int

    def batches(self, size: int) -> Sequence[Tensor]:
        """Slices of shuffled passes over the pictures, one per step."""
        generator = torch.Generator().manual_seed(self.seed)
        needed = self.num_steps * self.batch_size
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-needed // size))]
        drawn: Sequence[Tensor] = torch.cat(passes)[:needed].split(self.batch_size)
        return drawn


def _train(
    features: Tensor, labels: Tensor, num_classes: int, rates: Tensor, order: _Order
) -> tuple[Tensor, Tensor]:
    """Weights [H, D, C] and biases [H, 1, C]; the heads share batches and nothing else."""
    generator = torch.Generator().manual_seed(order.seed)
    first = torch.randn(features.shape[1], num_classes, generator=generator) * _INIT_STD
    weight = first.repeat(len(rates), 1, 1)  # [H, D, C]
    bias = torch.zeros(len(rates), 1, num_classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, batch in enumerate(order.batches(len(features))):
        factor = 0.5 * (1 + math.cos(math.pi * step / order.num_steps))
        picked = features[batch]  # [B, D]
        error = torch.softmax(picked @ weight + bias, dim=-1)  # [H, B, C]
        error[:, torch.arange(len(batch)), labels[batch]] -= 1  # gradient of cross entropy
        error /= len(batch)
        gradients = picked.T @ error, error.sum(1, keepdim=True)
        lr = (rates * factor).view(-1, 1, 1)
        for value, speed, gradient in zip((weight, bias), speeds, gradients, strict=True):
            speed.mul_(_MOMENTUM).add_(gradient)
            value.sub_(lr * speed)
    return weight, bias


def _choose(logits: Tensor, labels: Tensor) -> tuple[int, float]:
    """The head of the best accuracy; of several, which few pictures make likely, the least loss."""
    accuracies = (logits.argmax(-1) == labels).float().mean(1)  # [H]
    targets = labels.expand(len(logits), -1)
    losses = F.cross_entropy(logits.mT, targets, reduction="none").mean(1)  # [H]
    losses[accuracies < accuracies.max()] = torch.inf
    best = int(losses.argmin())
    return best, float(accuracies[best])


def _logits(heads: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    weight, bias = heads
    return features @ weight + bias  # [H, Q, C]


def _tensor(features: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
