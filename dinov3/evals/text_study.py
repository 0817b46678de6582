"""One evaluation of a model of pictures and texts: three protocols, baselines, what was not judged.

held-out pictures ──► class names ──► zero-shot classification ──┐
held-out pictures ──► captions ──► retrieval, both ways          ├─► rows, differences
held-out cut-outs on photographs ──► open-vocabulary segmentation┘
"""

# Q pictures, N scenes, C classes, K classes with the background

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from dinov3.config import EvalsConfig
from dinov3.errors import ConfigError
from dinov3.evals.aligned import AlignedModel, Embeddings, embed_pictures, embed_texts
from dinov3.evals.baselines import MAJORITY, MODEL, majority_scores
from dinov3.evals.collection import Halves, Places
from dinov3.evals.composites import (
    Half,
    Layout,
    Scenes,
    build_composites,
    cut_outs,
    packaged_photographs,
    photographs_digest,
    shared_classes,
    source_photographs,
    split_photographs,
)
from dinov3.evals.features import Preparation
from dinov3.evals.metrics import Floats, top_hits
from dinov3.evals.open_vocabulary import (
    Segmented,
    Window,
    constant_counts,
    open_vocabulary_counts,
    patch_classes,
    segment_scenes,
    shuffled_counts,
)
from dinov3.evals.progress import EvaluationProgress, watched
from dinov3.evals.segmentation import class_ious
from dinov3.evals.study import NEEDS_LABELS, Gallery
from dinov3.evals.text_findings import CHANCE, SHUFFLED, Findings, rounded
from dinov3.evals.text_retrieval import (
    Corpus,
    chance_hits,
    first_hit_ranks,
    hits_within,
    make_corpus,
    shuffled_pairs,
)
from dinov3.evals.zeroshot import (
    class_embeddings,
    class_names,
    sentences,
    shuffled_hits,
    templates,
    zeroshot_scores,
)

ZERO_SHOT = "zero-shot classification"
IMAGE_TO_TEXT = "image to text"
TEXT_TO_IMAGE = "text to image"
WHOLE = "open-vocabulary segmentation, whole"
SLIDING = "open-vocabulary segmentation, windows"

NEEDS_CAPTIONS = "needs at least two held-out pictures with a caption"
NEEDS_PATCHES = "needs patches that were trained with text, got a model without use_patch_tokens"
NEEDS_SHAPES = "needs held-out pictures with transparency, of two classes or more"

_CLASSES_FOR_TOP_5 = 6  # with five classes or fewer it is always 1
_TEST_STREAM = 1  # of the composites, as in the dense evaluation


@dataclass(frozen=True)
class RetrievalPieces:
    """What was retrieved, for the page."""

    corpus: Corpus
    places: Places  # row of the table of each picture of the corpus
    pictures: Embeddings
    texts: Embeddings


@dataclass(frozen=True)
class SegmentationPieces:
    """What was segmented, for the page."""

    scenes: Scenes
    found: Segmented


@dataclass(frozen=True)
class TextStudy:
    """What an evaluation found."""

    findings: Findings
    per_class: list[dict[str, Any]]
    missing: list[dict[str, str]]
    facts: dict[str, Any]
    retrieval: RetrievalPieces | None
    segmentation: SegmentationPieces | None


class TextEvaluation:
    """The protocols over one model and one table."""

    def __init__(
        self,
        aligned: AlignedModel,
        table: pl.DataFrame,
        pictures: Gallery,
        halves: Halves,
        config: EvalsConfig,
        device: torch.device,
    ) -> None:
        """Takes what is judged and on what.

        Args:
            aligned: The model.
            table: One row per image: path, sha256, label, split.
            pictures: The images of its rows.
            halves: Its labelled part.
            config: The recipe.
            device: Where the model is.

        Raises:
            ConfigError: The crop does not fit the model.
        """
        if config.text.crop % aligned.stride:
            msg = (
                f"text.crop: not a multiple of the patch size {aligned.stride}, got "
                f"{config.text.crop}. Round it."
            )
            raise ConfigError(msg)
        self.aligned, self.table, self.pictures = aligned, table, pictures
        self.halves, self.config, self.device = halves, config, device
        self.findings = Findings(config.num_bootstrap, config.seed)
        self.missing: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}
        self.names = class_names(halves.classes, config.text.class_names)
        self.per_class: list[dict[str, Any]] = [
            {
                "label": label,
                "names": list(own),
                "num_test": int((halves.test_labels == index).sum()),
            }
            for index, (label, own) in enumerate(zip(halves.classes, self.names, strict=True))
        ]

    def run(self, pairs: pl.DataFrame, name: str) -> TextStudy:
        """Runs every protocol the pictures allow.

        Args:
            pairs: Held-out pairs: path, sha256, caption.
            name: Of the model, where it is said what is under way.
        """
        chosen = self._chosen(pairs)
        progress = EvaluationProgress(name, self._num_parts(chosen))
        return TextStudy(
            retrieval=self._classify_and_retrieve(chosen, progress),
            segmentation=self._segment(progress),
            findings=self.findings,
            per_class=self.per_class,
            missing=self.missing,
            facts=self.facts,
        )

    def _num_parts(self, chosen: pl.DataFrame) -> int:
        """Features, what the table allows of classes and captions, two ways to segment."""
        return 1 + bool(len(self._labelled)) + _has_captions(chosen) + len((WHOLE, SLIDING))

    @property
    def _labelled(self) -> Places:
        return self.halves.test if self.halves.usable else self.halves.test[:0]

    def _classify_and_retrieve(
        self, chosen: pl.DataFrame, progress: EvaluationProgress
    ) -> RetrievalPieces | None:
        """Both share one pass over the held-out pictures."""
        row_of = {path: row for row, path in enumerate(self.table["path"])}
        described = np.array([row_of[path] for path in chosen["path"]], dtype=np.int64)
        labelled = self._labelled
        places = np.union1d(described, labelled).astype(np.int64)
        progress.begin("features", f"{len(places)} pictures")
        embedded = self._embed_pictures(places)
        if len(labelled):
            extent = f"{len(labelled)} pictures of {self.halves.num_classes} classes"
            progress.begin(ZERO_SHOT, extent)
            self._classify(embedded[np.searchsorted(places, labelled)])
        else:
            reason = NEEDS_LABELS.format(self.config.min_per_class)
            self.missing.append({"protocol": ZERO_SHOT, "reason": reason})
        if not _has_captions(chosen):
            for protocol in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
                self.missing.append({"protocol": protocol, "reason": NEEDS_CAPTIONS})
            return None
        corpus = make_corpus(chosen["sha256"].to_list(), chosen["caption"].to_list())
        first = chosen.with_columns(place=described).unique(
            "sha256", keep="first", maintain_order=True
        )
        own = first["place"].to_numpy()
        extent = f"{len(corpus.pictures)} pictures and {len(corpus.texts)} texts"
        progress.begin(f"{IMAGE_TO_TEXT} and {TEXT_TO_IMAGE}", extent)
        return self._retrieve(corpus, own, embedded[np.searchsorted(places, own)])

    def _chosen(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Pairs of the first pictures in the order of their digests: a draw without a seed."""
        wanted = self.config.text.num_pictures
        if wanted is None:
            return pairs
        first = pairs["sha256"].unique().sort().head(wanted)
        return pairs.filter(pl.col("sha256").is_in(first.implode()))

    def _embed_pictures(self, places: Places) -> Embeddings:
        config = self.config
        prepare = Preparation(
            fit=config.fit,
            resize=config.text.resize,
            crop=config.text.crop,
            background=config.background,
            mean=self.aligned.mean,
            std=self.aligned.std,
        )
        if not len(places):
            return np.zeros((0, 1), dtype=np.float32)
        images = watched(self.pictures.load(places), len(places), "pictures")
        return embed_pictures(self.aligned, images, prepare, config.run.batch_size, self.device)

    def _embed_texts(self, texts: Sequence[str]) -> Embeddings:
        return embed_texts(self.aligned, texts, self.config.run.batch_size, self.device)

    def _embed_classes(self, names: Sequence[Sequence[str]]) -> tuple[Embeddings, list[int]]:
        """All sentences of all classes, and how many each has."""
        every = sentences(names, templates())
        embedded = self._embed_texts([sentence for own in every for sentence in own])
        return embedded, [len(own) for own in every]

    def _classify(self, pictures: Embeddings) -> None:
        halves, config = self.halves, self.config
        embedded, sizes = self._embed_classes(self.names)
        scores = zeroshot_scores(pictures, class_embeddings(embedded, sizes))
        guess = majority_scores(halves.train_labels, len(pictures), halves.num_classes)
        labels = halves.test_labels
        for top in (1, 5) if halves.num_classes >= _CLASSES_FOR_TOP_5 else (1,):
            shuffled = shuffled_hits(
                scores, labels, top, num_shuffles=config.text.num_shuffles, seed=config.seed
            )
            values = {
                MODEL: top_hits(scores, labels, top),
                SHUFFLED: np.mean(shuffled, axis=0),
                MAJORITY: top_hits(guess, labels, top),
            }
            self.findings.add_samples(ZERO_SHOT, f"top-{top}", values)
            if top == 1:
                self._balance(values)

    def _balance(self, values: Mapping[str, Floats]) -> None:
        """Class by class, and their mean."""
        labels = self.halves.test_labels
        self.findings.add_balanced(ZERO_SHOT, "mean per class", values, labels)
        for index, row in enumerate(self.per_class):
            of_class = labels == index
            if of_class.any():
                row["zero_shot_top_1"] = rounded(values[MODEL][of_class].mean())

    def _retrieve(self, corpus: Corpus, places: Places, pictures: Embeddings) -> RetrievalPieces:
        text = self.config.text
        texts = self._embed_texts(corpus.texts)
        shuffles = shuffled_pairs(corpus, num_shuffles=text.num_shuffles, seed=self.config.seed)
        ways = {
            IMAGE_TO_TEXT: (pictures, texts, corpus.pairs, shuffles),
            TEXT_TO_IMAGE: (
                texts,
                pictures,
                corpus.reversed_pairs,
                [pairs[:, ::-1] for pairs in shuffles],
            ),
        }
        for protocol, (queries, gallery, pairs, others) in ways.items():
            ranks = first_hit_ranks(queries, gallery, pairs)
            shuffled = [first_hit_ranks(queries, gallery, other) for other in others]
            for k in text.ks:
                values = {
                    MODEL: hits_within(ranks, k),
                    SHUFFLED: np.mean([hits_within(one, k) for one in shuffled], axis=0),
                    CHANCE: chance_hits(pairs, len(queries), len(gallery), k),
                }
                self.findings.add_samples(protocol, f"R@{k}", values)
        self.facts |= {"num_pictures": len(corpus.pictures), "num_texts": len(corpus.texts)}
        return RetrievalPieces(corpus, places, pictures, texts)

    def _segment(self, progress: EvaluationProgress) -> SegmentationPieces | None:
        width = self.aligned.patch_width
        scenes = None if width is None else self._scenes()
        if width is None or scenes is None:
            reason = NEEDS_PATCHES if width is None else NEEDS_SHAPES
            for protocol in (WHOLE, SLIDING):
                progress.begin(protocol, f"left out: {reason}")
                self.missing.append({"protocol": protocol, "reason": reason})
            return None
        wanted = self.config.text.open_vocabulary
        index_of = {label: index for index, label in enumerate(self.halves.classes)}
        names = [self.names[index_of[label]] for label in scenes.classes]
        embedded, sizes = self._embed_classes([wanted.background_names, *names])
        classes = patch_classes(embedded, sizes, width)
        progress.begin(WHOLE, f"{len(scenes)} scenes")
        whole = self._segment_scenes(scenes, classes, None)
        self._judge(WHOLE, scenes, whole)
        progress.begin(SLIDING, f"{len(scenes)} scenes")
        window = Window(wanted.window, wanted.stride)
        self._judge(SLIDING, scenes, self._segment_scenes(scenes, classes, window))
        return SegmentationPieces(scenes, whole)

    def _segment_scenes(
        self, scenes: Scenes, classes: Embeddings, window: Window | None
    ) -> Segmented:
        side = self.config.text.open_vocabulary.resize
        prepare = Preparation(
            fit="crop",  # scenes are square: the whole, resized
            resize=side,
            crop=side,
            background=self.config.background,
            mean=self.aligned.mean,
            std=self.aligned.std,
        )
        return segment_scenes(
            self.aligned,
            scenes,
            classes,
            prepare,
            window=window,
            batch_size=self.config.run.batch_size,
            device=self.device,
        )

    def _judge(self, protocol: str, scenes: Scenes, found: Segmented) -> None:
        both = open_vocabulary_counts(scenes.masks, found, len(scenes.classes) + 1)
        num, seed = self.config.text.num_shuffles, self.config.seed
        for metric, counts in zip(("mIoU", "mIoU of objects"), both, strict=True):
            runs = {
                MODEL: [counts],
                SHUFFLED: shuffled_counts(counts, num_shuffles=num, seed=seed),
                MAJORITY: [constant_counts(counts)],
            }
            self.findings.add_counts(protocol, metric, runs)
        if protocol == WHOLE:
            ious = dict(zip(scenes.classes, class_ious(both[0])[1:].tolist(), strict=True))
            for row in self.per_class:
                if not np.isnan(iou := ious.get(row["label"], np.nan)):
                    row["segmentation_iou"] = rounded(iou)

    def _scenes(self) -> Scenes | None:
        """Composites of held-out pictures and of photographs no training scene shows."""
        wanted, halves = self.config.text.open_vocabulary, self.halves
        spec = wanted.backgrounds
        photographs = packaged_photographs() if spec is None else source_photographs(spec)
        _, second = split_photographs(photographs, self.config.seed)
        images = self.pictures.load(halves.test)
        cuts = cut_outs(images, halves.test_labels, halves.num_classes, wanted.scene_size)
        half = Half(cuts, second)
        classes, half, _ = shared_classes(halves.classes, half, half)
        if len(classes) < 2:
            return None
        self.facts["photographs"] = photographs_digest(photographs)
        return build_composites(
            classes,
            half,
            Layout(wanted.scene_size, wanted.num_objects),
            wanted.num_scenes,
            seed=self.config.seed,
            stream=_TEST_STREAM,
        )


def _has_captions(chosen: pl.DataFrame) -> bool:
    """Whether captions can be mistaken for each other's."""
    return chosen["sha256"].n_unique() > 1
