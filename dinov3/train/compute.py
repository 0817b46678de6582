"""Compute options of a network, set before it is sharded: fp8, checkpointing, compilation.

All three change modules in place, and none changes the name of a parameter.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov3.config import ComputeConfig
from dinov3.distributed import blocks_of
from dinov3.errors import ConfigError
from dinov3.layers.fp8 import require_fp8, use_fp8

_aten = torch.ops.aten
# selective checkpointing keeps what is dear to compute again, not what is cheap and large
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_mm_v2.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
]
# one graph per shape, shared by blocks of equal shapes: resolutions x (student, frozen) x widths;
# past the limit torch would silently compute uncompiled
_MAX_GRAPHS = 64


def prepare(
    parts: Iterable[nn.Module], compute: ComputeConfig, device: torch.device, *, trains: bool
) -> None:
    """Turns on what the recipe asks for, in the order fp8, checkpointing, compilation.

    fp8 concerns the linear layers of blocks; activations are checkpointed per block; compiled are
    blocks, and parts without blocks (heads) as a whole.

    Args:
        parts: Backbones and heads on their device, not yet sharded.
        compute: The options.
        device: Where the parts are.
        trains: Whether gradients will be needed; activations are checkpointed only then.

    Raises:
        ConfigError: The device or the widths do not allow fp8.
    """
    parts = list(parts)
    if compute.fp8:
        require_fp8(device)
        _convert(parts)
    for part in parts:
        blocks = blocks_of(part)
        if trains and compute.checkpointing != "none":
            selective = compute.checkpointing == "selective"
            for block in blocks:
                block.__class__ = _recomputed(type(block), selective)  # type: ignore[arg-type]
        if compute.compile:
            for block in blocks:
                block.compile(dynamic=False, recompile_limit=_MAX_GRAPHS)
            if not blocks:  # heads see another number of masked patches each step
                part.compile(recompile_limit=_MAX_GRAPHS)


def _convert(parts: list[nn.Module]) -> None:
    if not sum(use_fp8(block) for part in parts for block in blocks_of(part)):
        kinds = ", ".join(type(part).__name__ for part in parts)
        msg = f"compute.fp8: no block has a linear layer, got {kinds}. Set compute.fp8=false."
        raise ConfigError(msg)


@functools.cache
def _recomputed(kind: type[nn.Module], selective: bool) -> type[nn.Module]:
    """The same kind of block, which drops its activations and computes them again.

    A subclass and no wrapper, so that names and `isinstance` hold. Blocks draw nothing, so that
    there is no random state to restore.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _KEPT)

    class Recomputed(kind):  # type: ignore[valid-type, misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*inputs, **named)
            return checkpoint(super().forward, *inputs, **options, **named)

    Recomputed.__name__ = Recomputed.__qualname__ = f"Recomputed{kind.__name__}"
    return Recomputed
