"""Hugging Face's configs and names in ours; `test_adopt` compares features with their classes."""

from pathlib import Path

import pytest
import torch

from dinov3 import hub
from dinov3.convert import config_from_transformers, from_transformers
from dinov3.errors import CheckpointError
from dinov3.models.backbone import backbone_of

HERE = Path("config.json")
VIT = {
    "model_type": "dinov3_vit",
    "patch_size": 16,
    "num_channels": 3,
    "num_register_tokens": 4,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "layerscale_value": 1.0,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "pos_embed_rescale": 2.0,
}
CONVNEXT = {
    "model_type": "dinov3_convnext",
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 1e-6,
}


def vit(width, hidden, layers, heads, *, gated=False, **fields):
    size = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    kind = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    return {**VIT, **size, **kind, "num_attention_heads": heads, **fields}


def convnext(depths, dims):
    return {**CONVNEXT, "depths": depths, "hidden_sizes": dims}


NO_BIAS = {"query_bias": False, "value_bias": False}
RELEASED = {
    "dinov3_vits16": vit(384, 1536, 12, 6),
    "dinov3_vits16plus": vit(384, 1536, 12, 6, gated=True),
    "dinov3_vitb16": vit(768, 3072, 12, 12),
    "dinov3_vitl16": vit(1024, 4096, 24, 16),
    "dinov3_vith16plus": vit(1280, 5120, 32, 20, gated=True),
    "dinov3_vit7b16": vit(4096, 8192, 40, 32, gated=True, **NO_BIAS),
    "dinov3_convnext_tiny": convnext([3, 3, 9, 3], [96, 192, 384, 768]),
    "dinov3_convnext_large": convnext([3, 3, 27, 3], [192, 384, 768, 1536]),
}


def shapes(config):
    state = backbone_of(config, device="meta").state_dict()
    return {name: tensor.shape for name, tensor in state.items() if "local_cls_norm" not in name}


@pytest.mark.parametrize("name", RELEASED)
def test_released_model_has_the_shapes_of_the_hub(name):
    config = config_from_transformers(RELEASED[name], HERE)
    assert shapes(config) == shapes(hub.ARCHITECTURES[name])


def tensors_of(config, **changes):
    """A small transformer's tensors by their names, all ones."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    layer = {
        **{f"attention.{letter}_proj.weight": (width, width) for letter in "qkvo"},
        **{f"attention.{letter}_proj.bias": (width,) for letter in "qvo"},
        **{f"norm{number}.{kind}": (width,) for number in (1, 2) for kind in ("weight", "bias")},
        **{f"layer_scale{number}.lambda1": (width,) for number in (1, 2)},
        "mlp.up_proj.weight": (hidden, width),
        "mlp.up_proj.bias": (hidden,),
        "mlp.down_proj.weight": (width, hidden),
        "mlp.down_proj.bias": (width,),
    }
    top = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, 1, width),
        "embeddings.register_tokens": (1, 4, width),
        "embeddings.patch_embeddings.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    layers = {f"layer.0.{name}": shape for name, shape in layer.items()}
    sizes = {**top, **layers, **changes}
    return {name: torch.ones(shape) for name, shape in sizes.items() if shape is not None}


SMALL = vit(32, 64, 1, 2)


def test_names_and_shapes_are_those_of_our_network():
    config = config_from_transformers(SMALL, HERE)
    found = from_transformers(tensors_of(SMALL), config, HERE)
    assert {name: tensor.shape for name, tensor in found.items()} == shapes(config)


def test_key_bias_that_is_not_there_is_zero_and_masked():
    found = from_transformers(tensors_of(SMALL), config_from_transformers(SMALL, HERE), HERE)
    wanted = torch.ones(3, 32)
    wanted[1] = 0
    assert torch.equal(found["blocks.0.attn.qkv.bias"].view(3, 32), wanted)
    assert torch.equal(found["blocks.0.attn.qkv.bias_mask"].view(3, 32), wanted)


@pytest.mark.parametrize("part", ["q_proj.weight", "k_proj.weight", "v_proj.bias"])
def test_missing_projection_is_named(part):
    tensors = tensors_of(SMALL, **{f"layer.0.attention.{part}": None})
    with pytest.raises(CheckpointError, match="a projection of attention is missing"):
        from_transformers(tensors, config_from_transformers(SMALL, HERE), HERE)


def test_unknown_tensor_keeps_its_name_to_be_refused():
    tensors = tensors_of(
        SMALL, **{"layer.0.attention.extra.weight": (1,), "classifier.weight": (1,)}
    )
    found = from_transformers(tensors, config_from_transformers(SMALL, HERE), HERE)
    assert {"layer.0.attention.extra.weight", "classifier.weight"} <= found.keys()
