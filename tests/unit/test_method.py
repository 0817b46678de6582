"""The objective of self-distillation: which terms, with which weights, seen by whom."""

import numpy as np
import pytest
import torch

from dinov3.data.masking import sample_masks
from dinov3.models.vit import ViTConfig
from dinov3.train.method import HeadShape, Network, Objective, SelfDistillation

VIT = ViTConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, num_registers=1, layerscale=0.1)
HEAD = HeadShape(num_prototypes=16, num_layers=2, hidden_dim=24, bottleneck_dim=8)
OBJECTIVE = Objective(
    dino=1.0,
    ibot=0.7,
    koleo=0.1,
    koleo_group_size=None,
    student_temperature=0.1,
    ignore_diagonal=True,
)
BATCH, NUM_LOCAL = 4, 3


def a_method(objective=OBJECTIVE):
    torch.manual_seed(0)
    student, teacher = Network(VIT, HEAD, HEAD), Network(VIT, HEAD, HEAD)
    student.reset_parameters(5.0)
    teacher.load_state_dict(student.state_dict())
    return SelfDistillation(student, teacher, objective)


@pytest.fixture
def crops():
    generator = torch.Generator().manual_seed(1)
    global_crops = torch.randn(2 * BATCH, 3, 32, 32, generator=generator)
    local_crops = torch.randn(NUM_LOCAL * BATCH, 3, 16, 16, generator=generator)
    masks = sample_masks(2 * BATCH, (4, 4), probability=0.5, ratio=(0.1, 0.5), seed=0, step=0)
    return global_crops, local_crops, torch.from_numpy(np.asarray(masks))


def test_loss_is_the_papers_weighted_sum(crops):
    """Two global pairs and 2 x 3 local ones share the DINO weight; KoLeo counts once per crop."""
    terms = a_method().losses(*crops, temperature=0.05)
    expected = (
        2 / 8 * terms["dino_global"]
        + 6 / 8 * terms["dino_local"]
        + 0.7 * terms["ibot"]
        + 0.1 * 2 * terms["koleo"]
    )
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_the_student_learns(crops):
    method = a_method()
    method.losses(*crops, temperature=0.05)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    learnt = {name for name, value in method.student.named_parameters() if value.grad is not None}
    assert learnt == {name for name, _ in method.student.named_parameters()}


def test_ibot_depends_on_masked_patches_only(crops):
    global_crops, local_crops, masks = crops
    nothing = torch.zeros_like(masks)
    terms = a_method().losses(global_crops, local_crops, nothing, temperature=0.05)
    assert terms["ibot"].item() == 0
    assert a_method().losses(*crops, temperature=0.05)["ibot"].item() > 0


def test_teacher_sees_no_mask(crops):
    """Its targets, and so the local term, stay the same when the student's masks change."""
    global_crops, local_crops, masks = crops
    with_masks = a_method().losses(global_crops, local_crops, masks, temperature=0.05)
    without = a_method().losses(global_crops, local_crops, masks & False, temperature=0.05)
    torch.testing.assert_close(with_masks["dino_local"], without["dino_local"])
    assert with_masks["dino_global"].item() != pytest.approx(without["dino_global"].item())


def test_twenty_steps_lower_the_loss(crops):
    method = a_method()
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=1e-3)
    values = []
    for _ in range(20):
        loss = method.losses(*crops, temperature=0.05)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.5
