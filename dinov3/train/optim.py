"""AdamW: parameter groups with their multipliers, schedules laid over them, gradient clipping.

Embeddings and early blocks learn more slowly (layerwise decay), the patch projection slower still;
vectors (biases, norms, LayerScale) are not decayed. CLS, registers and mask token are decayed, as
in the published runs.
"""

# L blocks

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, optim

_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "storage_tokens")


def parameter_groups(
    module: nn.Module,
    *,
    name: str,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    wd_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of one sub-module, one per combination of multipliers.

    Args:
        module: A backbone or a head. Only one with `blocks` gets layerwise decay.
        name: Of the sub-module; goes before the names of its parameters.
        layerwise_decay: Learning-rate factor per block, counted from the output.
        patch_embed_lr_mult: Further factor for the patch projection.
        wd_mult: Weight-decay factor of those parameters that are decayed, for heads.

    Returns:
        Per group: params, names, lr_mult, wd_mult, is_last_layer; in order of first appearance.
    """
    num_blocks = len(getattr(module, "blocks", ()))
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for key, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_mult = _layer_decay(key, layerwise_decay, num_blocks)
        if "patch_embed" in key:
            lr_mult *= patch_embed_lr_mult
        # by shape, not by name: names miss the norms between ConvNeXt's stages
        decay = wd_mult if parameter.ndim > 1 else 0.0
        is_last_layer = "last_layer" in key
        group = groups.setdefault(
            (lr_mult, decay, is_last_layer),
            {
                "params": [],
                "names": [],
                "lr_mult": lr_mult,
                "wd_mult": decay,
                "is_last_layer": is_last_layer,
            },
        )
        group["params"].append(parameter)
        group["names"].append(f"{name}.{key}")
    return list(groups.values())


def build_adamw(
    groups: list[dict[str, Any]], betas: tuple[float, float], *, eps: float = 1e-8
) -> optim.AdamW:
    """AdamW over groups of `parameter_groups`; idle until `apply_schedule` sets its rates.

    Fused: one kernel for all parameters of a group, on CPU and CUDA.
    """
    return optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def apply_schedule(
    optimizer: optim.Optimizer, lr: float, weight_decay: float, last_layer_lr: float
) -> None:
    """Set this step's learning rate and weight decay of every group.

    Args:
        optimizer: Made of groups of `parameter_groups`.
        lr: Before the group's multiplier.
        weight_decay: Before the group's multiplier.
        last_layer_lr: In place of `lr` for the prototypes, which rest in the first steps.
    """
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def clip_gradients(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient norm of each sub-module by itself.

    Returns:
        Norm before clipping per sub-module, unsynchronised. Where it is not finite the gradients
        are unusable and the step must not be taken.
    """
    return {
        name: nn.utils.clip_grad_norm_(module.parameters(), max_norm).detach()
        for name, module in modules.items()
    }


def _layer_decay(key: str, decay: float, num_blocks: int) -> float:
    """decay^(L + 1) for embeddings, decay^(L - i) for block i, 1 for the rest."""
    if not num_blocks:
        return 1.0
    if any(word in key for word in _EMBEDDINGS):
        return decay ** (num_blocks + 1)
    block = re.match(r"blocks\.(\d+)\.", key)
    return decay ** (num_blocks - int(block[1])) if block else 1.0
