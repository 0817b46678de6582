"""The dino.txt step learns, keeps the backbone as it is, and is exact in micro-batches."""

import copy

import pytest
import torch
from torch import nn

from dinov3.losses.contrastive import contrastive_loss, text_gram_loss
from dinov3.models.backbone import build_backbone
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.train.align import alignment_losses, backward_in_parts

NUM_PAIRS = 6
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
TEXT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "context_length": 6, "vocab_size": 32}
SUBSET = torch.tensor([3, 0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DinoTxtConfig.from_fields({"embed_dim": 64, "text": TEXT, "head_drop_path": 0.4})
    model = DinoTxt(config, build_backbone(VIT)).train()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)  # from 1e-5 the head would hardly show
    return model


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_PAIRS, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 30, (NUM_PAIRS, 6), generator=generator)
    tokens[:, 0], tokens[:, 5] = 30, 31
    return images, tokens


def seed(model, part):
    model.set_generator(torch.Generator().manual_seed(part))


def gradients(model):
    return {name: value.grad for name, value in model.trainable_parameters().items()}


def test_the_loss_is_the_weighted_sum_of_its_terms(model, pairs):
    seed(model, 0)
    losses = alignment_losses(model, *pairs, gram_weight=0.7, gram_indices=SUBSET)
    assert losses.keys() == {"loss", "contrastive", "text_gram"}
    assert losses["text_gram"].item() > 0
    torch.testing.assert_close(losses["loss"], losses["contrastive"] + 0.7 * losses["text_gram"])
    seed(model, 0)
    image, text, scale, patches, backbone_patches = model(*pairs)
    torch.testing.assert_close(losses["contrastive"], contrastive_loss(image, text, scale))
    expected = text_gram_loss(patches, backbone_patches, indices=SUBSET)
    torch.testing.assert_close(losses["text_gram"], expected)


def test_the_gram_of_dot_products_is_another(model, pairs):
    model.eval()
    cosines, products = (
        alignment_losses(model, *pairs, gram_weight=1.0, gram_normalize=flag)["text_gram"]
        for flag in (True, False)
    )
    assert products > 2 * cosines


def test_without_weight_the_gram_term_is_left_out(model, pairs):
    losses = alignment_losses(model, *pairs)
    assert losses.keys() == {"loss", "contrastive"}
    assert torch.equal(losses["loss"], losses["contrastive"])


def test_steps_bring_pairs_together_and_leave_the_backbone_alone(model, pairs):
    before = copy.deepcopy(model.visual_model.backbone.state_dict())
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=2e-3)
    first = None
    for step in range(20):
        seed(model, step)
        loss = alignment_losses(model, *pairs)["loss"]
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale()
    assert loss.item() < 0.5 * first
    after = model.visual_model.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_parts_give_the_gradients_of_the_whole_batch(model, pairs, weight):
    whole, parted = model.eval(), copy.deepcopy(model)  # nothing is dropped: the same features
    options = {"gram_weight": weight, "gram_indices": SUBSET}
    expected = alignment_losses(whole, *pairs, **options)
    expected["loss"].backward()
    sizes = [1, 3, 2]
    parts = list(zip(*(each.split(sizes) for each in pairs), strict=True))
    losses = backward_in_parts(parted, parts, seed_part=lambda part: None, **options)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=0, atol=1e-6)
    ours = gradients(parted)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_both_passes_over_a_part_drop_the_same_residuals(model, pairs):
    parts = list(zip(*(each.split(2) for each in pairs), strict=True))
    losses = backward_in_parts(model, parts, seed_part=lambda part: seed(model, part))
    expected, features = copy.deepcopy(model), []
    expected.zero_grad()
    for part, each in enumerate(parts):
        seed(expected, part)
        features.append(expected(*each)[:2])
    images, texts = (torch.cat(each) for each in zip(*features, strict=True))
    loss = contrastive_loss(images, texts, expected.logit_scale.exp())
    loss.backward()
    torch.testing.assert_close(losses["loss"], loss.detach(), rtol=0, atol=1e-6)
    ours = gradients(model)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
