"""Linear segmentation of frozen patch features (SPEC 5.4, PAPER C.1).

Protocol:
    Features: patch tokens of the last block after its norm, standardised by the training patches.
    Trained:  one linear softmax layer on patches; a patch's label is its most frequent class.
              L-BFGS instead of the paper's AdamW: convex, so no learning rate to tune.
    Chosen:   C out of a logarithmic grid, by mIoU on a part of the training scenes.
    Then:     fitted again on all training scenes with that C. The test scenes are seen once.
    Metric:   logits bilinear to pixels, argmax; mIoU from counts over all scenes, 255 is ignored.
              Of "not background" also the average precision, the mean over scenes.
    Interval: bootstrap over test scenes: how far another draw of scenes from the same cut-outs
              and photographs could lie, not what other cut-outs would give.
    Controls: one-hot patch labels score the attainable mIoU, shuffled features the majority's.
"""

# N scenes, H W pixels, h w patches, D width, K classes with the background

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3.errors import DataError
from dinov3.evals.composites import BACKGROUND, IGNORED
from dinov3.evals.metrics import Interval

Maps = npt.NDArray[np.float32]  # [N, h, w, D]
Masks = npt.NDArray[np.uint8]  # [N, H, W]
Counts = npt.NDArray[np.int64]  # [N, K, K], rows: the mask, columns: the prediction
Floats = npt.NDArray[np.float64]
Figure = Callable[[Floats, Counts], Floats]

_LOW, _HIGH = 2.5, 97.5
_SMALLEST = 1e-6  # standard deviation below which a feature is a constant
_CHUNK = 64  # scenes whose logits are enlarged at once


@dataclass(frozen=True)
class SegmentationGrid:
    """The strengths of the penalty to choose from, and when a fit is done.

    Attributes:
        log10_c: Ends of the grid of C, as powers of ten.
        num_c: Points of the grid.
        max_iter: L-BFGS steps of one fit, at most.
        tolerance: Largest gradient component at which a fit is done.
        val_fraction: Share of the training scenes for the choice.
    """

    log10_c: tuple[float, float]
    num_c: int
    max_iter: int
    tolerance: float
    val_fraction: float


@dataclass(frozen=True)
class Segmentation:
    """What a probe did on the test scenes, and how it came about."""

    counts: Counts
    predicted: Masks  # of the test scenes
    precision: Floats  # [N], average precision of "not background"; NaN without an object
    chosen_c: float
    val_miou: float
    converged: bool


class RawPatches(nn.Module):
    """The pixels of each patch, normalised as the model sees them: what features must beat."""

    def __init__(self, patch_size: int, scale: float = 1.0) -> None:
        """Takes the side of a patch, and how much larger than that pictures will come."""
        super().__init__()
        self.patch_size, self.scale = patch_size, scale

    def get_intermediate_layers(
        self, x: Tensor, *, n: int = 1, return_class_token: bool = False
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Patches as tokens [B, P, 3 * size^2], their mean as CLS, for each of n blocks."""
        if self.scale != 1:
            size = [round(side / self.scale) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # [B, P, 3 * size^2]
        return ((patches, patches.mean(dim=1)),) * n


def patch_segmentation(
    train_maps: Maps,
    train_masks: Masks,
    test_maps: Maps,
    test_masks: Masks,
    *,
    num_classes: int,
    grid: SegmentationGrid,
    seed: int,
) -> Segmentation:
    """Chooses C on a part of the training scenes, fits on all of them, segments the test scenes.

    Args:
        train_maps: Patch features, row-major.
        train_masks: 0 … K-1, or 255.
        test_maps: Likewise.
        test_masks: Likewise.
        num_classes: K, the background included.
        grid: What to choose from.
        seed: Of the validation draw.

    Raises:
        DataError: Fewer than two scenes or two classes to learn from, or maps that do not fit.
    """
    labels = patch_labels(train_masks, train_maps.shape[1:3], num_classes)
    held = _held_scenes(len(labels), grid.val_fraction, seed)
    centre, scale = _statistics(train_maps[labels != IGNORED])
    train, test = (((maps - centre) / scale) for maps in (train_maps, test_maps))
    best_c, best = 0.0, -1.0
    probe = _Probe(grid)
    for c in np.logspace(*grid.log10_c, grid.num_c):
        probe.fit(train[~held], labels[~held], float(c))
        found = confusion(train_masks[held], probe.segment(train[held], train_masks), num_classes)
        if (merit := mean_iou(found)) > best:
            best_c, best = float(c), merit
    converged = probe.fit(train, labels, best_c)
    predicted = probe.segment(test, test_masks)
    counts = confusion(test_masks, predicted, num_classes)
    precision = object_precision(test_masks, probe.objectness(test, test_masks))
    return Segmentation(counts, predicted, precision, best_c, best, converged)


def patch_labels(masks: Masks, shape: tuple[int, ...], num_classes: int) -> Masks:
    """The most frequent class of each patch, 255 where all its pixels are ignored; [N, h, w].

    Of equally frequent classes the first counts.

    Raises:
        DataError: The masks are no whole number of patches high and wide.
    """
    num, height, width = masks.shape
    rows, columns = shape
    if height % rows or width % columns:
        msg = (
            f"masks: not a whole number of patches, got {height} x {width} pixels for "
            f"{rows} x {columns} patches. Change the size of the scenes."
        )
        raise DataError(msg)
    cells = masks.reshape(num, rows, height // rows, columns, width // columns)
    votes = np.stack([(cells == label).sum(axis=(2, 4)) for label in range(num_classes)], axis=-1)
    found: Masks = votes.argmax(axis=-1).astype(np.uint8)  # [N, h, w]
    found[votes.sum(axis=-1) == 0] = IGNORED
    return found


def one_hot_maps(labels: Masks, num_classes: int) -> Maps:
    """Patch labels as features, [N, h, w, K]: an oracle, whose mIoU is the attainable one."""
    return np.asarray(labels[..., None] == np.arange(num_classes), dtype=np.float32)


def foreground(masks: Masks) -> Masks:
    """Masks with all classes as one: 0 background, 1 object, 255 ignored."""
    is_kept = (masks == BACKGROUND) | (masks == IGNORED)
    return np.asarray(np.where(is_kept, masks, 1), dtype=np.uint8)


def enlarge(maps: Maps, height: int, width: int) -> Iterator[Tensor]:
    """Maps of patches [N, h, w, K] bilinear to pixels, some scenes at a time; [n, K, H, W]."""
    for start in range(0, len(maps), _CHUNK):
        small = torch.from_numpy(maps[start : start + _CHUNK]).permute(0, 3, 1, 2)  # [n, K, h, w]
        yield F.interpolate(small, (height, width), mode="bilinear", align_corners=False)


def segment(logits: Maps, height: int, width: int) -> Masks:
    """The largest of the enlarged logits at each pixel, [N, H, W]."""
    found = [large.argmax(dim=1).to(torch.uint8) for large in enlarge(logits, height, width)]
    return np.asarray(torch.cat(found))


def object_precision(masks: Masks, scores: npt.NDArray[np.float32]) -> Floats:
    """Average precision of "not background" over the known pixels of each scene, [N].

    Args:
        masks: 0 is the background.
        scores: [N, H, W], larger for objects.
    """
    found = np.full(len(masks), np.nan)
    for index, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        known = mask != IGNORED
        is_object = mask[known] != BACKGROUND
        if is_object.any():
            found[index] = average_precision_score(is_object, score[known])
    return found


def confusion(masks: Masks, predicted: Masks, num_classes: int) -> Counts:
    """Pixels by their class and the predicted one, scene by scene; ignored pixels do not count."""
    num = len(masks)
    scenes = np.arange(num)[:, None, None]
    cells = (scenes * num_classes + masks) * num_classes + predicted
    counted = cells[masks != IGNORED]
    size = num * num_classes**2
    return np.bincount(counted, minlength=size).reshape(num, num_classes, num_classes)


def majority_counts(train_masks: Masks, test_masks: Masks, num_classes: int) -> Counts:
    """The constant guess: every pixel gets the most frequent class of the training scenes."""
    seen = train_masks[train_masks != IGNORED]
    guess = np.bincount(seen, minlength=num_classes).argmax()
    return confusion(test_masks, np.full_like(test_masks, guess), num_classes)


def class_ious(counts: Counts) -> Floats:
    """TP / (TP + FP + FN) of each class over all scenes; NaN where it is neither there nor seen."""
    return np.asarray(_ious(np.ones((1, len(counts))), counts)[0])


def mean_iou(counts: Counts) -> float:
    """Mean of the class IoUs that exist."""
    return float(mean_ious(np.ones((1, len(counts))), counts)[0])


def mean_ious(times: Floats, counts: Counts) -> Floats:
    """The mIoU over scenes that count so many times [R, N]; [R]."""
    return np.asarray(np.nanmean(_ious(times, counts), axis=1))


def pixel_accuracies(times: Floats, counts: Counts) -> Floats:
    """The share of right pixels over scenes that count so many times [R, N]; [R]."""
    right, total = np.einsum("nkk->n", counts), counts.sum(axis=(1, 2))
    return np.asarray((times @ right) / (times @ total))


def scene_draws(runs: Sequence[Counts], figure: Figure, num: int, seed: int) -> Floats:
    """A figure over scenes drawn with replacement, [num + 1]: first of the scenes as they are.

    Args:
        runs: Counts of the same scenes by equal subjects (seeds), whose figures are averaged.
        figure: `mean_ious` or `pixel_accuracies`.
        num: Draws.
        seed: Of the draws; equal seeds draw equal scenes, so that subjects pair.
    """
    size = len(runs[0])
    drawn = np.random.default_rng(seed).integers(0, size, size=(num, size))
    times = np.ones((num + 1, size))
    for row, scenes in enumerate(drawn, start=1):
        times[row] = np.bincount(scenes, minlength=size)
    return np.asarray(np.mean([figure(times, counts) for counts in runs], axis=0))


def interval_of(draws: Floats) -> Interval:
    """The figure itself and its 95 % interval, from `scene_draws` or from a difference of two."""
    low, high = np.percentile(draws[1:], [_LOW, _HIGH])
    return Interval(float(draws[0]), float(low), float(high))


class _Probe:
    """A linear softmax layer over patches; each fit starts where the last one ended."""

    def __init__(self, grid: SegmentationGrid) -> None:
        self._max_iter = grid.max_iter
        self._model = LogisticRegression(
            max_iter=grid.max_iter, tol=grid.tolerance, warm_start=True
        )

    def fit(self, maps: Maps, labels: Masks, c: float) -> bool:
        """Whether it converged: a large C on separable patches need not.

        Raises:
            DataError: The patches are all of one class.
        """
        known = labels != IGNORED
        if len(np.unique(labels[known])) < 2:
            msg = "segmentation: needs patches of two classes, got one. Add scenes."
            raise DataError(msg)
        self._model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so instead
            self._model.fit(maps[known], labels[known])
        return bool(self._model.n_iter_.max() < self._max_iter)

    def segment(self, maps: Maps, masks: Masks) -> Masks:
        """Classes of the pixels, in the size of `masks`."""
        places = segment(self._logits(maps), masks.shape[1], masks.shape[2])
        return np.asarray(self._model.classes_[places], dtype=np.uint8)

    def objectness(self, maps: Maps, masks: Masks) -> npt.NDArray[np.float32]:
        """Log odds of "not background" at the pixels, in the size of `masks`."""
        logits, is_background = self._logits(maps), self._model.classes_ == BACKGROUND
        odds = logsumexp(logits[..., ~is_background], axis=-1)
        odds -= logsumexp(logits[..., is_background], axis=-1)  # [N, h, w]
        large = enlarge(odds[..., None].astype(np.float32), masks.shape[1], masks.shape[2])
        return np.asarray(torch.cat(list(large))[:, 0])

    def _logits(self, maps: Maps) -> Maps:
        """Of the classes that were seen in training, [N, h, w, K]."""
        logits = maps @ self._model.coef_.T + self._model.intercept_
        if logits.shape[-1] == 1:  # of two classes only the second has weights
            logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
        return np.asarray(logits, dtype=np.float32)


def _held_scenes(num: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Marks whole scenes: patches of one scene are too much alike to judge each other."""
    if num < 2:
        msg = f"segmentation: needs two training scenes, got {num}. Add scenes."
        raise DataError(msg)
    held = np.zeros(num, dtype=bool)
    chosen = np.random.default_rng(seed).permutation(num)
    held[chosen[: min(max(1, round(fraction * num)), num - 1)]] = True
    return held


def _statistics(patches: npt.NDArray[np.float32]) -> tuple[Maps, Maps]:
    """Mean and standard deviation of every feature over all patches [M, D]."""
    centre, scale = patches.mean(axis=0), patches.std(axis=0)
    return centre, np.where(scale < _SMALLEST, 1, scale).astype(np.float32)


def _ious(times: Floats, counts: Counts) -> Floats:
    """IoU of every class over scenes that count so many times [R, N]; [R, K]."""
    right = times @ np.einsum("nkk->nk", counts)  # [R, K]
    union = times @ (counts.sum(axis=1) + counts.sum(axis=2)) - right
    return np.asarray(np.divide(right, union, out=np.full_like(right, np.nan), where=union > 0))
