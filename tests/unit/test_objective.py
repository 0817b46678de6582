"""Terms over images of several micro-batches give the gradient of the whole batch, exactly."""

import pytest
import torch

from dinov3.losses.gram import gram_loss
from dinov3.losses.koleo import koleo_loss
from dinov3.train.objective import (
    GramTerm,
    Objective,
    Weights,
    WholeBatch,
    koleo_of_crops,
    spans_micro_batches,
    weighted_sum,
)

AIMS = Objective(
    dino=2.0,
    ibot=3.0,
    koleo=0.5,
    koleo_group_size=None,
    student_temperature=0.1,
    ignore_diagonal=False,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_gram_term(**changes):
    plain = {"normalize": True, "image_level": True, "remove": "none", "tokens": "all"}
    return GramTerm(**{**plain, **changes})


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("group_size", [None, 4, 8])
def test_koleo_of_micro_batches_has_the_gradient_of_the_whole_batch(num_parts, group_size):
    """Features are the image of shared weights, as those of a network are."""
    inputs, start = noise(2, 8, 6), noise(6, 5, seed=1)
    weights = start.clone().requires_grad_()
    expected = koleo_of_crops(inputs @ weights, group_size)
    expected.backward()
    parted = start.clone().requires_grad_()
    with torch.no_grad():
        features = [part @ parted for part in inputs.chunk(num_parts, dim=1)]
    whole = WholeBatch(features, lambda rows: koleo_of_crops(rows, group_size), dim=1)
    terms = []
    for number, part in enumerate(inputs.chunk(num_parts, dim=1)):
        term = whole.of(number, part @ parted)
        (term / num_parts).backward()
        terms.append(term.detach())
    torch.testing.assert_close(torch.stack(terms).mean(), expected.detach())
    torch.testing.assert_close(parted.grad, weights.grad)


def test_koleo_within_micro_batches_alone_is_another_gradient():
    """Otherwise the test above could not fail."""
    inputs, start = noise(2, 8, 6), noise(6, 5, seed=1)
    weights, parted = start.clone().requires_grad_(), start.clone().requires_grad_()
    koleo_of_crops(inputs @ weights, None).backward()
    for part in inputs.chunk(2, dim=1):
        (koleo_of_crops(part @ parted, None) / 2).backward()
    assert not torch.allclose(parted.grad, weights.grad, rtol=1e-2)


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
@pytest.mark.parametrize("num_parts", [2, 3])
def test_gram_of_a_whole_batch_has_its_gradient_in_every_micro_batch(num_parts, tokens):
    term = a_gram_term(image_level=False, tokens=tokens)
    inputs, teacher, start = noise(6, 4, 7), noise(6, 4, 3, seed=2), noise(7, 3, seed=1)
    masks = noise(6, 4, seed=3) > 0
    weights = start.clone().requires_grad_()
    expected = term.loss(inputs @ weights, teacher, masks)
    expected.backward()
    parted = start.clone().requires_grad_()
    features = [(part @ start) for part in inputs.chunk(num_parts)]
    whole = WholeBatch(features, lambda rows: term.loss(rows, teacher, masks))
    for number, part in enumerate(inputs.chunk(num_parts)):
        term_of_part = whole.of(number, part @ parted)
        torch.testing.assert_close(term_of_part.detach(), expected.detach())
        (term_of_part / num_parts).backward()
    torch.testing.assert_close(parted.grad, weights.grad)


def test_micro_batches_of_different_sizes_keep_their_own_rows():
    features = [noise(2, 3), noise(5, 3, seed=1)]
    leaves = [part.clone().requires_grad_() for part in features]
    whole = WholeBatch(features, lambda rows: koleo_loss(rows))
    for number, leaf in enumerate(leaves):
        (whole.of(number, leaf) / 2).backward()
    together = torch.cat(features).requires_grad_()
    koleo_loss(together).backward()
    torch.testing.assert_close(torch.cat([leaf.grad for leaf in leaves]), together.grad)


def test_the_gradient_of_a_whole_batch_reaches_bf16_features():
    features = noise(4, 3).bfloat16()
    leaf = features.clone().requires_grad_()
    WholeBatch([features.float()], lambda rows: koleo_loss(rows)).of(0, leaf).backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("group_size", "num_rows", "is_whole", "spans"),
    [
        (None, 8, True, False),
        (None, 8, False, True),
        (4, 8, False, False),
        (8, 8, False, False),
        (16, 8, False, True),
        (3, 8, False, True),
    ],
)
def test_groups_span_micro_batches_where_they_do_not_fit_into_one(
    group_size, num_rows, is_whole, spans
):
    assert spans_micro_batches(group_size, num_rows, is_whole=is_whole) is spans


def test_koleo_looks_at_each_crop_by_itself():
    """The two crops of an image would be each other's neighbours."""
    cls = noise(2, 6, 4)
    cls[1] = cls[0] + 1e-4
    expected = (koleo_loss(cls[0]) + koleo_loss(cls[1])) / 2
    torch.testing.assert_close(koleo_of_crops(cls, None), expected)
    assert koleo_of_crops(cls, None) < koleo_loss(cls.flatten(0, 1)) - 1


def the_terms():
    names = ("dino_global", "dino_local", "ibot", "koleo")
    return {name: torch.tensor(float(value)) for value, name in enumerate(names, start=1)}


def test_pairs_of_crops_share_the_dino_weight():
    """4 global pairs (with itself) and 2 x 3 local ones; KoLeo counts once per global crop."""
    found = weighted_sum(AIMS, the_terms(), 3, Weights())
    assert found.item() == pytest.approx(2 * (4 * 1 + 6 * 2) / 10 + 3 * 3 + 0.5 * 2 * 4)


def test_scheduled_weights_reach_local_crops_and_gram_alone():
    terms = {**the_terms(), "gram": torch.tensor(5.0)}
    found = weighted_sum(AIMS, terms, 3, Weights(local=0.5, gram=1.5))
    plain = weighted_sum(AIMS, the_terms(), 3, Weights(local=0.5))
    assert plain.item() == pytest.approx(2 * (4 * 1 + 0.5 * 6 * 2) / 10 + 3 * 3 + 0.5 * 2 * 4)
    assert (found - plain).item() == pytest.approx(1.5 * 5)


def test_gram_sees_the_chosen_tokens_of_both_sides():
    student, teacher, masks = noise(3, 6, 4), noise(3, 6, 5, seed=1), noise(3, 6, seed=2) > 0
    for tokens, chosen in {"masked": masks, "unmasked": ~masks}.items():
        found = a_gram_term(image_level=False, tokens=tokens).loss(student, teacher, masks)
        expected = gram_loss(student[chosen], teacher[chosen], image_level=False)
        torch.testing.assert_close(found, expected)
        changed = torch.where(chosen[..., None], student, -3 * student)
        after = a_gram_term(image_level=False, tokens=tokens).loss(changed, teacher, masks)
        torch.testing.assert_close(after, found)


@pytest.mark.parametrize("normalize", [True, False])
def test_gram_compares_similarities_within_each_image(normalize):
    """Written out as the paper has it, per image."""
    student, teacher = noise(3, 6, 4), noise(3, 6, 5, seed=1)
    found = a_gram_term(normalize=normalize).loss(student, teacher, torch.zeros(3, 6) > 0)
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        if normalize:
            ours = ours / ours.norm(dim=1, keepdim=True)
            theirs = theirs / theirs.norm(dim=1, keepdim=True)
        total += (ours @ ours.T - theirs @ theirs.T).square().mean().item() / 3
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_removed_negatives_count_as_no_similarity():
    """One pair of patches, similar on one side by -1 or 1/2 and on the other by -1/2 or 1/4."""

    def pair(cosine):
        sine = (1 - cosine**2) ** 0.5
        return torch.tensor([[[1.0, 0.0], [cosine, sine]]])

    def loss(ours, theirs, remove):
        masks = torch.zeros(1, 2) > 0
        return a_gram_term(remove=remove).loss(pair(ours), pair(theirs), masks).item()

    # of four entries the two beside the diagonal differ
    assert loss(-0.9, -0.5, "none") == pytest.approx(0.16 / 2)
    assert loss(-0.9, -0.5, "negatives") == pytest.approx(0, abs=1e-6)
    assert loss(-0.9, -0.5, "teacher_negatives") == pytest.approx(0, abs=1e-6)
    assert loss(-0.9, 0.5, "none") == pytest.approx(1.96 / 2)
    assert loss(-0.9, 0.5, "negatives") == pytest.approx(0.25 / 2)
    assert loss(-0.9, 0.5, "teacher_negatives") == pytest.approx(1.96 / 2)
    assert loss(0.9, -0.5, "none") == pytest.approx(1.96 / 2)
    assert loss(0.9, -0.5, "negatives") == pytest.approx(0.81 / 2)
    assert loss(0.9, -0.5, "teacher_negatives") == pytest.approx(0.81 / 2)
