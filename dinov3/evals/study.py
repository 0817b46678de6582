"""One evaluation from pictures to findings: features once, every protocol, what cannot be judged.

pictures ──► model, random inits, raw pixels ──► k-NN, probes ──► rows, differences
test pictures ──► two views each ──► the same ──► instance retrieval ┤
scenes of cut-out pictures ──► the same ──► segmentation of patches ─┘
"""

# N pictures of the table, Q test pictures

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from PIL import Image

from dinov3.config import EvalsConfig
from dinov3.evals.baselines import MODEL, RAW_PIXELS, SUBJECTS, baseline_models
from dinov3.evals.candidate import Candidate
from dinov3.evals.collection import Halves, Places
from dinov3.evals.dense import (
    DENSE_PROTOCOLS,
    NEEDS_SHAPES,
    SEGMENTATION,
    Dense,
    Pool,
    ScenePair,
    dense_differences,
    dense_rows,
    judge_subjects,
    scene_pair,
)
from dinov3.evals.features import Backbone, Features, Preparation, extract_all
from dinov3.evals.labelled import ONE_BY_ONE, judge_one_by_one
from dinov3.evals.metrics import mean_cosine, participation_ratio, rankme
from dinov3.evals.progress import EvaluationProgress, watched
from dinov3.evals.protocols import (
    KNN,
    LABELLED_PROTOCOLS,
    RETRIEVAL,
    TOP_1,
    Measure,
    Results,
    differences_of,
    judge_retrieval,
    rows_of,
)
from dinov3.evals.retrieval import random_view
from dinov3.evals.segmentation import RawPatches

PROTOCOLS = (*LABELLED_PROTOCOLS, RETRIEVAL, *DENSE_PROTOCOLS)
NEEDS_LABELS = "needs labels (sub-folders): two classes or more, of {} pictures or more each"
NEEDS_HELD_OUT = "needs at least two held-out pictures"


_FEATURES = "features"
_SCENES = " and ".join(DENSE_PROTOCOLS)


@dataclass(frozen=True)
class Scope:
    """How much of an evaluation to run.

    Attributes:
        protocols: Which; those of scenes run both or not at all.
        baselines: What to judge beside the model; None: all of `baseline_models`.
    """

    protocols: Collection[str] = PROTOCOLS
    baselines: Mapping[str, Backbone] | None = None


ALL = Scope()


class Gallery(Protocol):
    """Pictures by their row in the table."""

    def load(self, places: Iterable[int]) -> Iterator[Image.Image]:
        """Pictures of some rows, in the order asked for."""
        ...


@dataclass(frozen=True)
class SceneStudy:
    """What the probes of patches found on composed scenes."""

    scenes: ScenePair
    found: Mapping[str, Sequence[Dense]]  # subject -> one per seed


@dataclass(frozen=True)
class Study:
    """What an evaluation found."""

    halves: Halves
    test: Places  # every held-out row, labelled or not
    features: Mapping[str, Features]  # of the rows in `places`, by subject and seed
    places: Places  # the rows that have features, ascending
    results: Results  # picture by picture
    dense: SceneStudy | None
    rows: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    health: dict[str, float]
    per_class: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    missing: list[dict[str, str]]


def run_study(
    candidate: Candidate,
    table: pl.DataFrame,
    pictures: Gallery,
    halves: Halves,
    config: EvalsConfig,
    device: torch.device,
    *,
    scope: Scope = ALL,
    scenes: ScenePair | None = None,
) -> Study:
    """Runs the protocols that the pictures allow.

    Args:
        candidate: The model.
        table: One row per image: path, label, split.
        pictures: The images of its rows.
        halves: Its labelled part.
        config: The recipe.
        device: Where the model is.
        scope: How much of it.
        scenes: Made before by `find_scenes` of the same pictures; None makes them.

    Raises:
        DataError: There is no picture at all, or no background.
        ConfigError: The crop or the scenes do not fit the model.
    """
    candidate.require_divisible(config.crop)
    test = np.flatnonzero((table["split"] == "test").to_numpy())
    protocols, baselines = scope.protocols, scope.baselines
    if baselines is None:
        baselines = baseline_models(candidate.untrained, config.num_random_inits)
    models = {MODEL: candidate.backbone, **baselines}
    places = _places_needed(table, halves, test)
    prepare = preparation(candidate, config)
    progress = EvaluationProgress(candidate.name, len(_parts(halves, test, protocols)))
    progress.begin(_FEATURES, f"{len(models)} models on {len(places)} pictures")
    images = watched(pictures.load(places), len(places), _FEATURES)
    features = extract_all(models, images, prepare, config.run.batch_size, device)
    results = Results()
    lacking: dict[str, str] = {}  # why protocols cannot run
    unlabelled = NEEDS_LABELS.format(config.min_per_class)
    if halves.usable:
        judge_one_by_one(features, _inside(halves, places), config, results, protocols, progress)
    else:
        lacking |= dict.fromkeys(LABELLED_PROTOCOLS, unlabelled)
    if len(test) < 2:
        lacking[RETRIEVAL] = NEEDS_HELD_OUT
    elif RETRIEVAL in protocols:
        chosen = test[: config.retrieval.num_images]
        progress.begin(RETRIEVAL, f"{len(models)} models on two views of {len(chosen)} pictures")
        _retrieve(models, pictures, chosen, prepare, config, device, results)
    dense = None
    if not set(DENSE_PROTOCOLS).isdisjoint(protocols):
        scenes = scenes or find_scenes(pictures, halves, config)
        if halves.usable:
            progress.begin(_SCENES, _extent_of(scenes, len(models)))
        if scenes is not None:
            dense = judge_scenes(candidate, models, scenes, config, device)
    if dense is None:
        reason = NEEDS_SHAPES if halves.usable else unlabelled
        lacking |= dict.fromkeys(DENSE_PROTOCOLS, reason)
    judged = test if len(test) > 1 else places
    return Study(
        halves=halves,
        test=test,
        features=features,
        places=places,
        results=results,
        dense=dense,
        rows=rows_of(results, config) + _dense_rows(dense, config),
        differences=differences_of(results, config) + _dense_differences(dense, config),
        health=_health(features[MODEL].cls[np.searchsorted(places, judged)]),
        per_class=_per_class(results, halves),
        choices=results.choices + _dense_choices(dense),
        missing=_missing(lacking, protocols),
    )


def _missing(lacking: Mapping[str, str], asked: Collection[str]) -> list[dict[str, str]]:
    """The protocols that were asked for and cannot run, with the reason."""
    return [
        {"protocol": name, "reason": reason} for name, reason in lacking.items() if name in asked
    ]


def find_scenes(pictures: Gallery, halves: Halves, config: EvalsConfig) -> ScenePair | None:
    """Scenes of both halves; None without labels, or without pictures of a shape.

    Raises:
        DataError: There is no background.
    """
    if not halves.usable:
        return None
    return scene_pair(
        pictures.load,
        halves.classes,
        Pool(halves.train, halves.train_labels),
        Pool(halves.test, halves.test_labels),
        config.composites,
        config.seed,
    )


def judge_scenes(
    candidate: Candidate,
    models: Mapping[str, Backbone],
    scenes: ScenePair,
    config: EvalsConfig,
    device: torch.device,
) -> SceneStudy:
    """Segmentation of the same scenes by the patches of every subject.

    Args:
        candidate: The model, which says how scenes are seen.
        models: By name, see `run_study`.
        scenes: Of both halves.
        config: The recipe.
        device: Where the models are.

    Raises:
        ConfigError: The scenes do not fit the model.
    """
    size = config.composites.size
    candidate.require_divisible(size, "composites.size")
    if RAW_PIXELS in models:
        models = {**models, RAW_PIXELS: RawPatches(candidate.cell, candidate.scale)}
    found = judge_subjects(
        models,
        scenes,
        scene_view(candidate, config),
        config.segmentation,
        batch_size=config.run.batch_size,
        device=device,
        seed=config.seed,
    )
    return SceneStudy(scenes, found)


def scene_view(candidate: Candidate, config: EvalsConfig) -> Preparation:
    """How a scene is shown to the model: whole."""
    size = config.composites.size
    mean, std = candidate.mean, candidate.std
    return candidate.view(Preparation("crop", size, size, config.background, mean, std))


def preparation(candidate: Candidate, config: EvalsConfig) -> Preparation:
    """How the recipe shows pictures to the model."""
    return candidate.view(
        Preparation(
            fit=config.fit,
            resize=config.resize,
            crop=config.crop,
            background=config.background,
            mean=candidate.mean,
            std=candidate.std,
        )
    )


def headline_k(rows: Iterable[Mapping[str, Any]]) -> int:
    """The largest number of neighbours that was judged; 0 without labels."""
    return max((row["k"] for row in rows if row["protocol"] == KNN), default=0)


def _places_needed(table: pl.DataFrame, halves: Halves, test: Places) -> Places:
    needed = np.union1d(np.concatenate([halves.train, halves.test]), test).astype(np.int64)
    return needed if len(needed) else np.arange(table.height)


def _inside(halves: Halves, places: Places) -> Halves:
    """The halves counted within `places` instead of within the table."""
    train, test = (np.searchsorted(places, half) for half in (halves.train, halves.test))
    return Halves(halves.classes, train, test, halves.train_labels, halves.test_labels)


def _parts(halves: Halves, test: Places, protocols: Collection[str]) -> list[str]:
    """What an evaluation goes through, so far as that is known before any picture is opened."""
    labelled = [name for name in ONE_BY_ONE if name in protocols] if halves.usable else []
    retrieval = [RETRIEVAL] if RETRIEVAL in protocols and len(test) > 1 else []
    is_dense = halves.usable and not set(DENSE_PROTOCOLS).isdisjoint(protocols)
    return [_FEATURES, *labelled, *retrieval, *([_SCENES] if is_dense else [])]


def _extent_of(scenes: ScenePair | None, num_models: int) -> str:
    if scenes is None:
        return f"left out: {NEEDS_SHAPES}"
    return f"{num_models} models on {len(scenes.train)} + {len(scenes.test)} scenes"


def _retrieve(
    models: Mapping[str, Backbone],
    pictures: Gallery,
    chosen: Places,
    prepare: Preparation,
    config: EvalsConfig,
    device: torch.device,
    results: Results,
) -> None:
    images = watched(pictures.load(chosen), len(chosen), "views")
    views = (
        random_view(image, scale=config.retrieval.scale, seed=config.seed, index=index, view=view)
        for index, image in enumerate(images)
        for view in (0, 1)
    )
    features = extract_all(models, views, prepare, config.run.batch_size, device)
    even, odd = np.arange(0, 2 * len(chosen), 2), np.arange(1, 2 * len(chosen), 2)
    judge_retrieval(
        {name: both[even] for name, both in features.items()},
        {name: both[odd] for name, both in features.items()},
        results,
    )


def _dense_rows(dense: SceneStudy | None, config: EvalsConfig) -> list[dict[str, Any]]:
    if dense is None:
        return []
    return dense_rows(dense.found, dense.scenes, config.num_bootstrap, config.seed)


def _dense_differences(dense: SceneStudy | None, config: EvalsConfig) -> list[dict[str, Any]]:
    if dense is None:
        return []
    return dense_differences(dense.found, config.num_bootstrap, config.seed)


def _dense_choices(dense: SceneStudy | None) -> list[dict[str, Any]]:
    """What the probes of classes chose, by subject and seed."""
    found = dense.found if dense is not None else {}
    return [
        {
            "protocol": SEGMENTATION,
            "subject": subject,
            "val_miou": one.classes.val_miou,
            "c": one.classes.chosen_c,
            "converged": one.classes.converged,
        }
        for subject, every in found.items()
        for one in every
    ]


def _health(cls: np.ndarray) -> dict[str, float]:
    return {
        "num_samples": len(cls),
        "participation_ratio": participation_ratio(cls),
        "rankme": rankme(cls),
        "mean_cosine": mean_cosine(cls),
    }


def _per_class(results: Results, halves: Halves) -> list[dict[str, Any]]:
    """Top-1 of the largest k, class by class, for every subject."""
    ks = [measure.k for measure in results.values if measure.protocol == KNN]
    if not ks:
        return []
    subjects = results.values[Measure(KNN, TOP_1, max(ks))]
    rows = []
    for index, label in enumerate(halves.classes):
        of_class = halves.test_labels == index
        row: dict[str, Any] = {
            "label": label,
            "num_train": int((halves.train_labels == index).sum()),
            "num_test": int(of_class.sum()),
        }
        if of_class.any():
            for subject in SUBJECTS:
                if subject in subjects:
                    row[subject] = float(np.mean(subjects[subject], axis=0)[of_class].mean())
        rows.append(row)
    return rows
