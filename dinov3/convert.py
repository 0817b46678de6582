"""Names and configs of Hugging Face's DINOv3 classes in ours; no code of theirs is loaded.

They keep queries, keys and values apart, leave the periods of the rotary embedding out, and have
no final norm of their own for local crops. Layers stand below `model.` in memory, not in files.
"""

# D width

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.errors import CheckpointError, ConfigError
from dinov3.layers.rope import RotaryEmbedding
from dinov3.models.backbone import BackboneConfig
from dinov3.models.convnext import NUM_STAGES, ConvNeXtConfig
from dinov3.models.vit import ViTConfig

_NORMS = {1e-5: "layernormbf16", 1e-6: "layernorm"}  # by epsilon
_CONVNEXT_EPS = 1e-6

_LAYER = re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)\.(\w+)")
_VIT_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_VIT_LAYER = {
    "attention.o_proj": "attn.proj",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "norm1": "norm1",
    "norm2": "norm2",
}
_MLP = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
_SWIGLU = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
_SCALES = {"layer_scale1": "ls1.gamma", "layer_scale2": "ls2.gamma"}

_STAGE = re.compile(r"(?:model\.)?stages\.(\d+)\.(layers|downsample_layers)\.(\d+)\.(.+)")
_CONVNEXT_LAYER = {
    "gamma": "gamma",
    "depthwise_conv": "dwconv",
    "layer_norm": "norm",
    "pointwise_conv1": "pwconv1",
    "pointwise_conv2": "pwconv2",
}


def config_from_transformers(content: Mapping[str, Any], path: Path) -> BackboneConfig:
    """The architecture that a `config.json` of theirs describes.

    Args:
        content: The parsed file.
        path: The file, for messages.

    Raises:
        ConfigError: It is of another model, lacks a field, or describes what ours cannot be.
    """
    families: dict[str, Callable[[Mapping[str, Any], Path], BackboneConfig]] = {
        "dinov3_vit": _vit_config,
        "dinov3_convnext": _convnext_config,
    }
    kind = content.get("model_type")
    if kind not in families:
        msg = f"{path}: model_type: not of DINOv3, got {kind!r}. Use one of {', '.join(families)}."
        raise ConfigError(msg)
    try:
        return families[str(kind)](content, path)
    except KeyError as error:
        msg = f"{path}: lacks the field {error}, got {', '.join(content)}. Save the model again."
        raise ConfigError(msg) from error
    except (TypeError, ZeroDivisionError) as error:
        msg = f"{path}: a field is of the wrong kind, got {error}. Save the model again."
        raise ConfigError(msg) from error


def _vit_config(content: Mapping[str, Any], path: Path) -> ViTConfig:
    width, hidden, gated = (
        content[name] for name in ("hidden_size", "intermediate_size", "use_gated_mlp")
    )
    _require(content, path, "hidden_act", ("silu" if gated else "gelu",))
    _require(content, path, "layer_norm_eps", tuple(_NORMS))
    _require(content, path, "value_bias", (content["query_bias"],))
    _require(content, path, "key_bias", (False, content["query_bias"]))
    return ViTConfig(
        embed_dim=width,
        depth=content["num_hidden_layers"],
        num_heads=content["num_attention_heads"],
        patch_size=_one_side(content["patch_size"], path),
        in_chans=content["num_channels"],
        ffn="swiglu" if gated else "mlp",
        ffn_ratio=hidden / width * (1.5 if gated else 1),
        qkv_bias=content["query_bias"],
        proj_bias=content["proj_bias"],
        ffn_bias=content["mlp_bias"],
        layerscale=content["layerscale_value"],
        norm=_NORMS[content["layer_norm_eps"]],
        num_registers=content["num_register_tokens"],
        mask_k_bias=not content["key_bias"],
        rope_base=content["rope_theta"],
        rope_shift=content.get("pos_embed_shift"),
        rope_jitter=content.get("pos_embed_jitter"),
        rope_rescale=content.get("pos_embed_rescale"),
    )


def _convnext_config(content: Mapping[str, Any], path: Path) -> ConvNeXtConfig:
    _require(content, path, "hidden_act", ("gelu",))
    _require(content, path, "layer_norm_eps", (_CONVNEXT_EPS,))
    return ConvNeXtConfig(
        depths=tuple(content["depths"]),
        dims=tuple(content["hidden_sizes"]),
        in_chans=content["num_channels"],
        layerscale=content["layer_scale_init_value"],
    )


def _require(content: Mapping[str, Any], path: Path, name: str, known: tuple[Any, ...]) -> None:
    if content[name] not in known:
        listed = ", ".join(map(repr, known))
        msg = (
            f"{path}: {name}: our networks know {listed}, got {content[name]!r}. Use such a model."
        )
        raise ConfigError(msg)


def _one_side(size: Any, path: Path) -> Any:
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        msg = f"{path}: patch_size: patches must be squares, got {size!r}. Use such a model."
        raise ConfigError(msg)
    return sides.pop()


def from_transformers(
    tensors: Mapping[str, Tensor], config: BackboneConfig, path: Path
) -> dict[str, Tensor]:
    """Their tensors by our names; what has no name with us keeps its own, to be refused.

    Args:
        tensors: By their names.
        config: Of the network they belong to.
        path: Where they come from, for messages.

    Raises:
        CheckpointError: Queries, keys and values are not all there.
    """
    if isinstance(config, ConvNeXtConfig):
        return _convnext_tensors(tensors)
    renamed = {_vit_name(name, config): tensor for name, tensor in tensors.items()}
    if "mask_token" in renamed:
        renamed["mask_token"] = renamed["mask_token"].flatten(0, -2)  # [1, D]
    registers = renamed.get("storage_tokens")
    if registers is not None and registers.numel() == 0:
        del renamed["storage_tokens"]  # theirs keeps a tensor of none
    for index in range(config.depth):
        _join_projections(renamed, f"blocks.{index}.attn.", config, path)
    norm = renamed.get("norm.weight")
    if norm is None or norm.shape != (config.embed_dim,):
        return renamed  # to be refused, before a width of the config alone takes any memory
    rope = RotaryEmbedding(config.embed_dim // config.num_heads, base=config.rope_base)
    return {**renamed, "rope_embed.periods": rope.periods}


def _vit_name(name: str, config: ViTConfig) -> str:
    found = _LAYER.fullmatch(name)
    if found is None:
        return _VIT_TOP.get(name, name)
    index, part, kind = found.groups()
    if part in _SCALES and kind == "lambda1":
        return f"blocks.{index}.{_SCALES[part]}"
    ours = {**_VIT_LAYER, **(_MLP if config.ffn == "mlp" else _SWIGLU)}.get(part)
    return name if ours is None else f"blocks.{index}.{ours}.{kind}"


def _join_projections(
    tensors: dict[str, Tensor], prefix: str, config: ViTConfig, path: Path
) -> None:
    """Queries, keys and values become one projection; a key bias that is not there is zero."""
    try:
        weights = [tensors.pop(f"{prefix}{letter}.weight") for letter in "qkv"]
        tensors[f"{prefix}qkv.weight"] = torch.cat(weights)  # [3 D, D]
        if not config.qkv_bias:
            return
        query, value = (tensors.pop(f"{prefix}{letter}.bias") for letter in "qv")
        masked = config.mask_k_bias
        key = torch.zeros_like(query) if masked else tensors.pop(f"{prefix}k.bias")
    except KeyError as error:
        msg = f"{path}: a projection of attention is missing, got no {error}. Save it again."
        raise CheckpointError(msg) from error
    tensors[f"{prefix}qkv.bias"] = torch.cat([query, key, value])  # [3 D]
    if masked:
        ones = torch.ones_like(query)
        tensors[f"{prefix}qkv.bias_mask"] = torch.cat([ones, torch.zeros_like(key), ones])


def _convnext_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last norm stands under two names with us."""
    renamed = {_convnext_name(name): tensor for name, tensor in tensors.items()}
    for kind in ("weight", "bias"):
        if f"norm.{kind}" in renamed:
            renamed[f"norms.{NUM_STAGES - 1}.{kind}"] = renamed[f"norm.{kind}"]
    return renamed


def _convnext_name(name: str) -> str:
    found = _STAGE.fullmatch(name)
    if found is None:
        return re.sub(r"^layer_norm\.", "norm.", name)
    stage, kind, index, rest = found.groups()
    if kind == "downsample_layers":
        return f"downsample_layers.{stage}.{index}.{rest}"
    part, dot, parameter = rest.partition(".")
    return f"stages.{stage}.{index}.{_CONVNEXT_LAYER.get(part, part)}{dot}{parameter}"
