"""Layers and the promises of the backbone that stored numbers do not cover."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from dinov3.errors import ConfigError, DataError
from dinov3.layers.attention import KeyMaskedLinear, pack, unpack
from dinov3.layers.block import draw_kept_images
from dinov3.layers.ffn import build_ffn
from dinov3.layers.norm import RMSNorm, build_norm
from dinov3.layers.patch_embed import PatchEmbed
from dinov3.layers.rope import RopeAugmentation, RotaryEmbedding, rotate
from dinov3.models.vit import VisionTransformer, ViTConfig, build_vit

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "layerscale": 0.1,
}


def tiny(**fields: Any) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_vit(**{**TINY, **fields})


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GLOBAL = pictures(4, 3, 24, 32)
LOCAL = pictures(6, 3, 16, 16, seed=1)
MASKS = torch.zeros(4, 12, dtype=torch.bool)
MASKS[:2, ::2] = True


def cls_with_seed(model: VisionTransformer, seed: int) -> torch.Tensor:
    model.set_generator(torch.Generator().manual_seed(seed))
    return model(GLOBAL).detach()


@pytest.mark.parametrize(
    "fields", [{"rope_rescale": 2.0}, {"rope_shift": 0.5}, {"rope_jitter": 1.5}, {"drop_path": 0.5}]
)
def test_training_draws_are_a_function_of_the_generator(fields):
    model = tiny(**fields).train()
    first = cls_with_seed(model, 3)
    torch.manual_seed(99)  # the default generator plays no part
    assert torch.equal(cls_with_seed(model, 3), first)
    assert not torch.allclose(cls_with_seed(model, 4), first)


def test_explicit_generator_leaves_the_default_one_alone():
    model = tiny(rope_rescale=2.0, rope_shift=0.1, rope_jitter=1.1, drop_path=0.5).train()
    before = torch.get_rng_state()
    cls_with_seed(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
    model.set_generator(None)
    model(GLOBAL)
    assert not torch.equal(torch.get_rng_state(), before)


def draws_of(generator: int, depth: int | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """RoPE tables of every block, and the tokens after them, for two seeds."""
    model = tiny(rope_rescale=2.0, drop_path=0.5).train()
    tables: list[torch.Tensor] = []
    model.rope_embed.register_forward_hook(lambda _, __, drawn: tables.append(drawn[0]))
    seeds = [seed and torch.Generator().manual_seed(seed) for seed in (generator, depth)]
    model.set_generator(*seeds)
    return tables, model(GLOBAL).detach()


def test_stochastic_depth_can_draw_apart_from_the_positions():
    (tables, output), (same, other), (moved, _) = (draws_of(*s) for s in ((3, 7), (3, 8), (4, 7)))
    assert len(tables) == 3
    assert all(torch.equal(*pair) for pair in zip(tables, same, strict=True))
    assert not torch.equal(output, other)
    assert not any(torch.equal(*pair) for pair in zip(tables, moved, strict=True))
    assert torch.equal(draws_of(3, 7)[1], output)


def test_without_a_source_of_its_own_depth_shares_the_generator():
    assert not torch.equal(draws_of(3, None)[1], draws_of(4, None)[1])
    assert not torch.equal(draws_of(3, None)[0][1], draws_of(3, 3)[0][1])  # it took draws between


def test_a_block_computes_the_same_twice_and_draws_nothing():
    model = tiny(drop_path=0.5).train()
    block = model.blocks[0]
    tokens, shapes = pack([pictures(4, 5, 32)])
    rotation = [model.rope_embed.rotation(2, 2, num_prefix=1)]
    kept = block.draw_kept(shapes, tokens.device, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = block(tokens, shapes, rotation, kept)
    assert torch.equal(block(tokens, shapes, rotation, kept), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(block(tokens, shapes, rotation), first)


def test_a_block_that_drops_nothing_takes_no_draws():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    shapes, cpu = [(4, 5)], torch.device("cpu")
    assert tiny().train().blocks[0].draw_kept(shapes, cpu, generator) is None
    assert tiny(drop_path=0.5).eval().blocks[0].draw_kept(shapes, cpu, generator) is None
    assert torch.equal(generator.get_state(), before)


def test_evaluation_draws_nothing():
    model = tiny(rope_rescale=2.0, rope_shift=0.1, rope_jitter=1.1, drop_path=0.5).eval()
    before = torch.get_rng_state()
    assert torch.equal(model(GLOBAL), tiny().eval()(GLOBAL))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_block_and_resolution_draws_its_own_coordinates():
    model = tiny(rope_rescale=2.0).train()
    seen = []
    model.rope_embed.register_forward_hook(
        lambda _, __, tables: seen.append(tables[0][0, 0].item())
    )
    model.forward_features([GLOBAL, LOCAL])
    assert len(set(seen)) == len(seen) == 3 * 2


def test_evaluation_computes_one_table_per_resolution():
    model = tiny(rope_rescale=2.0).eval()
    seen = []
    model.rope_embed.register_forward_hook(lambda _, __, tables: seen.append(tables))
    model.forward_features([GLOBAL, LOCAL])
    assert len(seen) == 2


def test_list_equals_each_batch_alone():
    model = tiny().eval()
    together = model.forward_features([GLOBAL, LOCAL], [MASKS, None])
    alone = [model.forward_features(GLOBAL, MASKS), model.forward_features(LOCAL)]
    for one, other in zip(together, alone, strict=True):
        for key in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-5)


def test_packed_pass_drops_whole_images_of_every_resolution():
    model = tiny(drop_path=0.5).train()
    of_global, of_local = model._packed_features([GLOBAL, LOCAL, LOCAL[:0]], [MASKS, None, None])[
        :2
    ]
    (of_global["x_norm_clstoken"].sum() + of_local["x_norm_clstoken"].sum()).backward()
    assert all(each.grad.isfinite().all() for each in model.blocks.parameters())


def test_list_without_local_crops_works():
    features = tiny(drop_path=0.3).train().forward_features([GLOBAL, LOCAL[:0]], [MASKS, None])
    assert features[1]["x_norm_clstoken"].shape == (0, 32)


def test_forward_of_a_list_gives_a_list_of_cls():
    shapes = [each.shape for each in tiny().eval()([GLOBAL, LOCAL])]
    assert shapes == [(4, 32), (6, 32)]


def test_every_parameter_gets_a_gradient_without_masks():
    model = tiny(untie_cls_and_patch_norms=True).train()
    features = model.forward_features(GLOBAL)
    (features["x_norm_clstoken"].sum() + features["x_norm_patchtokens"].square().sum()).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_masked_patches_do_not_reach_the_output():
    model = tiny().eval()
    changed = GLOBAL.clone()
    changed[0, :, :8, :8] += 5  # patch 0 of image 0, which is masked
    hidden = model.forward_features(GLOBAL, MASKS)["x_norm_patchtokens"]
    assert torch.equal(model.forward_features(changed, MASKS)["x_norm_patchtokens"], hidden)
    assert not torch.allclose(model(changed), model(GLOBAL))


@pytest.mark.parametrize("masks", [MASKS[:, :5], MASKS.float(), MASKS[:1]])
def test_masks_of_another_shape_or_type_are_refused(masks):
    with pytest.raises(DataError, match=r"masks: not boolean of shape \[4, 12\]"):
        tiny().forward_features(GLOBAL, masks)


def test_a_list_needs_one_mask_entry_per_batch():
    with pytest.raises(DataError, match="masks: one entry per batch is needed, got 1 for 2"):
        tiny().forward_features([GLOBAL, LOCAL], [MASKS])


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 1, 24, 24), (1, 3, 7, 24)])
def test_images_that_hold_no_patch_are_refused(shape):
    with pytest.raises(DataError, match=r"images: not a batch of shape \[B, 3, H, W\]"):
        tiny()(torch.zeros(shape))


def test_pixels_that_fill_no_patch_are_cut_off():
    model = tiny().eval()
    assert torch.equal(model(GLOBAL), model(torch.nn.functional.pad(GLOBAL, (0, 7, 0, 7), value=9)))


def test_intermediate_layers_come_in_block_order():
    model = tiny().eval()
    both = model.get_intermediate_layers(GLOBAL, n=[2, 0], return_class_token=True)
    (first,) = model.get_intermediate_layers(GLOBAL, n=[0], return_class_token=True)
    (last,) = model.get_intermediate_layers(GLOBAL, n=1, return_class_token=True)
    torch.testing.assert_close(both, (first, last), rtol=0, atol=0)
    torch.testing.assert_close(last[1], model(GLOBAL), rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 4, -1, [3], [0, 0], [-1], []])
def test_blocks_that_do_not_exist_are_refused(n):
    with pytest.raises(ConfigError, match=r"n: only \d / \d blocks found"):
        tiny().get_intermediate_layers(GLOBAL, n=n)


def test_meta_model_filled_after_to_empty_computes():
    model = build_vit(**TINY, device="meta")
    assert all(each.is_meta for each in model.state_dict().values())
    model.to_empty(device="cpu")
    model.reset_parameters()
    model.eval()
    assert model(GLOBAL).isfinite().all()
    torch.testing.assert_close(model.rope_embed.periods, tiny().rope_embed.periods)
    masks = {name: each for name, each in model.state_dict().items() if name.endswith("bias_mask")}
    assert len(masks) == 3
    assert all(each.view(3, 32).mean(1).tolist() == [1, 0, 1] for each in masks.values())


def test_initial_weights_have_the_documented_distribution():
    model = tiny(embed_dim=128, num_registers=2)
    weight = model.blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.storage_tokens.std().item() == pytest.approx(0.02, rel=0.3)
    bound = 1 / math.sqrt(3 * 8 * 8)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not model.mask_token.any()
    assert not model.blocks[0].mlp.fc1.bias.any()
    assert model.blocks[0].ls1.gamma.eq(0.1).all()


def test_model_can_be_copied_with_its_generator():
    model = tiny(rope_rescale=2.0).train()
    model.set_generator(torch.Generator().manual_seed(5))
    twin = copy.deepcopy(model)
    assert torch.equal(model(GLOBAL), twin(GLOBAL))


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float64])
def test_dtype_reaches_every_parameter(device_dtype):
    model = build_vit(**TINY, dtype=device_dtype).eval()
    assert {each.dtype for each in model.parameters()} == {device_dtype}
    assert model(GLOBAL.to(device_dtype)).dtype == device_dtype


def test_autocast_stays_close_to_full_precision():
    model = tiny(drop_path=0.3).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(GLOBAL)
    torch.testing.assert_close(rounded.float(), model(GLOBAL), rtol=0, atol=0.1)


@pytest.mark.parametrize("norm", ["layernorm", "layernormbf16", "rmsnorm"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"])
@pytest.mark.parametrize("layerscale", [None, 0.1])
def test_every_combination_of_parts_trains(norm, ffn, layerscale):
    model = tiny(norm=norm, ffn=ffn, layerscale=layerscale, num_registers=0).train()
    model(GLOBAL).sum().backward()
    assert model.cls_token.grad is not None
    assert "storage_tokens" not in model.state_dict()
    assert ("blocks.0.ls1.gamma" in model.state_dict()) == (layerscale is not None)


@torch.no_grad()
def test_stochastic_depth_keeps_the_expectation():
    model = tiny(drop_path=0.5, depth=1, layerscale=None).train()
    tokens, shapes = pack([pictures(4, 5, 32)])
    rotation = [model.rope_embed.rotation(2, 2, num_prefix=1)]
    generator = torch.Generator().manual_seed(0)
    block = model.blocks[0]
    # the second branch is silenced: it would see what the first one has added
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    draws = [
        block(tokens, shapes, rotation, block.draw_kept(shapes, tokens.device, generator)) - tokens
        for _ in range(400)
    ]
    exact = block.eval()(tokens, shapes, rotation) - tokens
    torch.testing.assert_close(
        torch.stack(draws).mean(0), exact, rtol=0, atol=0.2 * exact.abs().max()
    )
    changed = torch.stack(draws).abs().amax(-1).T  # [T, draws]
    images = unpack(changed, shapes)[0].amax(1)  # [B, draws]
    assert images.gt(0).sum(0).eq(2).all()  # exactly half of the images each time


def test_kept_images_stay_within_their_group():
    kept = draw_kept_images([(5, 3), (1, 2), (0, 4)], 0.5, torch.device("cpu"), None)
    assert kept.shapes == [(2, 3), (1, 2), (0, 4)]
    assert kept.rows[:6].lt(15).all()
    assert kept.rows[6:].tolist() == [15, 16]
    assert kept.scale.squeeze().tolist() == [2.5] * 6 + [1.0] * 2


def test_pack_and_unpack_are_inverse():
    groups = [pictures(2, 3, 8), pictures(4, 1, 8)]
    packed, shapes = pack(groups)
    assert packed.shape == (10, 8)
    torch.testing.assert_close(unpack(packed, shapes), groups, rtol=0, atol=0)


def test_key_bias_has_no_effect_and_no_gradient():
    layer = KeyMaskedLinear(8)
    layer.fill_mask()
    output = layer(pictures(3, 8))
    output.sum().backward()
    assert torch.equal(output[:, 8:16], (pictures(3, 8) @ layer.weight[8:16].T).detach())
    assert layer.bias.grad is not None
    assert not layer.bias.grad[8:16].any()
    assert layer.bias.grad[:8].all()


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    rope = RotaryEmbedding(16)
    rotation = rope.rotation(1, 8, num_prefix=2)
    query = rotate(pictures(1, 1, 1, 16).expand(1, 10, 2, 16), rotation)  # [B, N, H, E]
    key = rotate(pictures(1, 1, 1, 16, seed=1).expand(1, 10, 2, 16), rotation)
    torch.testing.assert_close(query.norm(dim=-1), query[:, :1].norm(dim=-1).expand(1, 10, 2))
    logits = torch.einsum("bnhe,bmhe->bnm", query, key)[0, 2:, 2:]
    torch.testing.assert_close(logits.diagonal(2), logits[0, 2].expand(6), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0, 2], logits[0, 3])


def test_prefix_tokens_are_not_rotated():
    tokens = pictures(2, 6, 2, 16)
    turned = rotate(tokens, RotaryEmbedding(16).rotation(2, 2, num_prefix=2))
    assert torch.equal(turned[:, :2], tokens[:, :2])
    assert not torch.allclose(turned[:, 2:], tokens[:, 2:])


def test_coordinate_augmentation_stays_within_its_bounds():
    generator = torch.Generator().manual_seed(0)
    rope = RotaryEmbedding(16, augmentation=RopeAugmentation(shift=0.25, jitter=None, rescale=None))
    plain = rope.eval()._coordinates(2, 2)
    shifts = torch.stack([(rope._augment(plain, generator) - plain)[0] for _ in range(200)])
    assert shifts.abs().max() <= 0.25
    assert shifts.abs().max() > 0.2
    assert not torch.equal(shifts[:, 0], shifts[:, 1])  # each axis draws alone
    rope.augmentation = RopeAugmentation(rescale=2.0)
    factors = torch.stack([(rope._augment(plain, generator) / plain) for _ in range(200)])
    assert factors.min() >= 0.5
    assert factors.max() <= 2
    torch.testing.assert_close(factors, factors[:, :1, :1].expand_as(factors))  # one for both axes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 30}, "embed_dim: must be a multiple of 4 \\* num_heads = 8, got 30"),
        ({"depth": 0}, "depth: must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads: must be at least 1, got 0"),
        ({"num_registers": -1}, "num_registers: must not be negative"),
        ({"ffn": "glu"}, "ffn: must be one of mlp, swiglu"),
        ({"ffn_ratio": 0.0}, "ffn_ratio: must be positive"),
        ({"norm": "batchnorm"}, "norm: must be one of layernorm"),
        ({"drop_path": 1.0}, r"drop_path: must lie in \[0, 1\), got 1.0"),
        ({"layerscale": 0.0}, "layerscale: must be positive or null"),
        ({"rope_rescale": 0.5}, "rope_rescale: must be at least 1 or null"),
        ({"rope_shift": -1.0}, "rope_shift: must be positive or null"),
        ({"rope_normalize": "mean"}, "rope_normalize: must be one of separate, min, max"),
        ({"rope_dtype": "fp8"}, "rope_dtype: must be one of fp32"),
        ({"rope_base": None}, "rope_base: exactly one of"),
        ({"rope_min_period": 1.0}, "rope_base: exactly one of"),
        ({"rope_base": None, "rope_min_period": 2.0, "rope_max_period": 1.0}, "rope_base: exactly"),
        ({"registers": 4}, "registers: no such field .* Did you mean num_registers"),
        ({"embed_dim": "96"}, "model: .* Correct the field"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_vit(**{**TINY, **fields})


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="num_heads: missing from a vision transformer"):
        ViTConfig.from_fields({"embed_dim": 32, "depth": 1})


def test_config_survives_a_round_trip():
    config = ViTConfig.from_fields({**TINY, "rope_jitter": 1.2})
    assert ViTConfig.from_fields(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("kind", "ratio", "hidden"),
    [("swiglu", 6.0, 256), ("swiglu", 4.0, 176), ("swiglu64", 4.0, 192), ("swiglu128", 4.0, 256)],
)
def test_swiglu_rounds_its_hidden_size_up(kind, ratio, hidden):
    assert build_ffn(kind, 64, ratio=ratio).w1.out_features == hidden


def test_unknown_parts_are_refused():
    with pytest.raises(ConfigError, match="ffn: unknown kind, got 'glu'"):
        build_ffn("glu", 8, ratio=4.0)
    with pytest.raises(ConfigError, match="norm: unknown kind, got 'groupnorm'"):
        build_norm("groupnorm", 8)
    with pytest.raises(ConfigError, match="rope_base: exactly one of"):
        RotaryEmbedding(16, base=None)


def test_rms_norm_equals_the_library():
    x = pictures(3, 8)
    expected = torch.nn.functional.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(RMSNorm(8)(x), expected)
    assert RMSNorm(8, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_patch_embedding_is_row_major():
    embed = PatchEmbed(patch_size=2, in_chans=1, embed_dim=1)
    torch.nn.init.constant_(embed.proj.weight, 0.25)
    torch.nn.init.zeros_(embed.proj.bias)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert embed(image).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
