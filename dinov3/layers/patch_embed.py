"""Cut an image into square patches and project each one to the model's width."""

# B images, C channels, H x W pixels, h x w = P patches, D width

import math

import torch
from torch import Tensor, nn

from dinov3.errors import DataError


class PatchEmbed(nn.Module):
    """A strided convolution; as in the reference, pixels that fill no patch are cut off."""

    def __init__(
        self,
        *,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(
            in_chans,
            embed_dim,
            kernel_size=patch_size,
            stride=patch_size,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-sqrt(k), sqrt(k)), k = 1 / (channels * patch area)."""
        bound = 1 / math.sqrt(self.proj.in_channels * self.patch_size**2)
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, images: Tensor) -> Tensor:
        """Embed [B, C, H, W] as [B, h, w, D].

        Raises:
            DataError: The images are not such a batch, or smaller than one patch.
        """
        channels = self.proj.in_channels
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or min(images.shape[2:]) < self.patch_size
        ):
            msg = (
                f"images: not a batch of shape [B, {channels}, H, W] with sides of at least "
                f"{self.patch_size} pixels, got {list(images.shape)}. Reshape or enlarge them."
            )
            raise DataError(msg)
        embedded: Tensor = self.proj(images)  # [B, D, h, w]
        return embedded.permute(0, 2, 3, 1)  # [B, h, w, D]


def mask_patches(patches: Tensor, masks: Tensor, mask_token: Tensor) -> Tensor:
    """Replace the masked patches of [B, P, D] by the mask token [1, D].

    Raises:
        DataError: The masks are not one boolean per patch.
    """
    if masks.dtype != torch.bool or masks.shape != patches.shape[:2]:
        msg = (
            f"masks: not boolean of shape {list(patches.shape[:2])}, got {masks.dtype} of "
            f"{list(masks.shape)}. Pass one flag per patch."
        )
        raise DataError(msg)
    return torch.where(masks.unsqueeze(-1), mask_token.to(patches.dtype), patches)
