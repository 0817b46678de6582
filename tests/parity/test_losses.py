"""Losses and Sinkhorn equal the reference's stored numbers; where it errs, the right ones."""

import numpy as np
import pytest
import torch

from dinov3.errors import ConfigError
from dinov3.losses.dino import dino_loss
from dinov3.losses.gram import gram_loss
from dinov3.losses.ibot import ibot_loss, mask_weights
from dinov3.losses.koleo import koleo_loss
from dinov3.losses.sinkhorn import sinkhorn_knopp
from tests.golden_numbers import GOLDEN, assert_matches, inp

TOLERANCE = {"abs": 1e-5, "rel": 0}


def inp2(*shape: int) -> torch.Tensor:
    steps = np.arange(np.prod(shape), dtype=np.float64)
    values = np.sin(1.7 * steps) + np.cos(0.013 * steps**2)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def noise(shape: tuple[int, ...], *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


STUDENT = inp(3, 4, 32)
TEACHER_LOGITS = 0.5 * inp(2, 4, 32)
GRAM_STUDENT = inp2(2, 6, 16)
GRAM_TEACHER = inp2(2, 6, 16).flip(1) * 0.7 + 0.1


@pytest.fixture(scope="module")
def targets() -> torch.Tensor:
    probs = sinkhorn_knopp(TEACHER_LOGITS.flatten(0, 1), temperature=0.07)
    return probs.unflatten(0, (2, 4))


def test_sinkhorn_targets_of_both_crops_match(targets):
    assert_matches(targets, GOLDEN["dino"]["sinkhorn"])


def test_sinkhorn_targets_of_patches_match():
    probs = sinkhorn_knopp(0.5 * inp(8, 32), temperature=0.07)
    assert_matches(probs, GOLDEN["ibot"]["sinkhorn"])


def test_dino_on_local_crops_matches(targets):
    assert dino_loss(STUDENT, targets).item() == pytest.approx(GOLDEN["dino"]["local"], **TOLERANCE)


@pytest.mark.parametrize(("key", "ignore"), [("glob", False), ("glob_ignore", True)])
def test_dino_on_global_crops_matches(targets, key, ignore):
    loss = dino_loss(STUDENT[:2], targets, ignore_diagonal=ignore)
    assert loss.item() == pytest.approx(GOLDEN["dino"][key], **TOLERANCE)


def test_dino_agrees_with_cross_entropy_of_every_pair(targets):
    pairs = [
        torch.nn.functional.cross_entropy(student / 0.1, target)
        for s, student in enumerate(STUDENT)
        for t, target in enumerate(targets)
        if s != t
    ]
    loss = dino_loss(STUDENT, targets, ignore_diagonal=True)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_dino_without_any_pair_is_refused(targets):
    with pytest.raises(ConfigError, match="ignore_diagonal: leaves no pair"):
        dino_loss(STUDENT[:1], targets[:1], ignore_diagonal=True)


def masks_of_ibot() -> torch.Tensor:
    masks = torch.zeros(4, 10, dtype=torch.bool)
    masks[0, :3] = True
    masks[2, 4:9] = True
    return masks


def test_ibot_matches():
    masks = masks_of_ibot()
    targets = sinkhorn_knopp(0.5 * inp(8, 32), temperature=0.07)
    loss = ibot_loss(inp(8, 32), targets, mask_weights(masks), num_images=4)
    assert loss.item() == pytest.approx(GOLDEN["ibot"]["loss"], **TOLERANCE)


def test_every_masked_image_counts_the_same():
    masks = masks_of_ibot()
    weights = mask_weights(masks)
    image_of_patch = masks.nonzero()[:, 0]
    totals = torch.zeros(4).index_add(0, image_of_patch, weights)
    torch.testing.assert_close(totals, torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_ibot_without_masked_patches_is_zero_and_differentiable():
    logits = torch.zeros(0, 32, requires_grad=True)
    weights = mask_weights(torch.zeros(4, 10, dtype=torch.bool))
    loss = ibot_loss(logits, torch.zeros(0, 32), weights, num_images=4)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


@pytest.mark.parametrize("cls", ["koleo", "koleo2"])
@pytest.mark.parametrize(("key", "topk"), [("plain", 1), ("dist_top3", 3)])
def test_koleo_matches(cls, key, topk):
    features = inp(6, 16) if cls == "koleo" else inp2(6, 16)
    assert koleo_loss(features, topk=topk).item() == pytest.approx(GOLDEN[cls][key], **TOLERANCE)


def test_koleo_looks_for_neighbours_within_groups_only():
    features = noise((12, 8))
    apart = torch.stack([koleo_loss(part) for part in features.split(4)]).mean()
    torch.testing.assert_close(koleo_loss(features, group_size=4), apart)
    assert not torch.isclose(koleo_loss(features), apart)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 4}, "group_size: must divide the batch of 6, got 4"),
        ({"group_size": 0}, "group_size: must divide the batch of 6, got 0"),
        ({"group_size": 1}, "topk: a group of 1 has 0 neighbours"),
        ({"topk": 6}, "topk: a group of 6 has 5 neighbours to choose from, got 6"),
        ({"topk": 0}, "topk: a group of 6 has 5 neighbours to choose from, got 0"),
    ],
)
def test_impossible_koleo_groups_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        koleo_loss(inp2(6, 16), **arguments)


def test_koleo_of_equal_features_is_large_with_finite_gradient():
    features = torch.ones(4, 8, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() > 15
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("level", ["img", "batch"])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("norm", {}),
        ("nonorm", {"normalize": False}),
        ("rmneg", {"remove_negatives": True}),
    ],
)
def test_gram_matches(key, options, level):
    loss = gram_loss(GRAM_STUDENT, GRAM_TEACHER, image_level=level == "img", **options)
    assert loss.item() == pytest.approx(GOLDEN["gram"][key][level], abs=2e-6, rel=1e-6)


@pytest.mark.parametrize(("image_level", "right"), [(True, 0.01646), (False, 0.02013)])
def test_removing_the_teachers_negatives_reaches_the_student(image_level, right):
    loss = gram_loss(
        GRAM_STUDENT, GRAM_TEACHER, image_level=image_level, remove_teacher_negatives=True
    )
    wrong = GOLDEN["gram"]["rmtneg"]["img" if image_level else "batch"]
    assert loss.item() == pytest.approx(right, abs=1e-5)
    assert abs(loss.item() - wrong) > 0.03


def test_gram_takes_selected_patches():
    loss = gram_loss(GRAM_STUDENT.flatten(0, 1), GRAM_TEACHER.flatten(0, 1), image_level=False)
    assert loss.item() == pytest.approx(GOLDEN["gram"]["norm"]["batch"], **TOLERANCE)


def test_gram_is_zero_for_a_rotated_student_and_not_for_shuffled_patches():
    rotation = torch.linalg.qr(noise((16, 16)).float()).Q
    assert gram_loss(GRAM_STUDENT @ rotation, GRAM_STUDENT).item() < 1e-10
    assert gram_loss(GRAM_STUDENT.roll(1, dims=1), GRAM_STUDENT).item() > 1e-3


def test_both_kinds_of_removal_are_refused():
    with pytest.raises(ConfigError, match="gram: at most one kind of negatives"):
        gram_loss(GRAM_STUDENT, GRAM_TEACHER, remove_negatives=True, remove_teacher_negatives=True)


def test_different_patch_grids_are_refused():
    with pytest.raises(ConfigError, match="gram: student and teacher patches differ"):
        gram_loss(GRAM_STUDENT, GRAM_TEACHER[:, :4])


def test_gradients_agree_with_finite_differences():
    logits = noise((3, 2, 5)).requires_grad_()
    targets = noise((2, 2, 5), seed=1).softmax(-1)
    weights = torch.tensor([0.5, 1.0], dtype=torch.float64)
    cls = noise((6, 4), seed=2).requires_grad_()
    patches = noise((2, 4, 3), seed=3).requires_grad_()
    teacher = noise((2, 4, 5), seed=4)
    check = torch.autograd.gradcheck
    assert check(lambda x: dino_loss(x, targets, ignore_diagonal=True), [logits])
    assert check(lambda x: ibot_loss(x[0], targets[0], weights, 4), [logits])
    assert check(lambda x: koleo_loss(x, topk=2, group_size=3), [cls])
    assert check(lambda x: gram_loss(x, teacher, remove_teacher_negatives=True), [patches])


def test_autocast_does_not_lower_the_precision_of_losses(targets):
    def all_losses() -> torch.Tensor:
        return torch.stack(
            [
                dino_loss(STUDENT, targets),
                ibot_loss(inp(8, 32), targets.flatten(0, 1), torch.ones(8), 8),
                koleo_loss(inp2(6, 16)),
                gram_loss(GRAM_STUDENT, GRAM_TEACHER),
            ]
        )

    plain = all_losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = all_losses()
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
