"""dino.txt equals the reference's stored numbers, and has the names of the published model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dinov3 import hub
from dinov3.losses.contrastive import text_gram_loss
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.models.text import TextConfig
from dinov3.models.vit import build_vit
from tests.golden_numbers import assert_matches, inp

FOLDER = Path(__file__).parents[1] / "golden"
HEADS = json.loads((FOLDER / "GOLDEN_HEADS.json").read_text(encoding="utf-8"))
GOLDEN = HEADS["dinotxt"]
PUBLISHED = json.loads((FOLDER / "STATE_DICTS.json").read_text(encoding="utf-8"))[
    "HEAD:dinov3_vitl16_dinotxt(minus visual_model.backbone)"
]
BACKBONE = "visual_model.backbone."
IMAGES = inp(2, 3, 64, 64)
TOKENS = torch.zeros(2, 12, dtype=torch.long)
TOKENS[0, :5] = torch.tensor([48, 3, 4, 5, 49])
TOKENS[1, :3] = torch.tensor([48, 7, 49])


def fill_procedurally(module: nn.Module, *, without: str | None = None) -> None:
    """Write the weights that the stored numbers were made with."""
    state = module.state_dict()
    names = sorted(name for name in state if not without or not name.startswith(without))
    for index, name in enumerate(names):
        if name.endswith(("periods", "bias_mask")):
            continue
        values = 0.05 * np.sin(0.37 * np.arange(state[name].numel()) + 0.11 * index)
        if state[name].ndim == 1 and "norm" in name and name.endswith("weight"):
            values = values + 1.0
        if name.endswith("gamma"):
            values = values + 0.5
        state[name].copy_(torch.from_numpy(values).reshape(state[name].shape))


@pytest.fixture(scope="module")
def model() -> DinoTxt:
    backbone = build_vit(embed_dim=64, depth=4, num_heads=2, rope_rescale=2.0)
    text = TextConfig(embed_dim=48, depth=2, num_heads=4, context_length=12, vocab_size=50)
    model = DinoTxt(DinoTxtConfig(embed_dim=128, text=text), backbone).eval()
    fill_procedurally(backbone)
    fill_procedurally(model, without=BACKBONE)
    return model


@pytest.fixture(scope="module")
def outputs(model):
    with torch.no_grad():
        return dict(
            zip(["img", "txt", "logit", "patch", "bpatch"], model(IMAGES, TOKENS), strict=True)
        )


def test_state_dict_has_the_stored_keys(model):
    state = model.state_dict()
    ours = [[k, list(v.shape)] for k, v in state.items() if not k.startswith(BACKBONE)]
    assert sorted(ours) == GOLDEN["keys"]


@pytest.mark.parametrize("key", ["img", "txt", "logit", "patch", "bpatch"])
def test_forward_matches(outputs, key):
    assert_matches(outputs[key], GOLDEN[key])


@torch.no_grad()
def test_logits_match(model):
    logits, transposed = model.get_logits(IMAGES, TOKENS)
    assert_matches(logits, GOLDEN["logits"])
    assert torch.equal(transposed, logits.T)


@torch.no_grad()
def test_encoders_are_the_unnormalised_forward(model, outputs):
    image, patches, backbone_patches = model.encode_image_with_patch_tokens(IMAGES)
    assert torch.equal(patches, outputs["patch"])
    assert torch.equal(backbone_patches, outputs["bpatch"])
    torch.testing.assert_close(image[:, 64:], patches.mean(1))
    torch.testing.assert_close(nn.functional.normalize(image), outputs["img"])
    assert torch.equal(model.encode_image(IMAGES, normalize=True), outputs["img"])
    text = model.encode_text(TOKENS)
    torch.testing.assert_close(nn.functional.normalize(text), outputs["txt"])
    assert torch.equal(model.encode_text(TOKENS, normalize=True), outputs["txt"])


def test_text_gram_matches(outputs):
    loss = text_gram_loss(outputs["patch"], outputs["bpatch"])
    assert loss.item() == pytest.approx(HEADS["text_gram"], abs=1e-7, rel=0)


def published_model() -> DinoTxt:
    backbone = hub.dinov3_vitl16(pretrained=False, device="meta")
    text = TextConfig(embed_dim=1280, depth=24, num_heads=20)
    return DinoTxt(DinoTxtConfig(embed_dim=2048, text=text), backbone, device="meta")


def test_published_names_shapes_and_order():
    state = published_model().state_dict()
    ours = [[k, list(v.shape)] for k, v in state.items() if not k.startswith(BACKBONE)]
    assert ours == PUBLISHED
    assert len(ours) == 302


def test_published_parameter_count():
    parts = published_model().trainable()
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()}
    stored = {
        part: sum(math.prod(shape) for name, shape in PUBLISHED if name.startswith(part))
        for part in counts
    }
    assert counts == stored
    assert counts["visual_model.head"] == pytest.approx(25.3e6, rel=2e-3)
    text = counts["text_model.backbone"] + counts["text_model.head"]
    assert text == pytest.approx(538.1e6, rel=2e-4)
    assert sum(counts.values()) + 1 == pytest.approx(563.46e6, rel=2e-5)


def test_trainable_parameters_are_the_published_names():
    names = list(published_model().trainable_parameters())
    assert names == [name for name, _ in PUBLISHED]
