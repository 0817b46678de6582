"""The text tower of dino.txt (arXiv 2412.16334): a causal pre-norm transformer over byte pairs.

A caption is the feature of one token, by default that of the highest id, which is end-of-text.
Blocks take packed tokens as those of the vision transformer do, but nothing is rotated: positions
are a learned table.
"""

# B captions, N tokens, T = B * N packed tokens, D width, H heads, E features per head, L depth

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DataError
from dinov3.layers.attention import SelfAttention, Shapes, pack, unpack
from dinov3.layers.ffn import Mlp
from dinov3.layers.rope import Rotation
from dinov3.models.fields import config_of, require

TEXT_POOLERS = ("first", "last", "argmax")
_EPS = 1e-5  # of every LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The architecture of a text tower; the values are checked on construction.

    Attributes:
        embed_dim: Width D; a multiple of num_heads.
        context_length: Most tokens of a caption.
        vocab_size: Token ids run from 0 to this; 49408 is CLIP's vocabulary.
        ffn_ratio: Hidden size of the feed-forward network over the width.
        causal: A token attends only to itself and those before it.
        pooler: The token that stands for the caption: first, last, or the one of the highest id.
        out_dim: Width of the caption's feature; None keeps D and adds no projection.

    Raises:
        ConfigError: A value does not describe a tower.
    """

    embed_dim: int
    depth: int
    num_heads: int
    context_length: int = 77
    vocab_size: int = 49408
    ffn_ratio: float = 4.0
    causal: bool = True
    pooler: str = "argmax"
    out_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "context_length", "vocab_size", "out_dim"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1", value)
        require(self.ffn_ratio > 0, "ffn_ratio", "must be positive", self.ffn_ratio)
        rule = f"must be a multiple of num_heads = {self.num_heads}"
        require(self.embed_dim % self.num_heads == 0, "embed_dim", rule, self.embed_dim)
        rule = f"must be one of {', '.join(TEXT_POOLERS)}"
        require(self.pooler in TEXT_POOLERS, "pooler", rule, self.pooler)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a mapping, such as the `text` object of a config.json.

        Raises:
            ConfigError: A field is unknown, missing or has an impossible value.
        """
        return config_of(cls, fields, "a text tower")


class PlainAttention(SelfAttention):
    """Self-attention whose queries and keys are not rotated; without query, key and value biases.

    Args:
        dim: D.
        num_heads: H.
        causal: A token attends only to itself and those before it.
        device: Where the parameters live, `meta` included.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=False, device=device, dtype=dtype)
        self.causal = causal

    def forward(self, tokens: Tensor, shapes: Shapes, rotations: Sequence[Rotation] = ()) -> Tensor:
        """Attend over packed tokens [T, D].

        Args:
            tokens: All groups, one after the other.
            shapes: Of each group.
            rotations: Not used; a `Block` passes them.
        """
        groups = [self._mix(group) for group in unpack(self.qkv(tokens), shapes)]
        mixed: Tensor = self.proj(groups[0] if len(groups) == 1 else torch.cat(groups))
        return mixed

    def _mix(self, qkv: Tensor) -> Tensor:
        split = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, E]
        query, key, value = split.permute(2, 0, 3, 1, 4)  # [B, H, N, E]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)  # [T, D]


class TextBlock(nn.Module):
    """x += attention(norm(x)), then x += feed_forward(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn_ratio: float = 4.0,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.LayerNorm(dim, eps=_EPS, **factory)
        self.attention = PlainAttention(dim, num_heads, causal=causal, **factory)
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS, **factory)
        self.feed_forward = Mlp(dim, int(dim * ffn_ratio), **factory)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        """Transform packed tokens [T, D] of groups of the given shapes."""
        tokens = tokens + self.attention(self.attention_norm(tokens), shapes)
        transformed: Tensor = tokens + self.feed_forward(self.ffn_norm(tokens))
        return transformed

    def reset_parameters(self, depth: int) -> None:
        """Draw new weights; branches of deeper towers write less into the residual stream.

        Args:
            depth: Blocks of the tower, L.
        """
        width = self.attention.proj.in_features
        branch = width**-0.5 * (2 * depth) ** -0.5
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        for linear in (self.feed_forward.fc1, self.feed_forward.fc2):
            linear.reset_parameters()  # its biases stay as torch draws them
        nn.init.normal_(self.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.attention.proj.weight, std=branch)
        nn.init.zeros_(self.attention.proj.bias)
        nn.init.normal_(self.feed_forward.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.feed_forward.fc2.weight, std=branch)


class TextEncoder(nn.Module):
    """Token and position tables, blocks and a final norm: features of every token."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.embed_dim
        positions = torch.empty(config.context_length, width, **factory)
        self.positional_embedding = nn.Parameter(positions)
        self.token_embedding = nn.Embedding(config.vocab_size, width, **factory)
        self.blocks = nn.ModuleList(
            TextBlock(
                width,
                config.num_heads,
                ffn_ratio=config.ffn_ratio,
                causal=config.causal,
                **factory,
            )
            for _ in range(config.depth)
        )
        self.ln_final = nn.LayerNorm(width, eps=_EPS, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights: tokens N(0, 0.02), positions N(0, 0.01), blocks by width and depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            block.reset_parameters(len(self.blocks))
        self.ln_final.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Features [B, N, D] of token ids [B, N]."""
        longest = len(self.positional_embedding)
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
            shape = tuple(tokens.shape)
            msg = (
                f"tokens: must be [captions, 1 to {longest} ids], got {shape}. "
                f"Tokenize to a context of {longest}."
            )
            raise DataError(msg)
        embedded = self.token_embedding(tokens)
        embedded = embedded + self.positional_embedding[: tokens.shape[1]]  # [B, N, D]
        packed, shapes = pack([embedded])  # [T, D]
        for block in self.blocks:
            packed = block(packed, shapes)
        # unpacked before the norm: FSDP warns where a module returns a view
        normed: Tensor = self.ln_final(unpack(packed, shapes)[0])  # [B, N, D]
        return normed


class TextHead(nn.Module):
    """The projection from a token's feature to that of its caption."""

    def __init__(
        self,
        dim: int,
        out_dim: int | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear_projection: nn.Module = nn.Identity()
        if out_dim is not None:
            self.linear_projection = nn.Linear(dim, out_dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw N(0, 1 / D) weights."""
        if isinstance(self.linear_projection, nn.Linear):
            width = self.linear_projection.in_features
            nn.init.normal_(self.linear_projection.weight, std=width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Project the last dimension."""
        projected: Tensor = self.linear_projection(features)
        return projected


class TextTransformer(nn.Module):
    """A text tower; build it from a `TextConfig`, on the meta device too.

    `backbone` makes the features of all tokens, `head` projects the pooled one.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = TextEncoder(config, device=device, dtype=dtype)
        self.head = TextHead(config.embed_dim, config.out_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as after `to_empty`."""
        self.backbone.reset_parameters()
        self.head.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Features [B, out_dim] of token ids [B, N], which are zero after the end of the text.

        Raises:
            DataError: There are more tokens than positions.
        """
        features = self.backbone(tokens)  # [B, N, D]
        if self.config.pooler == "argmax":
            places = tokens.argmax(dim=-1)
        else:
            place = 0 if self.config.pooler == "first" else tokens.shape[1] - 1
            places = torch.full_like(tokens[:, 0], place)
        rows = torch.arange(len(tokens), device=tokens.device)
        # before the projection, which is linear: the same feature for an Nth of the work
        caption: Tensor = self.head(features[rows, places])  # [B, out_dim]
        return caption
