"""Zero-shot classification: classes are sentences, no picture of them is looked at (SPEC 4.4).

Protocol:
    Classes:  80 templates ("a photo of a {}.") per class name; each sentence embedded and
              L2-normalised, their mean normalised again. A class may have several names.
    Trained:  nothing.
    Scores:   softmax of 100 x cosine of picture and class; 100 orders nothing anew.
    Metric:   top-1 and top-5.
    Cost:     80 passes of the text tower per class, one of both towers' pictures.
    Controls: chance, the frequency of the training half's classes; shuffled captions, where the
              class embeddings change places and only the knowledge of names is lost.
"""

# Q pictures, C classes, M sentences, E width of the space, K shuffles

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dinov3.evals.metrics import Floats, Integers, top_hits, unit_rows

_SCALE = 100.0


def templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's ImageNet evaluation, with {} for the class."""
    from open_clip.zero_shot_metadata import (  # lazily: the package takes seconds to import
        OPENAI_IMAGENET_TEMPLATES,
    )

    return tuple(sentence("{}") for sentence in OPENAI_IMAGENET_TEMPLATES)


def class_names(
    labels: Sequence[str], given: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Names of every class: those somebody chose, or the label as words.

    `_` is a space, and of `animals/sea_birds` the last part is the name. Where two labels end
    alike, what stands before it follows in brackets: `cranes (birds)`.

    Args:
        labels: As the table has them, each once.
        given: Names by label; labels that are not there do not matter.
    """
    parts = [[_words(part) for part in label.split("/") if _words(part)] for label in labels]
    last = [words[-1] if words else label for words, label in zip(parts, labels, strict=True)]
    names = []
    for label, words, name in zip(labels, parts, last, strict=True):
        before = " ".join(words[:-1])
        ambiguous = last.count(name) > 1 and before
        own = f"{name} ({before})" if ambiguous else name
        names.append(tuple(given.get(label, (own,))))
    return tuple(names)


def sentences(names: Sequence[Sequence[str]], patterns: Sequence[str]) -> list[list[str]]:
    """Sentences of every class: each of its names in every template."""
    return [[pattern.replace("{}", name) for name in own for pattern in patterns] for own in names]


def class_embeddings(embedded: Floats, sizes: Sequence[int]) -> npt.NDArray[np.float32]:
    """One unit vector per class: the mean of its normalised sentences, [C, E].

    Args:
        embedded: Of all sentences, class by class, [M, E].
        sizes: Sentences of each class; M together.
    """
    parts = np.split(unit_rows(embedded), np.cumsum(sizes)[:-1])
    return unit_rows(np.stack([part.mean(axis=0) for part in parts]))


def zeroshot_scores(pictures: Floats, classes: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of the classes, [Q, C].

    Args:
        pictures: [Q, E], of any length.
        classes: Unit rows, [C, E].
    """
    logits = _SCALE * (unit_rows(pictures) @ classes.T).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def shuffled_hits(
    scores: Floats, labels: Integers, top: int, *, num_shuffles: int, seed: int
) -> list[npt.NDArray[np.float64]]:
    """Hits where every class answers to the name of a drawn other one (or its own): K x [Q]."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(scores.shape[1]) for _ in range(num_shuffles)]
    return [top_hits(scores[:, order], labels, top) for order in orders]


def _words(part: str) -> str:
    return " ".join(part.replace("_", " ").split())
