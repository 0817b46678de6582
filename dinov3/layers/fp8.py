"""Linear layers that multiply in fp8: half the bytes and twice the rate of bf16 matrix units.

Every row of activations and weights is scaled by its own largest magnitude to float8_e4m3fn. The
outputs and the gradient of the input are products of such rows; the gradient of the weight, which
sums over all tokens and tolerates least, stays in bf16. The parameters stay what they are.
"""

# T tokens, K input features, N output features

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import ConfigError
from dinov3.layers.attention import KeyMaskedLinear

FEATURE_MULTIPLE = 16  # of both sides of a weight: what fp8 matrix units take

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max  # 448
_SMALLEST_AMAX = 1e-12  # a row of zeros has a scale too
_LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


class Quantized(NamedTuple):
    """Rows in fp8; `values * scale` approximates what they were made of."""

    values: Tensor  # [R, C] float8_e4m3fn
    scale: Tensor  # [R, 1] fp32


def quantize_rows(x: Tensor) -> Quantized:
    """Scale every row of [R, C] so that its largest magnitude becomes the largest of fp8."""
    return _quantize(x, x.abs().amax(-1, keepdim=True))


def quantize_whole(x: Tensor) -> Quantized:
    """Scale all rows of [R, C] alike: such a matrix may be transposed after quantisation."""
    return _quantize(x, x.abs().amax().expand(len(x), 1))


def _quantize(x: Tensor, amax: Tensor) -> Quantized:
    scale = amax.float().clamp(min=_SMALLEST_AMAX) / _LARGEST  # [R, 1]
    return Quantized((x.float() / scale).to(_FP8), scale)


def multiply(a: Quantized, b: Quantized, *, fast: bool) -> Tensor:
    """Product a @ b.T of rows [T, C] and [R, C] as bf16 [T, R].

    Args:
        a: The left factor.
        b: The right factor, transposed.
        fast: Let Hopper accumulate in fewer bits; enough for outputs, not for gradients.
    """
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        a.values,
        b.values.t(),
        a.scale.contiguous(),
        by_row,
        b.scale.t().contiguous(),
        by_row,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return multiply(quantize_rows(x), quantize_rows(weight), fast=True).to(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients  # [T, N]
        x, weight = context.saved_tensors  # [T, K], [N, K]
        of_x, of_weight = None, None
        if context.needs_input_grad[0]:
            values, scale = quantize_whole(weight)
            turned = Quantized(values.t().contiguous(), scale[:1].expand(weight.shape[1], 1))
            of_x = multiply(quantize_rows(gradient), turned, fast=False).to(x.dtype)
        if context.needs_input_grad[1]:
            product = gradient.to(torch.bfloat16).t() @ x.to(torch.bfloat16)
            of_weight = product.to(weight.dtype)
        return of_x, of_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map x to x @ weight.T + bias with fp8 products, in the dtype of `x`.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
    """
    product: Tensor = _Multiply.apply(x.flatten(0, -2), weight)  # [T, N]
    product = product.unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias.to(product.dtype)


class Fp8Linear(nn.Linear):
    """`nn.Linear` with fp8 products."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        return linear(x, self.weight, self.bias)


class Fp8KeyMaskedLinear(KeyMaskedLinear):
    """`KeyMaskedLinear` with fp8 products."""

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., D] to [..., 3 * D]."""
        return linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


_IN_FP8: dict[type[nn.Linear], type[nn.Linear]] = {
    nn.Linear: Fp8Linear,
    KeyMaskedLinear: Fp8KeyMaskedLinear,
}


def require_fp8(device: torch.device) -> None:
    """Refuse a device without fp8 matrix units.

    Raises:
        ConfigError: It is not CUDA, or older than compute capability 8.9.
    """
    found = device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _LEAST_CAPABILITY:
            return
        found = f"cuda of {'.'.join(map(str, capability))}"
    msg = (
        "compute.fp8: needs a CUDA device of compute capability 8.9 or newer, "
        f"got {found}. Set compute.fp8=false."
    )
    raise ConfigError(msg)


def use_fp8(module: nn.Module) -> int:
    """Let every linear layer below a module multiply in fp8, in place; names stay as they are.

    Returns:
        How many layers there are.

    Raises:
        ConfigError: The features of one of them are no multiples of 16.
    """
    count = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or type(layer) not in _IN_FP8:
            continue
        sizes = layer.in_features, layer.out_features
        if any(size % FEATURE_MULTIPLE for size in sizes):
            msg = (
                f"compute.fp8: features must be multiples of {FEATURE_MULTIPLE}, got "
                f"{sizes[0]} to {sizes[1]} in {name}. Use ffn=swiglu64, or set compute.fp8=false."
            )
            raise ConfigError(msg)
        layer.__class__ = _IN_FP8[type(layer)]
        count += 1
    return count
