"""The objective of self-distillation: which terms, with which weights, seen by whom."""

from dataclasses import replace

import pytest
import torch

from dinov3.train.objective import Weights
from tests.small_training import NUM_LOCAL, a_learner, a_method, a_share, copy_of, cut_share

TEMPERATURE = 0.05


@pytest.fixture
def share():
    return a_share()


def terms_of(method, *shares, weights=None):
    """All terms of a step and their sum, with gradients left on the student."""
    weights = weights or Weights()
    return method.backward(0, shares, method.targets(shares, TEMPERATURE), weights)


def gradients_of(method):
    return {name: value.grad.clone() for name, value in method.student.named_parameters()}


def test_loss_is_the_papers_weighted_sum(share):
    """Two global pairs and 2 x 3 local ones share the DINO weight; KoLeo counts once per crop."""
    terms = terms_of(a_method(), share)
    expected = (
        2 / 8 * terms["dino_global"]
        + 6 / 8 * terms["dino_local"]
        + 0.7 * terms["ibot"]
        + 0.1 * 2 * terms["koleo"]
    )
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_scheduled_weight_counts_for_local_crops_alone(share):
    terms = terms_of(a_method(), share, weights=Weights(local=0.5))
    expected = (
        2 / 8 * terms["dino_global"]
        + 0.5 * 6 / 8 * terms["dino_local"]
        + 0.7 * terms["ibot"]
        + 0.1 * 2 * terms["koleo"]
    )
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_the_student_learns(share):
    method = a_method()
    terms_of(method, share)
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    learnt = {name for name, value in method.student.named_parameters() if value.grad is not None}
    assert learnt == {name for name, _ in method.student.named_parameters()}


def test_ibot_depends_on_masked_patches_only(share):
    nothing = replace(share, masks=torch.zeros_like(share.masks))
    assert terms_of(a_method(), nothing)["ibot"].item() == 0
    assert terms_of(a_method(), share)["ibot"].item() > 0


def test_teacher_sees_no_mask(share):
    """Its targets, and so the local term, stay the same when the student's masks change."""
    with_masks = terms_of(a_method(), share)
    without = terms_of(a_method(), replace(share, masks=share.masks & False))
    torch.testing.assert_close(with_masks["dino_local"], without["dino_local"])
    assert with_masks["dino_global"].item() != pytest.approx(without["dino_global"].item())


def test_a_student_of_a_frozen_teacher_sees_its_crops_whole(share):
    """Masks still say where iBOT looks, and change nothing else."""
    method = a_method(masks_input=False)
    other = replace(share, masks=share.masks.flip(0))
    targets = method.targets([share], TEMPERATURE)
    terms, changed = (method.predictions(0, one) for one in (share, other))
    torch.testing.assert_close(terms.cls_logits, changed.cls_logits, rtol=0, atol=0)
    torch.testing.assert_close(terms.patches, changed.patches, rtol=0, atol=0)
    masked = a_method().predictions(0, share)
    assert not torch.allclose(terms.patches, masked.patches)
    assert targets[0].patches.shape[0] == share.masks.sum()


def test_twenty_steps_lower_the_loss(share):
    method = a_method(learner=a_learner(momentum=1.0))
    values = [method.step(step, [share]).numbers["loss"] for step in range(20)]
    assert values[-1] < values[0] - 0.5


@pytest.mark.parametrize("group_size", [None, 2, 4, 8])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_micro_batches_give_the_terms_and_gradients_of_the_whole_batch(num_parts, group_size):
    """Sinkhorn and KoLeo reach over all of them, whatever the groups."""
    share = a_share(batch=8)
    whole, parted = a_method(koleo_group_size=group_size), a_method(koleo_group_size=group_size)
    expected = terms_of(whole, share)
    found = terms_of(parted, *cut_share(share, num_parts))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(gradients_of(parted), gradients_of(whole), rtol=1e-4, atol=1e-6)


def test_rehearsing_changes_nothing_but_gradients(share):
    method = a_method()
    before = copy_of(method.learner.tensors())
    method.rehearse([share], TEMPERATURE)
    torch.testing.assert_close(method.learner.tensors(), before, rtol=0, atol=0)


def test_predictions_hold_every_crop_of_every_image(share):
    found = a_method().predictions(0, share)
    assert found.cls_logits.shape == (2 + NUM_LOCAL, share.num_images, 16)
    assert found.patch_logits.shape == (share.masks.sum(), 16)
    assert found.global_cls.shape == (2, share.num_images, 32)
    assert found.patches.shape == (2 * share.num_images, 16, 32)


def test_terms_over_micro_batches_are_of_the_features_that_the_losses_see():
    """Stochastic depth and RoPE augmentation draw the same in both passes over a micro-batch."""
    method = a_method(learner=a_learner(drop_path=0.5, rope_jitter=2.0))
    shares = cut_share(a_share(batch=8), 2)
    cls, patches = method._features_of_global_crops(3, shares)
    for number, share in enumerate(shares):
        predictions = method.predictions(3, share)
        torch.testing.assert_close(cls[number], predictions.global_cls.detach())
        torch.testing.assert_close(patches[number], predictions.patches.detach())


def test_micro_batches_share_rope_augmentation_and_not_stochastic_depth():
    """Equal crops at two places of a batch: what is drawn by place differs, by step does not."""

    def features(position, **model):
        method = a_method(learner=a_learner(**model))
        return method.predictions(3, replace(a_share(batch=8), position=position)).global_cls

    torch.testing.assert_close(features(0, rope_jitter=2.0), features(8, rope_jitter=2.0))
    assert not torch.allclose(features(0, rope_jitter=2.0), features(0))
    assert not torch.allclose(features(0, drop_path=0.5), features(8, drop_path=0.5))
    torch.testing.assert_close(features(8, drop_path=0.5), features(8, drop_path=0.5))
