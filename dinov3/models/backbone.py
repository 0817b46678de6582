"""The two families of backbones behind one interface, and how to build either from a config.

A `model` object names its family in `arch`; an older one without it is a vision transformer.
Both families have embed_dim, stride (pixels between neighbours of `forward_features`), patch_size
(None where a ConvNeXt keeps its own grid), num_registers, config, reset_parameters, set_generator,
forward_features and get_intermediate_layers.
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from dinov3.errors import ConfigError
from dinov3.models.convnext import ConvNeXt, ConvNeXtConfig
from dinov3.models.vit import VisionTransformer, ViTConfig

Backbone: TypeAlias = VisionTransformer | ConvNeXt
"""A module of either family; `isinstance` knows it too."""

BackboneConfig: TypeAlias = ViTConfig | ConvNeXtConfig

_CONFIGS: Mapping[str, type[ViTConfig] | type[ConvNeXtConfig]] = {
    "vit": ViTConfig,
    "convnext": ConvNeXtConfig,
}
ARCHS = tuple(_CONFIGS)


def backbone_config(fields: Mapping[str, Any]) -> BackboneConfig:
    """Check the `model` object of a config.json: `arch` and the fields of that family's config.

    Raises:
        ConfigError: The family or a field is unknown, or a value is impossible.
    """
    own = dict(fields)
    arch = own.pop("arch", "vit")
    if arch not in ARCHS:
        near = difflib.get_close_matches(str(arch), ARCHS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(ARCHS)}."
        msg = f"arch: no such family of backbones, got {arch!r}. {hint}"
        raise ConfigError(msg)
    return _CONFIGS[arch].from_fields(own)


def backbone_of(
    config: BackboneConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Build the family that a config belongs to."""
    if isinstance(config, ConvNeXtConfig):
        return ConvNeXt(config, device=device, dtype=dtype)
    return VisionTransformer(config, device=device, dtype=dtype)


def build_backbone(
    fields: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Build a backbone of either family from the `model` object of a config.

    Raises:
        ConfigError: The family or a field is unknown, or a value is impossible.
    """
    return backbone_of(backbone_config(fields), device=device, dtype=dtype)
