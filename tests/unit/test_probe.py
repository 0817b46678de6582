"""Pictures for TensorBoard show what they are made of."""

import torch

from dinov3.data import colour
from dinov3.models.backbone import build_backbone
from dinov3.train.probe import gallery, patch_colours
from tests.small_training import VIT


def test_gallery_shows_the_crops_in_rows_of_eight():
    crops = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    grid = gallery(colour.normalize(colour.to_planes(crops), mean, std), mean, std)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * 4, 8 * 4)
    assert torch.equal(grid[:, :4, 4:8], crops[1])
    assert torch.equal(grid[:, 4:, 4:8], crops[9])
    assert grid[:, 4:, 8:].max() == 0


def test_patches_that_are_not_finite_are_grey_beneath_their_picture():
    backbone = build_backbone(VIT).eval()
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert patch_colours(backbone, pictures)[:, 32:].unique().numel() > 2
        backbone.norm.weight.fill_(torch.inf)
    shown = patch_colours(backbone, pictures)
    assert shown.shape == (3, 64, 64)
    assert shown[:, 32:].unique().tolist() == [127]
    assert shown[:, :32].unique().numel() > 2
