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
    Dense,
    Pool,
    ScenePair,
    judge_subjects,
    scene_pair,
)
from dinov3.evals.dense_findings import dense_choices, dense_differences, dense_rows
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
    evaluation = _Evaluation(candidate, table, pictures, halves, config, device, scope)
    features = evaluation.see_pictures()
    evaluation.judge_labelled(features)
    evaluation.judge_retrieval()
    dense = evaluation.judge_scenes(scenes)
    return evaluation.findings(features, dense)


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


class _Evaluation:
    """One model and its baselines before one table; each step adds what it finds."""

    def __init__(
        self,
        candidate: Candidate,
        table: pl.DataFrame,
        pictures: Gallery,
        halves: Halves,
        config: EvalsConfig,
        device: torch.device,
        scope: Scope,
    ) -> None:
        baselines = scope.baselines
        if baselines is None:
            baselines = baseline_models(candidate.untrained, config.num_random_inits)
        self.models = {MODEL: candidate.backbone, **baselines}
        self.test = np.flatnonzero((table["split"] == "test").to_numpy())
        self.places = _places_needed(table, halves, self.test)
        self.candidate, self.pictures, self.halves = candidate, pictures, halves
        self.config, self.device, self.protocols = config, device, scope.protocols
        self.progress = EvaluationProgress(candidate.name, len(self._parts()))
        self.results = Results()
        self.lacking: dict[str, str] = {}  # protocol -> why it cannot run

    def see_pictures(self) -> dict[str, Features]:
        """Features of the rows in `places`, of every model."""
        num = len(self.places)
        self.progress.begin(_FEATURES, f"{len(self.models)} models on {num} pictures")
        return self._extract(watched(self.pictures.load(self.places), num, _FEATURES))

    def judge_labelled(self, features: Mapping[str, Features]) -> None:
        """The protocols that need labels."""
        if not self.halves.usable:
            self._lack(LABELLED_PROTOCOLS, self._unlabelled)
            return
        halves = _inside(self.halves, self.places)
        judge_one_by_one(features, halves, self.config, self.results, self.protocols, self.progress)

    def judge_retrieval(self) -> None:
        """Retrieval of the second view of held-out pictures by their first."""
        if len(self.test) < 2:
            self._lack([RETRIEVAL], NEEDS_HELD_OUT)
        elif RETRIEVAL in self.protocols:
            chosen = self.test[: self.config.retrieval.num_images]
            extent = f"{len(self.models)} models on two views of {len(chosen)} pictures"
            self.progress.begin(RETRIEVAL, extent)
            features = self._extract(self._views(chosen))
            first, second = (np.arange(view, 2 * len(chosen), 2) for view in (0, 1))
            judge_retrieval(
                {name: both[first] for name, both in features.items()},
                {name: both[second] for name, both in features.items()},
                self.results,
            )

    def judge_scenes(self, scenes: ScenePair | None) -> SceneStudy | None:
        """The protocols of patches, on these scenes or on those the pictures make."""
        dense = None
        if not set(DENSE_PROTOCOLS).isdisjoint(self.protocols):
            scenes = scenes or find_scenes(self.pictures, self.halves, self.config)
            if self.halves.usable:
                self.progress.begin(_SCENES, _extent_of(scenes, len(self.models)))
            if scenes is not None:
                dense = self._segment(scenes)
        if dense is None:
            reason = NEEDS_SHAPES if self.halves.usable else self._unlabelled
            self._lack(DENSE_PROTOCOLS, reason)
        return dense

    def findings(self, features: Mapping[str, Features], dense: SceneStudy | None) -> Study:
        """All that was found, in the order of a report."""
        results, config = self.results, self.config
        rows, differences = rows_of(results, config), differences_of(results, config)
        choices = list(results.choices)
        if dense is not None:
            num, seed = config.num_bootstrap, config.seed
            rows += dense_rows(dense.found, dense.scenes, num, seed)
            differences += dense_differences(dense.found, num, seed)
            choices += dense_choices(dense.found)
        judged = self.test if len(self.test) > 1 else self.places
        return Study(
            halves=self.halves,
            test=self.test,
            features=features,
            places=self.places,
            results=results,
            dense=dense,
            rows=rows,
            differences=differences,
            health=_health(features[MODEL].cls[np.searchsorted(self.places, judged)]),
            per_class=_per_class(results, self.halves),
            choices=choices,
            missing=[{"protocol": name, "reason": reason} for name, reason in self.lacking.items()],
        )

    def _parts(self) -> list[str]:
        """What it goes through, so far as that is known before any picture is opened."""
        usable, protocols = self.halves.usable, self.protocols
        labelled = [name for name in ONE_BY_ONE if name in protocols] if usable else []
        retrieval = [RETRIEVAL] if RETRIEVAL in protocols and len(self.test) > 1 else []
        is_dense = usable and not set(DENSE_PROTOCOLS).isdisjoint(protocols)
        return [_FEATURES, *labelled, *retrieval, *([_SCENES] if is_dense else [])]

    @property
    def _unlabelled(self) -> str:
        return NEEDS_LABELS.format(self.config.min_per_class)

    def _lack(self, protocols: Iterable[str], reason: str) -> None:
        """Notes why those among them that were asked for cannot run."""
        self.lacking |= {name: reason for name in protocols if name in self.protocols}

    def _extract(self, images: Iterable[Image.Image]) -> dict[str, Features]:
        prepare = preparation(self.candidate, self.config)
        return extract_all(self.models, images, prepare, self.config.run.batch_size, self.device)

    def _segment(self, scenes: ScenePair) -> SceneStudy:
        """The same scenes by the patches of every subject; raw pixels need patches of their own."""
        candidate, config, models = self.candidate, self.config, self.models
        candidate.require_divisible(config.composites.size, "composites.size")
        if RAW_PIXELS in models:
            models = {**models, RAW_PIXELS: RawPatches(candidate.cell, candidate.scale)}
        found = judge_subjects(
            models,
            scenes,
            scene_view(candidate, config),
            config.segmentation,
            batch_size=config.run.batch_size,
            device=self.device,
            seed=config.seed,
        )
        return SceneStudy(scenes, found)

    def _views(self, chosen: Places) -> Iterator[Image.Image]:
        """Two views of every chosen picture, one after the other."""
        images = watched(self.pictures.load(chosen), len(chosen), "views")
        scale, seed = self.config.retrieval.scale, self.config.seed
        for index, image in enumerate(images):
            for view in (0, 1):
                yield random_view(image, scale=scale, seed=seed, index=index, view=view)


def _places_needed(table: pl.DataFrame, halves: Halves, test: Places) -> Places:
    needed = np.union1d(np.concatenate([halves.train, halves.test]), test).astype(np.int64)
    return needed if len(needed) else np.arange(table.height)


def _inside(halves: Halves, places: Places) -> Halves:
    """The halves counted within `places` instead of within the table."""
    train, test = (np.searchsorted(places, half) for half in (halves.train, halves.test))
    return Halves(halves.classes, train, test, halves.train_labels, halves.test_labels)


def _extent_of(scenes: ScenePair | None, num_models: int) -> str:
    if scenes is None:
        return f"left out: {NEEDS_SHAPES}"
    return f"{num_models} models on {len(scenes.train)} + {len(scenes.test)} scenes"


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
