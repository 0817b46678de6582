"""dino.txt: a text tower aligned with a frozen backbone (paper, section 5.3; arXiv 2412.16334).

    images -> backbone (frozen) -> [CLS, registers, patches] -> blocks -> [CLS', mean of P'] -- E
    tokens -> text tower ------------------------------------------------------------------- E

The first half of a caption's feature meets CLS', the second the pooled patches, so single patches
P' can be compared with the second half of any text. No gradient ever reaches the backbone.
"""

# B images or captions, P patches, R registers, N = 1 + R + P tokens, D width of the backbone,
# E width of the shared space, W width of P' (D, or E over the number of parts)

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import ConfigError
from dinov3.layers.attention import pack, unpack
from dinov3.layers.block import Block, reset_layers
from dinov3.layers.ffn import build_ffn
from dinov3.layers.norm import LayerScale, build_norm
from dinov3.models.backbone import Backbone
from dinov3.models.fields import check_fields, config_of, require
from dinov3.models.text import PlainAttention, TextConfig, TextTransformer

PATCH_POOLERS = ("mean", "max")
MAX_LOGIT_SCALE = math.log(100)
_LAYERSCALE = 1e-5
_NORM = "layernormbf16"  # LayerNorm with epsilon 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoTxtConfig:
    """The architecture of both towers; the values are checked on construction.

    Attributes:
        embed_dim: Width E of the shared space.
        text: The text tower; its `out_dim` is E.
        num_head_blocks: Transformer blocks over the frozen features; 0 leaves those as they are.
        head_drop_path: Share of images whose residual is skipped in training.
        head_ffn_ratio: Nominal hidden size of the blocks' SwiGLU over the width.
        head_num_heads: Attention heads of the blocks; None takes the backbone's, or one for every
            64 features where it has none.
        use_class_token: CLS' is part of the feature of an image.
        use_patch_tokens: The pooled patches are part of the feature of an image.
        pooler: Mean or maximum over the patches.
        init_logit_scale: Logarithm of the initial inverse temperature.

    Raises:
        ConfigError: A value does not describe a model.
    """

    embed_dim: int
    text: TextConfig
    num_head_blocks: int = 2
    head_drop_path: float = 0.3
    head_ffn_ratio: float = 4.0
    head_num_heads: int | None = None
    use_class_token: bool = True
    use_patch_tokens: bool = True
    pooler: str = "mean"
    init_logit_scale: float = math.log(1 / 0.07)

    def __post_init__(self) -> None:
        blocks, rate, heads = self.num_head_blocks, self.head_drop_path, self.head_num_heads
        require(blocks >= 0, "num_head_blocks", "must not be negative", blocks)
        require(0 <= rate < 1, "head_drop_path", "must lie in [0, 1)", rate)
        require(self.head_ffn_ratio > 0, "head_ffn_ratio", "must be positive", self.head_ffn_ratio)
        require(heads is None or heads >= 1, "head_num_heads", "must be at least 1 or null", heads)
        rule = f"must be one of {', '.join(PATCH_POOLERS)}"
        require(self.pooler in PATCH_POOLERS, "pooler", rule, self.pooler)
        holds, rule = self.num_parts > 0, "must be true where use_class_token is false"
        require(holds, "use_patch_tokens", rule, self.use_patch_tokens)
        holds = self.embed_dim >= 1 and self.embed_dim % self.num_parts == 0
        require(holds, "embed_dim", f"must be a multiple of {self.num_parts}", self.embed_dim)
        rule = f"must be null or embed_dim = {self.embed_dim}"
        width = self.text.out_dim
        require(width in (None, self.embed_dim), "text.out_dim", rule, width)

    @property
    def num_parts(self) -> int:
        """Parts of an image's feature: CLS', pooled patches, or both."""
        return int(self.use_class_token) + int(self.use_patch_tokens)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a mapping, such as the `model` object of a config.json.

        Raises:
            ConfigError: A field is unknown, missing or has an impossible value.
        """
        check_fields(cls, fields, "a dino.txt model")
        text = fields["text"]
        if not isinstance(text, TextConfig):
            text = TextConfig.from_fields(text)
        return config_of(cls, {**fields, "text": text}, "a dino.txt model")


class VisionHead(nn.Module):
    """Blocks without positions over all tokens of the backbone, and the projection to W.

    Args:
        config: Of the whole model.
        dim: Width D of the backbone.
        num_heads: Attention heads of the blocks.
        device: Where the parameters live, `meta` included.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: DinoTxtConfig,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.generator: torch.Generator | None = None
        self.ln_final: nn.Module = nn.Identity()
        if config.num_head_blocks:
            self.ln_final = build_norm(_NORM, dim, **factory)
        self.blocks = nn.ModuleList(
            _build_block(config, dim, num_heads, factory) for _ in range(config.num_head_blocks)
        )
        self.linear_projection: nn.Module = nn.Identity()
        if config.num_parts * dim != config.embed_dim:
            out_dim = config.embed_dim // config.num_parts
            self.linear_projection = nn.Linear(dim, out_dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights: blocks as in the vision transformer, the projection N(0, 1 / D)."""
        reset_layers(self)
        if isinstance(self.linear_projection, nn.Linear):
            width = self.linear_projection.in_features
            nn.init.normal_(self.linear_projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform the tokens [B, N, D] of each image to [B, N, W]."""
        packed, shapes = pack([tokens])
        for block in self.blocks:
            kept = cast(Block, block).draw_kept(shapes, packed.device, self.generator)
            packed = block(packed, shapes, (), kept)
        # unpacked before the norm: FSDP warns where a module returns a view
        normed = self.ln_final(unpack(packed, shapes)[0])  # [B, N, D]
        transformed: Tensor = self.linear_projection(normed)
        return transformed


class VisionTower(nn.Module):
    """The frozen backbone and the head over it."""

    backbone: Backbone

    def __init__(
        self,
        config: DinoTxtConfig,
        backbone: Backbone,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        num_heads = config.head_num_heads or _num_heads(backbone)
        self.head = VisionHead(config, backbone.embed_dim, num_heads, device=device, dtype=dtype)
        backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head; the backbone always stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, E], patches P' [B, P, W] and those of the backbone [B, P, D]."""
        self.backbone.eval()  # also where its own train() was called
        with torch.no_grad():
            (layer,) = self.backbone.get_intermediate_layers(
                images, n=1, return_class_token=True, return_extra_tokens=True
            )
        patches, cls, registers = layer  # [B, P, D], [B, D], [B, R, D]
        tokens = self.head(torch.cat([cls[:, None], registers, patches], dim=1))  # [B, N, W]
        ours = tokens[:, 1 + registers.shape[1] :]  # [B, P, W]
        parts = [tokens[:, 0]] if self.config.use_class_token else []
        if self.config.use_patch_tokens:
            parts.append(ours.mean(dim=1) if self.config.pooler == "mean" else ours.amax(dim=1))
        return torch.cat(parts, dim=-1), ours, patches


class DinoTxt(nn.Module):
    """Both towers and the temperature between them.

    Args:
        config: The architecture.
        backbone: Features to align with; it is frozen here, and its weights are left alone.
        device: Where the other parameters live, `meta` included.
        dtype: Of the other parameters.

    Raises:
        ConfigError: The backbone's width does not suit the heads of attention.
    """

    def __init__(
        self,
        config: DinoTxtConfig,
        backbone: Backbone,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.logit_scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.visual_model = VisionTower(config, backbone, device=device, dtype=dtype)
        text = dataclasses.replace(config.text, out_dim=config.embed_dim)
        self.text_model = TextTransformer(text, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights of all but the backbone, as after `to_empty`."""
        nn.init.constant_(self.logit_scale, self.config.init_logit_scale)
        self.visual_model.head.reset_parameters()
        self.text_model.reset_parameters()

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Choose where training draws stochastic depth from; None stands for the default one."""
        self.visual_model.head.generator = generator

    def trainable(self) -> dict[str, nn.Module]:
        """All modules but the frozen backbone, by state-dict prefix; `logit_scale` is in none."""
        return {
            "visual_model.head": self.visual_model.head,
            "text_model.backbone": self.text_model.backbone,
            "text_model.head": self.text_model.head,
        }

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters but the frozen backbone's, by state-dict name, the scale included."""
        frozen = "visual_model.backbone."
        named = self.named_parameters()
        return {name: value for name, value in named if not name.startswith(frozen)}

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the inverse temperature within [1, 100]; call it after every optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of images [B, 3, H, W]; of unit length where `normalize`."""
        return self.encode_image_with_patch_tokens(images, normalize=normalize)[0]

    def encode_image_with_patch_tokens(
        self, images: Tensor, normalize: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and of their patches.

        Args:
            images: [B, 3, H, W].
            normalize: Give the image features unit length; patches stay as they are.

        Returns:
            Image features [B, E], patches P' [B, P, W] and those of the backbone [B, P, D].
        """
        features, patches, backbone_patches = self.visual_model(images)
        if normalize:
            features = _unit(features)
        return features, patches, backbone_patches

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of token ids [B, N]; of unit length where `normalize`.

        Raises:
            DataError: There are more tokens than positions.
        """
        features: Tensor = self.text_model(tokens)
        return _unit(features) if normalize else features

    def get_logits(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of every image with every caption, and their transpose."""
        image = self.encode_image(images, normalize=True)
        text = self.encode_text(tokens, normalize=True)
        logits = self.logit_scale.exp() * image @ text.mT  # [images, captions]
        return logits, logits.mT

    def forward(
        self, images: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything the losses need of B pairs.

        Returns:
            Unit image and text features [B, E], the scale exp(logit_scale) [1], patches P'
            [B, P, W] and those of the backbone [B, P, D].
        """
        image, patches, backbone_patches = self.encode_image_with_patch_tokens(
            images, normalize=True
        )
        text = self.encode_text(tokens, normalize=True)
        return image, text, self.logit_scale.exp(), patches, backbone_patches


def _unit(features: Tensor) -> Tensor:
    # at least fp32: a length rounded to bf16 shifts all logits of a row by parts in a thousand
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _num_heads(backbone: Backbone) -> int:
    heads: int = getattr(backbone, "num_heads", max(1, backbone.embed_dim // 64))
    return heads


def _build_block(config: DinoTxtConfig, dim: int, num_heads: int, factory: dict[str, Any]) -> Block:
    if dim % num_heads:
        msg = f"head_num_heads: must divide the backbone's width {dim}, got {num_heads}. Set it."
        raise ConfigError(msg)
    return Block(
        norm1=build_norm(_NORM, dim, **factory),
        attn=PlainAttention(dim, num_heads, **factory),
        ls1=LayerScale(dim, init=_LAYERSCALE, **factory),
        norm2=build_norm(_NORM, dim, **factory),
        mlp=build_ffn("swiglu64", dim, ratio=config.head_ffn_ratio, **factory),
        ls2=LayerScale(dim, init=_LAYERSCALE, **factory),
        drop_path=config.head_drop_path,
    )
