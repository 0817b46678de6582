"""The backbone equals the reference's stored numbers, and an independent implementation."""

from typing import Any

import numpy as np
import pytest
import torch

from dinov3.layers.rope import RotaryEmbedding
from dinov3.models.vit import VisionTransformer, build_vit
from tests.golden_numbers import GOLDEN, assert_matches, inp

BASE: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2, "rope_rescale": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "A_mlp4": {},
    "B_swiglu6": {"ffn": "swiglu", "ffn_ratio": 6.0},
    "C_swiglu64_7b": {
        "ffn": "swiglu64",
        "ffn_ratio": 3.0,
        "qkv_bias": False,
        "untie_global_and_local_cls_norm": True,
    },
    "D_bf16rope": {"rope_dtype": "bf16"},
    "E_untie_cls_patch": {"untie_cls_and_patch_norms": True},
}


def fill_procedurally(model: VisionTransformer) -> None:
    """Write the weights that the stored numbers were made with."""
    state = model.state_dict()
    for index, name in enumerate(sorted(state)):
        if name.endswith(("periods", "bias_mask")):
            continue
        values = 0.05 * np.sin(0.37 * np.arange(state[name].numel()) + 0.11 * index)
        if state[name].ndim == 1 and "norm" in name and name.endswith("weight"):
            values = values + 1.0
        if name.endswith("gamma"):
            values = values + 0.5
        state[name].copy_(torch.from_numpy(values).reshape(state[name].shape))


@pytest.fixture(params=VARIANTS)
def variant(request):
    model = build_vit(**BASE, **VARIANTS[request.param]).eval()
    fill_procedurally(model)
    return model, GOLDEN[request.param]


X = inp(2, 3, 64, 80)
LOCAL = inp(4, 3, 32, 32)
MASKS = torch.zeros(2, 20, dtype=torch.bool)
MASKS[0, ::3] = True


def test_state_dict_has_the_stored_keys(variant):
    model, golden = variant
    state = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert sorted(state.items()) == [tuple(each) for each in golden["keys"]]
    assert len(state) == golden["n_state"]


def test_packed_pass_of_accelerators_matches(variant):
    model, golden = variant
    of_global, of_local = model._packed_features([X, LOCAL], [MASKS, None])
    assert_matches(of_global["x_norm_clstoken"], golden["list_global_cls"])
    assert_matches(of_local["x_norm_clstoken"], golden["list_local_cls"])
    model.rope_embed.augmentation = model.rope_embed.augmentation._replace(rescale=None)
    local = model.train()._packed_features([X, LOCAL], [MASKS, None])[1]
    assert_matches(local["x_norm_clstoken"], golden["train_list_local_cls"])


@pytest.mark.parametrize(
    "key", ["x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"]
)
def test_features_match(variant, key):
    model, golden = variant
    assert_matches(model(X, is_training=True)[key], golden[key])


def test_forward_gives_cls(variant):
    model, golden = variant
    assert_matches(model(X), golden["forward"])


def test_masked_forward_matches(variant):
    model, golden = variant
    features = model.forward_features(X, MASKS)
    assert_matches(features["x_norm_clstoken"], golden["masked_cls"])
    assert features["masks"] is MASKS


def test_list_of_two_resolutions_matches(variant):
    model, golden = variant
    of_global, of_local = model.forward_features([X, LOCAL], [MASKS, None])
    assert_matches(of_global["x_norm_clstoken"], golden["list_global_cls"])
    assert_matches(of_local["x_norm_clstoken"], golden["list_local_cls"])


def test_local_crops_use_their_own_norm_in_training(variant):
    model, golden = variant
    model.rope_embed.augmentation = model.rope_embed.augmentation._replace(rescale=None)
    local = model.train().forward_features([X, LOCAL], [MASKS, None])[1]
    assert_matches(local["x_norm_clstoken"], golden["train_list_local_cls"])


def test_intermediate_layers_match(variant):
    model, golden = variant
    layers = model.get_intermediate_layers(
        X, n=[2, 0], reshape=True, return_class_token=True, return_extra_tokens=True
    )
    flat = [each for layer in layers for each in layer]
    assert len(flat) == len(golden["gil"]) == 6
    for actual, stored in zip(flat, golden["gil"], strict=True):
        assert_matches(actual, stored)


def test_intermediate_layers_without_norm_match(variant):
    model, golden = variant
    (patches,) = model.get_intermediate_layers(X, n=1, norm=False)
    assert_matches(patches, golden["gil_nonorm"])


@pytest.mark.parametrize(
    ("key", "normalize", "dtype"),
    [
        ("rope_fp32_H3W5", "separate", torch.float32),
        ("rope_fp32_H3W5_min", "min", torch.float32),
        ("rope_fp32_H3W5_max", "max", torch.float32),
        ("rope_bf16_H3W5", "separate", torch.bfloat16),
    ],
)
def test_rope_tables_match(key, normalize, dtype):
    rope = RotaryEmbedding(32, normalize=normalize, dtype=dtype)
    sin, cos = rope(3, 5)
    golden = GOLDEN[key]
    assert sin.dtype == cos.dtype == dtype
    assert_matches(sin, golden["sin"])
    assert_matches(cos, golden["cos"])
    periods = golden.get("periods", rope.periods.tolist())
    assert rope.periods.tolist() == pytest.approx(periods, abs=1e-5)


def test_rope_periods_of_a_range_match():
    rope = RotaryEmbedding(32, base=None, min_period=0.5, max_period=90.0)
    assert rope.periods.tolist() == pytest.approx(GOLDEN["rope_minmax_periods"], rel=1e-6)


def to_transformers(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The names of the independent implementation; it keeps queries, keys and values apart."""
    names = {
        "cls_token": "embeddings.cls_token",
        "storage_tokens": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    parts = {
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    mapped = {new: state[old] for old, new in names.items()}
    mapped["embeddings.mask_token"] = state["mask_token"][None]
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"model.layer.{index}."
        weights = state[f"{ours}attn.qkv.weight"].chunk(3)
        biases = state[f"{ours}attn.qkv.bias"].chunk(3)
        for letter, weight, bias in zip("qkv", weights, biases, strict=True):
            mapped[f"{theirs}attention.{letter}_proj.weight"] = weight
            if letter != "k":
                mapped[f"{theirs}attention.{letter}_proj.bias"] = bias
        for number in (1, 2):
            mapped[f"{theirs}layer_scale{number}.lambda1"] = state[f"{ours}ls{number}.gamma"]
        for old, new in parts.items():
            for kind in ("weight", "bias"):
                if f"{ours}{old}.{kind}" in state:
                    mapped[f"{theirs}{new}.{kind}"] = state[f"{ours}{old}.{kind}"]
    return mapped


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@torch.no_grad()
def test_random_model_equals_transformers(ffn):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ratio = 4.0 if ffn == "mlp" else 6.0
    ours = build_vit(**{**BASE, "ffn": ffn, "ffn_ratio": ratio, "num_registers": 3}).eval()
    for parameter in ours.parameters():  # far from the small initial values, key biases too
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_register_tokens=3,
            use_gated_mlp=ffn == "swiglu",
            hidden_act="gelu" if ffn == "mlp" else "silu",
        )
    ).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict(), depth=3))
    features = ours.forward_features(X, MASKS)
    expected = theirs(X, bool_masked_pos=MASKS).last_hidden_state
    parts = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens")
    cls, registers, patches = (features[key] for key in parts)
    actual = torch.cat([cls[:, None], registers, patches], dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
