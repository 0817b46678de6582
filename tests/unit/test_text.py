"""The text tower, and dino.txt as a whole over a frozen backbone of either family."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov3.config.text import AlignmentModel, TextModel
from dinov3.errors import ConfigError, DataError
from dinov3.models.backbone import build_backbone
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.models.text import TextConfig, TextTransformer

TEXT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "context_length": 8, "vocab_size": 64}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "drop_path": 0.5}
CONVNEXT = {"arch": "convnext", "depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
TOKENS = torch.tensor([[62, 5, 9, 63, 0, 0, 0, 0], [62, 7, 7, 7, 7, 7, 7, 63]])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = noise(2, 3, 32, 48)


def build_text(**changes):
    torch.manual_seed(0)
    return TextTransformer(TextConfig(**{**TEXT, **changes})).eval()


def build_model(backbone=VIT, embed_dim=64, text=TEXT, **changes):
    torch.manual_seed(0)
    config = DinoTxtConfig.from_fields({"embed_dim": embed_dim, "text": text, **changes})
    return DinoTxt(config, build_backbone(backbone)).eval()


def strengthen(model):
    """Give the head's residuals a weight that shows; they begin at 1e-5."""
    for name, parameter in model.visual_model.head.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    return model


@torch.no_grad()
def test_a_token_sees_only_those_before_it():
    encoder = build_text().backbone
    changed = TOKENS.clone()
    changed[:, 4] = 33
    before, after = encoder(TOKENS), encoder(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


@torch.no_grad()
def test_without_causality_a_token_sees_all():
    encoder = build_text(causal=False).backbone
    changed = TOKENS.clone()
    changed[:, 4] = 33
    assert (encoder(TOKENS) != encoder(changed)).any(-1).all()


@torch.no_grad()
def test_what_follows_the_end_of_a_caption_does_not_matter():
    model = build_text()
    whole, cut = model(TOKENS[:1]), model(TOKENS[:1, :4])
    torch.testing.assert_close(whole, cut)


@torch.no_grad()
def test_the_order_of_words_matters():
    swapped = TOKENS[:1, [0, 2, 1, 3]]
    assert not torch.allclose(build_text()(TOKENS[:1, :4]), build_text()(swapped), atol=1e-4)


@pytest.mark.parametrize(
    ("pooler", "places"), [("first", [0, 0]), ("last", [7, 7]), ("argmax", [3, 7])]
)
@torch.no_grad()
def test_the_pooler_chooses_the_token(pooler, places):
    model = build_text(pooler=pooler, out_dim=12)
    expected = model.head(model.backbone(TOKENS))[[0, 1], places]
    torch.testing.assert_close(model(TOKENS), expected)
    assert model(TOKENS).shape == (2, 12)


def test_without_an_out_dim_nothing_is_projected():
    assert build_text()(TOKENS).shape == (2, 32)
    assert not list(build_text().head.parameters())


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    config = TextConfig(embed_dim=256, depth=2, num_heads=4, vocab_size=512, out_dim=128)
    state = TextTransformer(config).state_dict()
    branch = 256**-0.5 / 2  # two blocks: (2 * 2) ** -0.5
    block = "backbone.blocks.1."
    for name, spread in {
        "backbone.token_embedding.weight": 0.02,
        "backbone.positional_embedding": 0.01,
        f"{block}attention.qkv.weight": 256**-0.5,
        f"{block}attention.proj.weight": branch,
        f"{block}feed_forward.fc1.weight": 512**-0.5,
        f"{block}feed_forward.fc2.weight": branch,
        "head.linear_projection.weight": 256**-0.5,
    }.items():
        assert state[name].std().item() == pytest.approx(spread, rel=0.02), name
    assert not state[f"{block}attention.proj.bias"].any()
    assert state[f"{block}feed_forward.fc1.bias"].abs().max() <= 256**-0.5
    assert state[f"{block}feed_forward.fc1.bias"].any()
    assert torch.equal(state["backbone.ln_final.weight"], torch.ones(256))


def test_reset_after_to_empty_draws_the_same_weights():
    model = build_text(out_dim=12)
    other = TextTransformer(model.config, device="meta").to_empty(device="cpu")
    for each in (model, other):
        torch.manual_seed(3)
        each.reset_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("tokens", [torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 0).long()])
def test_captions_of_another_length_are_refused(tokens):
    with pytest.raises(DataError, match=r"tokens: must be \[captions, 1 to 8 ids\], got \(1, "):
        build_text()(tokens)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depth": 0}, "depth: must be at least 1, got 0"),
        ({"out_dim": 0}, "out_dim: must be at least 1, got 0"),
        ({"num_heads": 3}, "embed_dim: must be a multiple of num_heads = 3, got 32"),
        ({"ffn_ratio": 0.0}, r"ffn_ratio: must be positive, got 0\.0"),
        ({"pooler": "mean"}, "pooler: must be one of first, last, argmax, got 'mean'"),
        ({"depth": "2"}, "model: .* Correct the field"),
        (
            {"num_head": 2},
            "num_head: no such field of a text tower, got 2. Did you mean num_heads?",
        ),
    ],
)
def test_impossible_text_towers_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        TextConfig.from_fields({**TEXT, **changes})


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="depth: missing from a text tower, got embed_dim"):
        TextConfig.from_fields({"embed_dim": 32, "num_heads": 2})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_head_blocks": -1}, "num_head_blocks: must not be negative, got -1"),
        ({"head_drop_path": 1.0}, r"head_drop_path: must lie in \[0, 1\), got 1\.0"),
        ({"head_ffn_ratio": 0.0}, r"head_ffn_ratio: must be positive, got 0\.0"),
        ({"head_num_heads": 0}, "head_num_heads: must be at least 1 or null, got 0"),
        ({"pooler": "median"}, "pooler: must be one of mean, max, got 'median'"),
        ({"embed_dim": 63}, "embed_dim: must be a multiple of 2, got 63"),
        ({"text": {**TEXT, "out_dim": 8}}, "text.out_dim: must be null or embed_dim = 64, got 8"),
        ({"text": {**TEXT, "poler": "last"}}, "poler: no such field .* Did you mean pooler"),
        (
            {"num_headblocks": 1},
            "num_headblocks: no such field of a dino.txt model, got 1. Did you",
        ),
        (
            {"use_class_token": False, "use_patch_tokens": False},
            "use_patch_tokens: must be true where use_class_token is false, got False",
        ),
    ],
)
def test_impossible_models_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        DinoTxtConfig.from_fields({"embed_dim": 64, "text": TEXT, **changes})


def test_heads_of_attention_that_do_not_divide_the_backbone_are_refused():
    with pytest.raises(ConfigError, match="head_num_heads: must divide the backbone's width 32"):
        build_model(head_num_heads=3)


def test_every_field_of_a_recipe_is_a_field_of_the_model():
    fields = {field.name for field in dataclasses.fields(DinoTxtConfig)}
    assert set(AlignmentModel.model_fields) <= fields
    assert set(TextModel.model_fields) <= {field.name for field in dataclasses.fields(TextConfig)}


@pytest.mark.parametrize("backbone", [VIT, CONVNEXT], ids=["vit", "convnext"])
@torch.no_grad()
def test_both_families_of_backbones_are_encoded(backbone):
    model = build_model(backbone, embed_dim=24)
    stride, width = model.visual_model.backbone.stride, model.visual_model.backbone.embed_dim
    num_patches = (64 // stride) * (96 // stride)
    features, patches, backbone_patches = model.encode_image_with_patch_tokens(noise(2, 3, 64, 96))
    assert features.shape == (2, 24)
    assert patches.shape == (2, num_patches, 12)
    assert backbone_patches.shape == (2, num_patches, width)
    assert model.encode_text(TOKENS).shape == (2, 24)


@torch.no_grad()
def test_without_blocks_the_feature_is_the_backbones_cls_and_mean_patch():
    model = build_model(num_head_blocks=0)
    features, patches, backbone_patches = model.encode_image_with_patch_tokens(IMAGES)
    plain = model.visual_model.backbone.forward_features(IMAGES)
    assert not list(model.visual_model.head.parameters())
    torch.testing.assert_close(features[:, :32], plain["x_norm_clstoken"])
    torch.testing.assert_close(features[:, 32:], plain["x_norm_patchtokens"].mean(1))
    assert torch.equal(patches, backbone_patches)


@torch.no_grad()
def test_a_part_alone_is_the_whole_feature():
    both = build_model().encode_image(IMAGES)
    cls = build_model(embed_dim=32, use_patch_tokens=False).encode_image(IMAGES)
    model = build_model(embed_dim=32, use_class_token=False, pooler="max")
    highest, patches, _ = model.encode_image_with_patch_tokens(IMAGES)
    torch.testing.assert_close(cls, both[:, :32])
    assert torch.equal(highest, patches.amax(1))


@torch.no_grad()
def test_the_head_lets_tokens_of_an_image_meet_and_no_others():
    model = strengthen(build_model())
    together = model.encode_image(IMAGES)
    torch.testing.assert_close(model.encode_image(IMAGES[1:]), together[1:])
    head, tokens = model.visual_model.head, noise(1, 5, 32)
    changed = tokens.clone()
    changed[:, 4] = noise(32, seed=1)
    assert (head(tokens) != head(changed)).any(-1).all()


def test_the_backbone_is_never_in_training_mode():
    model = build_model()
    backbone = model.visual_model.backbone
    model.train()
    assert model.text_model.training
    assert model.visual_model.head.training
    assert not any(module.training for module in backbone.modules())
    model.visual_model.train()
    assert not any(module.training for module in backbone.modules())
    backbone.train()
    model.encode_image(IMAGES)
    assert not any(module.training for module in backbone.modules())


def test_gradients_reach_everything_but_the_backbone():
    model = strengthen(build_model()).train()
    assert not any(each.requires_grad for each in model.visual_model.backbone.parameters())
    model.requires_grad_(True)  # even so
    image, text, scale, patches, backbone_patches = model(IMAGES, TOKENS)
    assert not backbone_patches.requires_grad
    (scale * (image * text * noise(64)).sum() + patches.square().sum()).sum().backward()
    assert all(each.grad is None for each in model.visual_model.backbone.parameters())
    untouched = {
        name
        for name, parameter in model.trainable_parameters().items()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert untouched == set()


def test_trainable_parts_and_the_scale_are_all_but_the_backbone():
    model = build_model()
    parts = {
        f"{prefix}.{name}": parameter
        for prefix, part in model.trainable().items()
        for name, parameter in part.named_parameters()
    }
    names = {"logit_scale": model.logit_scale, **parts}
    assert model.trainable_parameters().keys() == names.keys()
    assert all(model.trainable_parameters()[name] is names[name] for name in names)
    frozen = {f"visual_model.backbone.{n}" for n, _ in build_backbone(VIT).named_parameters()}
    assert {n for n, _ in model.named_parameters()} == names.keys() | frozen


def test_building_leaves_the_weights_of_the_backbone_alone():
    backbone = build_backbone(VIT)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = DinoTxt(build_model().config, backbone)
    model.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_stochastic_depth_draws_from_the_given_generator():
    model = strengthen(build_model(head_drop_path=0.5)).train()
    images = noise(8, 3, 16, 16)

    def features(seed, unrelated):
        model.set_generator(torch.Generator().manual_seed(seed))
        torch.manual_seed(unrelated)
        return model.encode_image(images).detach()

    first = features(0, unrelated=1)
    assert all(torch.equal(features(0, unrelated=other), first) for other in range(2, 6))
    assert any(not torch.equal(features(seed, unrelated=1), first) for seed in range(1, 5))


def test_the_initial_temperature_is_that_of_clip_and_stays_within_bounds():
    model = build_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        nn.init.constant_(model.logit_scale, value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(kept)
    assert build_model(init_logit_scale=1.5).logit_scale.item() == 1.5


@torch.no_grad()
def test_unit_features_are_of_unit_length_in_half_precision_too():
    model = build_model().bfloat16()
    for unit in (
        model.encode_image(IMAGES.bfloat16(), normalize=True),
        model.encode_text(TOKENS, normalize=True),
    ):
        assert unit.dtype == torch.float32
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))


@torch.no_grad()
def test_logits_are_scaled_cosines():
    model = build_model()
    logits, of_captions = model.get_logits(IMAGES, TOKENS)
    image, text = model.encode_image(IMAGES), model.encode_text(TOKENS)
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(logits, cosines / 0.07)
    assert torch.equal(of_captions, logits.T)


def test_the_model_is_built_without_memory_on_the_meta_device():
    config = DinoTxtConfig(embed_dim=64, text=TextConfig(**TEXT))
    model = DinoTxt(config, build_backbone(VIT, device="meta"), device="meta")
    assert all(each.is_meta for each in [*model.parameters(), *model.buffers()])
    image, text, *_ = model(IMAGES.to("meta"), TOKENS.to("meta"))
    assert image.shape == text.shape == (2, 64)
