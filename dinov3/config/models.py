"""The networks of a recipe: backbones of both families and projection heads."""

from typing import Annotated, Literal

from pydantic import Field

from dinov3.config.base import BelowOne, Count, NonNegative, Positive, Section, Steps


class VitModel(Section):
    """A vision transformer's fields (see `dinov3.models.vit.ViTConfig`)."""

    arch: Literal["vit"]
    embed_dim: Count
    depth: Count
    num_heads: Count
    patch_size: Count
    num_registers: Steps
    ffn: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"]
    ffn_ratio: Positive
    qkv_bias: bool
    mask_k_bias: bool
    norm: Literal["layernorm", "layernormbf16", "rmsnorm"]
    layerscale: Positive | None
    drop_path: BelowOne
    untie_global_and_local_cls_norm: bool
    rope_base: Positive | None
    rope_rescale: Positive | None
    rope_jitter: Positive | None
    rope_shift: Positive | None
    rope_dtype: Literal["fp32", "bf16"]

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the feature map."""
        return self.patch_size


class ConvNextModel(Section):
    """A ConvNeXt's fields (see `dinov3.models.convnext.ConvNeXtConfig`)."""

    arch: Literal["convnext"]
    depths: tuple[Count, Count, Count, Count]
    dims: tuple[Count, Count, Count, Count]
    layerscale: NonNegative
    drop_path: BelowOne
    patch_size: Count | None  # maps are resized to this grid for evaluation

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the last feature map."""
        return 32


AnyModel = Annotated[VitModel | ConvNextModel, Field(discriminator="arch")]


class HeadConfig(Section):
    """A projection head (DINO or iBOT)."""

    num_prototypes: Count
    num_layers: Count
    hidden_dim: Count
    bottleneck_dim: Count


class HeadsConfig(Section):
    """Both heads; `last_layer_gain` scales the initial prototypes."""

    dino: HeadConfig
    ibot: HeadConfig
    last_layer_gain: Positive
