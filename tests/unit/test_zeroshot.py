"""Zero-shot classification: the protocol of the library it follows, and its controls."""

import numpy as np
import pytest
import torch
from open_clip import build_zero_shot_classifier
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch.nn import functional as F

from dinov3.evals.metrics import top_hits
from dinov3.evals.zeroshot import (
    class_embeddings,
    class_names,
    sentences,
    shuffled_hits,
    templates,
    zeroshot_scores,
)


class LetterModel(torch.nn.Module):
    """A text tower whose embedding is a fixed projection of the characters' counts."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(128, 16, generator=generator)

    def encode_text(self, tokens, normalize=False):
        embedded = tokens.float() @ self.table
        return F.normalize(embedded, dim=-1) if normalize else embedded


def count_letters(texts):
    rows = [np.bincount([ord(letter) % 128 for letter in text], minlength=128) for text in texts]
    return torch.from_numpy(np.stack(rows))


def random_unit(rows, width, seed):
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_templates_are_the_eighty_of_the_library():
    patterns = templates()
    assert len(set(patterns)) == 80
    for pattern, sentence in zip(patterns, OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert pattern.replace("{}", "tabby cat") == sentence("tabby cat")


def test_class_embeddings_equal_those_of_open_clip():
    model, names = LetterModel(), ("cat", "sea bird", "fire engine")
    expected = build_zero_shot_classifier(model, count_letters, names, OPENAI_IMAGENET_TEMPLATES)
    every = sentences([(name,) for name in names], templates())
    embedded = model.encode_text(count_letters([text for own in every for text in own]))
    found = class_embeddings(3 * embedded.numpy(), [80] * 3)  # their length must not matter
    np.testing.assert_allclose(found, expected.T.numpy(), atol=1e-6)


def test_a_name_with_braces_is_not_a_template():
    assert sentences([("a{}b",)], ["a photo of a {}."]) == [["a photo of a a{}b."]]


def test_a_class_of_several_names_is_the_mean_of_all_their_sentences():
    assert sentences([("a", "b"), ("c",)], ["{}!", "{}?"]) == [
        ["a!", "a?", "b!", "b?"],
        ["c!", "c?"],
    ]
    embedded = random_unit(6, 8, seed=0)
    found = class_embeddings(embedded, [4, 2])
    mean = embedded[:4].mean(axis=0)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_labels_become_words():
    given = {"naturalforces": ("fire", "lightning"), "not there": ("x",)}
    labels = ("naturalforces", "sea_birds", "animals/big_birds", "tools/cranes", "birds/cranes")
    assert class_names(labels, given) == (
        ("fire", "lightning"),
        ("sea birds",),
        ("big birds",),
        ("cranes (tools)",),
        ("cranes (birds)",),
    )


def test_a_label_of_separators_alone_keeps_its_name():
    assert class_names(("/", "_"), {}) == (("/",), ("_",))


def test_pictures_that_are_their_class_are_all_right_and_shuffled_names_are_chance():
    classes = random_unit(8, 32, seed=0)
    labels = np.repeat(np.arange(8), 50)
    scores = zeroshot_scores(3 * classes[labels], classes)
    assert top_hits(scores, labels).mean() == 1
    shuffled = np.mean(shuffled_hits(scores, labels, 1, num_shuffles=200, seed=0))
    assert shuffled == pytest.approx(1 / 8, abs=0.03)
    shuffled = np.mean(shuffled_hits(scores, labels, 5, num_shuffles=200, seed=0))
    assert shuffled == pytest.approx(5 / 8, abs=0.03)


def test_random_pictures_score_chance():
    labels = np.tile(np.arange(4), 1000)
    scores = zeroshot_scores(random_unit(4000, 64, seed=1), random_unit(4, 64, seed=2))
    assert top_hits(scores, labels).mean() == pytest.approx(1 / 4, abs=0.03)


def test_opposite_pictures_still_name_a_class():
    classes = np.eye(2, 4, dtype=np.float32)
    scores = zeroshot_scores(-classes, classes)
    np.testing.assert_allclose(scores.sum(axis=1), 1)
    assert top_hits(scores, np.array([1, 0])).tolist() == [1, 1]
    assert (scores > 0).all()


def test_scores_are_the_softmax_of_a_hundred_cosines():
    pictures, classes = random_unit(5, 16, seed=3), random_unit(6, 16, seed=4)
    expected = (100 * torch.from_numpy(pictures) @ torch.from_numpy(classes).T).softmax(dim=1)
    np.testing.assert_allclose(zeroshot_scores(7 * pictures, classes), expected, atol=1e-5)
