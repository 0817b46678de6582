"""The promises of the ConvNeXt, and of building either family, that stored numbers do not cover."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.errors import ConfigError, DataError
from dinov3.models.backbone import Backbone, backbone_config, build_backbone
from dinov3.models.convnext import ConvBlock, ConvNeXt, ConvNeXtConfig, build_convnext
from dinov3.models.vit import VisionTransformer, ViTConfig

TINY: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [4, 8, 12, 16], "layerscale": 0.5}
VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def tiny(**fields: Any) -> ConvNeXt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_convnext(**{**TINY, **fields})
        for parameter in model.parameters():  # far enough from zero for every branch to count
            nn.init.normal_(parameter, std=0.3)
    return model


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = pictures(3, 3, 64, 96)
LOCAL = pictures(4, 3, 32, 32, seed=1)


def cls_with_seed(model: ConvNeXt, seed: int) -> torch.Tensor:
    model.set_generator(torch.Generator().manual_seed(seed))
    return model(X).detach()


def test_drops_are_a_function_of_the_generator():
    model = tiny(drop_path=0.5).train()
    first = cls_with_seed(model, 3)
    torch.manual_seed(99)  # the default generator plays no part
    assert torch.equal(cls_with_seed(model, 3), first)
    assert not torch.equal(cls_with_seed(model, 4), first)


def test_drops_without_a_generator_follow_the_default_one():
    model = tiny(drop_path=0.5).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = model(X)
        second = model(X)
        torch.manual_seed(5)
        assert torch.equal(model(X), first)
    assert not torch.equal(first, second)


def test_evaluation_drops_nothing():
    model = tiny(drop_path=0.9).eval()
    torch.testing.assert_close(model(X), tiny(drop_path=0.0).train()(X))
    assert torch.equal(model.train().eval()(X), model(X))


def test_share_of_dropped_images_grows_linearly_and_keeps_the_mean():
    model = tiny(drop_path=0.4).train()
    model.set_generator(torch.Generator().manual_seed(0))
    factors = torch.stack(list(model._draw_kept(torch.empty(20_000, 3, 1, 1)))).flatten(1)
    expected = torch.linspace(0, 0.4, 5)
    assert factors.shape == (5, 20_000)
    torch.testing.assert_close((factors == 0).float().mean(1), expected, rtol=0, atol=0.015)
    torch.testing.assert_close(factors.mean(1), torch.ones(5), rtol=0, atol=0.02)
    kept = factors.amax(1)
    torch.testing.assert_close(kept, 1 / (1 - expected))


def test_a_dropped_image_keeps_its_map_and_the_others_do_not_notice():
    block = ConvBlock(4, layerscale=0.5)
    nn.init.constant_(block.gamma, 1.0)
    x = pictures(3, 4, 5, 6)
    kept = torch.tensor([1.0, 0.0, 2.0])[:, None, None, None]
    output = block(x, kept)
    assert torch.equal(output[1], x[1])
    torch.testing.assert_close(output[0], block(x)[0])
    torch.testing.assert_close(output[2] - x[2], 2 * (block(x)[2] - x[2]))


def test_each_image_is_computed_alone():
    model = tiny().eval()
    torch.testing.assert_close(model(X)[1:2], model(X[1:2]), rtol=1e-5, atol=1e-5)


def test_features_have_the_documented_shapes():
    features = tiny()(X, is_training=True)
    shapes = {name: value.shape for name, value in features.items() if value is not None}
    assert shapes == {
        "x_norm_clstoken": (3, 16),
        "x_storage_tokens": (3, 0, 16),
        "x_norm_patchtokens": (3, 6, 16),
        "x_prenorm": (3, 6, 16),
    }
    assert features["masks"] is None


def test_positions_are_in_reading_order():
    model = tiny().eval()
    changed = X.clone()
    changed[:, :, 56:, 88:] += 5.0  # the lower right corner
    before, after = (model.forward_features(x)["x_prenorm"] for x in (X, changed))
    assert (after - before).abs().amax(-1).argmax(1).tolist() == [5, 5, 5]


def test_a_list_gives_what_each_batch_gives_alone():
    model = tiny()
    for actual, x in zip(model([X, LOCAL]), (X, LOCAL), strict=True):
        assert torch.equal(actual, model(x))
    of_global, of_local = model.forward_features([X, LOCAL], [None, None])
    assert torch.equal(of_global["x_norm_clstoken"], model(X))
    assert of_local["x_norm_patchtokens"].shape == (4, 1, 16)


def test_every_parameter_learns_from_both_kinds_of_features():
    model = tiny(drop_path=0.1).train()
    features = model.forward_features(X)
    loss = features["x_norm_clstoken"].square().sum() + features["x_norm_patchtokens"].sum()
    loss.backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("size", [31, 16])
def test_a_picture_below_the_stride_is_refused(size):
    with pytest.raises(DataError, match=rf"sides of at least 32 pixels, got \[2, 3, 64, {size}\]"):
        tiny().eval().forward_features(torch.zeros(2, 3, 64, size))


@pytest.mark.parametrize("size", [48, 80])
def test_training_refuses_crops_that_are_no_multiple_of_the_stride(size):
    crops = pictures(2, 3, 64, size)
    with pytest.raises(DataError, match=rf"multiples of the stride 32 .* got \[64, {size}\]"):
        tiny().train().forward_features([X, crops])


def test_evaluation_cuts_off_pixels_that_fill_no_position():
    model = tiny().eval()
    (cut,) = model.get_intermediate_layers(pictures(2, 3, 64, 80), reshape=True)
    assert cut.shape == (2, 16, 2, 2)
    assert model.forward_features(pictures(2, 3, 64, 80))["x_prenorm"].shape == (2, 4, 16)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DataError, match=r"images: not a batch of shape \[B, 3, H, W\]"):
        tiny()(torch.zeros(shape))


def test_masks_are_refused_and_not_ignored():
    masks = torch.zeros(3, 6, dtype=torch.bool)
    with pytest.raises(DataError, match=r"masks: a ConvNeXt has no mask token, .*\[3, 6\]"):
        tiny()(X, masks)
    with pytest.raises(DataError, match="masks: a ConvNeXt has no mask token"):
        tiny().forward_features([X, LOCAL], [masks, None])
    with pytest.raises(DataError, match="masks: one entry per batch is needed, got 1 for 2"):
        tiny().forward_features([X, LOCAL], [None])


def test_stages_come_in_order_with_their_own_widths_and_grids():
    layers = (
        tiny()
        .eval()
        .get_intermediate_layers(X, n=[2, 0], return_class_token=True, return_extra_tokens=True)
    )
    assert [[tuple(part.shape) for part in layer] for layer in layers] == [
        [(3, 16 * 24, 4), (3, 4), (3, 0, 4)],
        [(3, 4 * 6, 12), (3, 12), (3, 0, 12)],
    ]


def test_only_the_last_stage_is_normed():
    model = tiny().eval()
    normed = model.get_intermediate_layers(X, n=4, return_class_token=True)
    plain = model.get_intermediate_layers(X, n=4, return_class_token=True, norm=False)
    for (a, a_cls), (b, b_cls) in zip(normed[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_cls, b_cls)
    features = model.forward_features(X)
    torch.testing.assert_close(normed[3][0], features["x_norm_patchtokens"])
    torch.testing.assert_close(normed[3][1], features["x_norm_clstoken"])
    torch.testing.assert_close(plain[3][0], features["x_prenorm"])


def test_flat_and_reshaped_maps_agree():
    model = tiny().eval()
    (flat,) = model.get_intermediate_layers(X)
    (maps,) = model.get_intermediate_layers(X, reshape=True)
    assert maps.is_contiguous()
    assert torch.equal(maps.flatten(2).mT, flat)


def test_a_patch_size_resizes_every_map_to_its_grid():
    model = tiny(patch_size=16).eval()
    layers = model.get_intermediate_layers(X, n=4, reshape=True, return_class_token=True)
    assert [tuple(maps.shape) for maps, _ in layers] == [(3, dim, 4, 6) for dim in TINY["dims"]]
    plain = tiny().eval().get_intermediate_layers(X, n=4, reshape=True, return_class_token=True)
    for (_, pooled), (_, expected) in zip(layers, plain, strict=True):
        assert torch.equal(pooled, expected)  # the mean is taken before the map is resized
    assert model.forward_features(X)["x_norm_patchtokens"].shape == (3, 6, 16)


def test_a_picture_below_the_patch_size_has_no_map():
    with pytest.raises(DataError, match="sides of at least 64 pixels"):
        tiny(patch_size=64).eval().get_intermediate_layers(LOCAL)


def test_early_stages_take_smaller_pictures():
    (maps,) = tiny().eval().get_intermediate_layers(pictures(2, 3, 8, 8), n=[1])
    assert maps.shape == (2, 1, 8)
    with pytest.raises(DataError, match="sides of at least 16 pixels"):
        tiny().eval().get_intermediate_layers(pictures(2, 3, 8, 8), n=[2])


@pytest.mark.parametrize("n", [5, 0, [4], [1, 1]])
def test_stages_that_do_not_exist_are_refused(n):
    with pytest.raises(ConfigError, match="n: only"):
        tiny().get_intermediate_layers(X, n=n)


@pytest.mark.parametrize("patch_size", [None, 16])
def test_bfloat16_follows_float32(patch_size):
    model = tiny(patch_size=patch_size).eval()
    with torch.no_grad():
        expected = model.get_intermediate_layers(X, reshape=True)[0]
        half = model.to(torch.bfloat16).get_intermediate_layers(X.bfloat16(), reshape=True)[0]
    assert half.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(half.float(), expected, dim=1)
    assert similarity.min() > 0.99


def test_autocast_trains():
    model = tiny(drop_path=0.2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.forward_features(X)
    features["x_norm_clstoken"].float().square().sum().backward()
    assert all(each.grad.isfinite().all() for each in model.stages.parameters())


def test_initial_weights_are_the_documented_ones():
    model = build_convnext(depths=[1, 1, 1, 1], dims=[32, 32, 32, 64])
    assert torch.equal(model.stages[2][0].gamma, torch.full((32,), 1e-6))
    linear = model.stages[3][0].pwconv1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not linear.bias.any()
    assert not model.downsample_layers[0][0].bias.any()
    assert model.norm.weight.eq(1).all()


@pytest.mark.parametrize("layerscale", [None, 0.0, -1.0])
def test_layerscale_can_be_left_out(layerscale):
    model = tiny(layerscale=layerscale)
    assert not any("gamma" in name for name in model.state_dict())
    assert model(X).isfinite().all()


def test_a_model_built_on_meta_works_after_to_empty():
    model = build_convnext(**TINY, device="meta")
    assert all(each.is_meta for each in model.parameters())
    model.to_empty(device="cpu")
    direct = build_convnext(**TINY)
    with torch.random.fork_rng(devices=[]):
        for each in (model, direct):
            torch.manual_seed(7)
            each.reset_parameters()
    torch.testing.assert_close(model.state_dict(), direct.state_dict(), rtol=0, atol=0)
    assert model.norms[3] is model.norm
    assert model.norms[3].weight is model.norm.weight


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 1, 1]}, "depths: must be 4 whole numbers of at least 1, got"),
        ({"depths": [1, 0, 1, 1]}, "depths: must be 4 whole numbers of at least 1"),
        ({"dims": [8, 8, 8, 8.5]}, "dims: must be 4 whole numbers of at least 1"),
        ({"dims": "8888"}, "dims: must be 4 whole numbers of at least 1"),
        ({"dims": 8}, "model: .* Correct the field"),
        ({"in_chans": 0}, "in_chans: must be a whole number of at least 1, got 0"),
        ({"patch_size": 0}, "patch_size: must be a whole number of at least 1 or null"),
        ({"drop_path": 1.0}, r"drop_path: must lie in \[0, 1\), got 1.0"),
        ({"drop_path": "a"}, "model: .* Correct the field"),
        ({"layerscale": "a"}, "model: .* Correct the field"),
        ({"layerscale": math.nan}, "layerscale: must be finite or null, got nan"),
        ({"layer_scale": 1e-6}, r"layer_scale: no such field of a ConvNeXt, .* mean layerscale\?"),
        ({"depth": [1] * 4}, r"depth: no such field of a ConvNeXt, .* mean depths\?"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_convnext(**{**TINY, **fields})


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match=r"dims: missing from a ConvNeXt, got depths\. Set dims"):
        ConvNeXtConfig.from_fields({"depths": [1, 1, 1, 1]})


def test_config_survives_json():
    config = ConvNeXtConfig.from_fields({**TINY, "patch_size": 16})
    fields = json.loads(json.dumps({"arch": "convnext", **dataclasses.asdict(config)}))
    assert backbone_config(fields) == config
    assert hash(backbone_config(fields)) == hash(config)


@pytest.mark.parametrize(
    ("fields", "family", "facts"),
    [
        (VIT, VisionTransformer, (32, 8, 8, 4)),
        ({"arch": "vit", **VIT}, VisionTransformer, (32, 8, 8, 4)),
        ({"arch": "convnext", **TINY}, ConvNeXt, (16, 32, None, 0)),
        ({"arch": "convnext", **TINY, "patch_size": 16}, ConvNeXt, (16, 32, 16, 0)),
    ],
)
def test_either_family_is_built_from_its_fields(fields, family, facts):
    model = build_backbone(fields, device="meta", dtype=torch.bfloat16)
    assert type(model) is family
    assert isinstance(model, Backbone)
    assert (model.embed_dim, model.stride, model.patch_size, model.num_registers) == facts
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert all(each.is_meta for each in model.parameters())


def test_fields_without_a_family_are_those_of_a_vit():
    assert backbone_config(VIT) == ViTConfig(**VIT)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("convnxt", "got 'convnxt'. Did you mean convnext"),
        ("resnet", "got 'resnet'. Use one of vit, convnext"),
        (None, "got None. Use one of vit, convnext"),
        (["vit"], r"got \['vit'\]\."),
    ],
)
def test_an_unknown_family_is_refused(arch, message):
    with pytest.raises(ConfigError, match=f"arch: no such family of backbones, {message}"):
        build_backbone({"arch": arch, **VIT})


def test_fields_of_the_other_family_are_refused():
    with pytest.raises(ConfigError, match=r"num_heads: .* of a ConvNeXt, got 2\. Use depths, dims"):
        build_backbone({"arch": "convnext", **TINY, "num_heads": 2})
