"""Image-text retrieval: find a picture's caption among all, and a caption's picture (PAPER C.13).

Protocol:
    Features: both towers' embeddings, L2-normalised; order by cosine.
    Trained:  nothing.
    Right:    every text a picture is described by, and every picture a text describes. Texts that
              differ in upper case alone are one text, as the tokenizer reads them; so the same
              caption of two pictures counts as a hit for both.
    Metric:   R@k, whether a right answer is among the first k. Equal cosines count against the
              model: wrong answers rank before the right one.
    Cost:     one pass per picture and per text, N x M x E multiplications.
    Controls: the picture's own code as text scores 1; chance is a random order of the gallery;
              shuffled captions give each picture the captions of another.
"""

# N pictures, M texts, L pairs, E width, K shuffles

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov3.errors import DataError
from dinov3.evals.metrics import Floats, Integers, unit_rows

Ranks = npt.NDArray[np.int64]
Pairs = npt.NDArray[np.int64]  # [L, 2]: query, one of its right answers

_CHUNK = 1 << 24  # similarities held at once


@dataclass(frozen=True)
class Corpus:
    """Pictures, texts, and who belongs to whom."""

    pictures: tuple[str, ...]  # by their digests, each once
    texts: tuple[str, ...]  # each once
    pairs: Pairs  # picture, text

    @property
    def reversed_pairs(self) -> Pairs:
        """Text, picture."""
        return self.pairs[:, ::-1]


def make_corpus(pictures: Sequence[str], captions: Sequence[str]) -> Corpus:
    """Pictures and texts of a table of pairs, each once, in the order they first appear.

    Args:
        pictures: Digest of each pair's picture, [L].
        captions: [L].

    Raises:
        DataError: There is no pair.
    """
    if not len(captions):
        msg = "pairs: needs at least one picture with a caption, got none. Give captions."
        raise DataError(msg)
    rows = {picture: row for row, picture in enumerate(dict.fromkeys(pictures))}
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(caption.lower(), caption)
    places = {lowered: place for place, lowered in enumerate(first)}
    found = [
        (rows[picture], places[caption.lower()])
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    return Corpus(tuple(rows), tuple(first.values()), np.unique(np.array(found), axis=0))


def first_hit_ranks(queries: Floats, gallery: Floats, pairs: Pairs) -> Ranks:
    """Rank, from 1, of the best right answer of every query.

    Args:
        queries: Embeddings, [N, E].
        gallery: Embeddings, [M, E].
        pairs: Query and right answer; every query has one or more.

    Raises:
        DataError: A query has no right answer.
    """
    missing = np.setdiff1d(np.arange(len(queries)), pairs[:, 0])
    if len(missing):
        msg = f"pairs: every query needs an answer, got none for query {missing[0]}. Pair it."
        raise DataError(msg)
    sought, found = unit_rows(queries), unit_rows(gallery)
    rows = max(1, _CHUNK // len(found))
    ranks = []
    for start in range(0, len(sought), rows):
        similarities = sought[start : start + rows] @ found.T  # [n, M]
        inside = (pairs[:, 0] >= start) & (pairs[:, 0] < start + rows)
        right = np.zeros(similarities.shape, dtype=bool)
        right[pairs[inside, 0] - start, pairs[inside, 1]] = True
        best = np.where(right, similarities, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((similarities >= best) & ~right).sum(axis=1))
    return np.concatenate(ranks).astype(np.int64)


def shuffled_pairs(corpus: Corpus, *, num_shuffles: int, seed: int) -> list[Pairs]:
    """Pairs where every picture is described by the captions of a drawn one, K times [L, 2]."""
    generator = np.random.default_rng(seed)
    shuffled = []
    for _ in range(num_shuffles):
        order = generator.permutation(len(corpus.pictures))
        shuffled.append(np.stack([order[corpus.pairs[:, 0]], corpus.pairs[:, 1]], axis=1))
    return shuffled


def chance_hits(pairs: Pairs, num_queries: int, num_gallery: int, k: int) -> Floats:
    """Probability per query that a random order of the gallery has a right answer in its first k.

    With r right ones among M: 1 - (1 - r/M) (1 - r/(M-1)) ... over k draws, [N].
    """
    right = np.bincount(pairs[:, 0], minlength=num_queries).astype(np.float64)
    missed = np.ones(num_queries)
    for drawn in range(min(k, num_gallery)):
        missed *= np.clip(1 - right / (num_gallery - drawn), 0, 1)
    return np.asarray(1 - missed)


def hits_within(ranks: Integers, k: int) -> npt.NDArray[np.float64]:
    """Whether the best right answer is among the first k, 1 or 0 per query."""
    return np.asarray(ranks <= k, dtype=np.float64)


def nearest_answers(queries: Floats, gallery: Floats, num: int) -> npt.NDArray[np.int64]:
    """The `num` most similar of the gallery for each query, best first, [N, num]."""
    similarities = unit_rows(queries) @ unit_rows(gallery).T
    return np.argsort(-similarities, axis=1, kind="stable")[:, :num]
