"""From a recipe to the parts of a run: models and losses take plain arguments, filled in here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from dinov3.config import (
    ComputeConfig,
    GramConfig,
    HeadConfig,
    HeadsConfig,
    MultiCropConfig,
    Resolution,
    ScheduleConfig,
    TrainConfig,
)
from dinov3.data.augment import Augmentation, CropRecipe, View
from dinov3.data.loader import Pipeline
from dinov3.data.masking import sample_masks
from dinov3.data.mixture import Mixture
from dinov3.distributed import Group, shard
from dinov3.errors import ConfigError
from dinov3.train.compute import prepare
from dinov3.train.network import HeadShape, Network
from dinov3.train.optim import build_adamw, parameter_groups
from dinov3.train.schedules import Schedule, scaled_lr

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def build_network(
    model: Mapping[str, Any], heads: HeadsConfig, device: torch.device | str | None = None
) -> Network:
    """A backbone with its heads, uninitialised where the device is `meta`."""
    return Network(dict(model), head_shape(heads.dino), head_shape(heads.ibot), device)


def build_pair(model: Mapping[str, Any], heads: HeadsConfig, seed: int) -> tuple[Network, Network]:
    """Student and EMA on the CPU, with equal weights drawn from the seed alone."""
    student = build_network(model, heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.reset_parameters(heads.last_layer_gain)
    ema = build_network(model, heads)
    ema.load_state_dict(student.state_dict())
    ema.requires_grad_(False)
    return student, ema


def place(
    module: nn.Module,
    parts: Mapping[str, nn.Module],
    compute: ComputeConfig,
    device: torch.device,
    group: Group = None,
    *,
    trains: bool,
) -> None:
    """Moves a network to its device; checkpoints, compiles and shards its blocks as asked."""
    module.to(device)
    prepare(parts.values(), compute, device, trains=trains)
    shard(parts.values(), device, dtype=DTYPES[compute.dtype], group=group)


def build_optimizer(parts: Mapping[str, nn.Module], settings: Any) -> optim.Optimizer:
    """AdamW over fused groups; the schedules set learning rate and weight decay each step.

    Args:
        parts: Sub-modules by name.
        settings: betas, layerwise_decay and patch_embed_lr_mult of the recipe.
    """
    groups = [
        group
        for name, part in parts.items()
        for group in parameter_groups(
            part,
            name=name,
            layerwise_decay=settings.layerwise_decay,
            patch_embed_lr_mult=settings.patch_embed_lr_mult,
        )
    ]
    return build_adamw(groups, betas=settings.betas)


def schedule(
    part: ScheduleConfig, num_steps: int, *, scale: float = 1.0, freeze: int = 0
) -> Schedule:
    """A schedule of the recipe; the scale multiplies peak and end."""
    return Schedule(
        part.start,
        part.peak * scale,
        part.end * scale,
        part.warmup_steps,
        num_steps,
        cosine_steps=part.cosine_steps,
        freeze_steps=freeze,
    )


def build_schedules(config: TrainConfig) -> dict[str, Schedule]:
    """Schedules of the recipe; the scaling rule multiplies peak and end of the learning rate."""
    parts, settings = config.schedules, config.optim
    total = parts.num_steps
    scale = scaled_lr(settings.lr_scaling, 1.0, settings.batch_size)
    frozen = settings.freeze_last_layer_steps
    found = {
        "lr": schedule(parts.lr, total, scale=scale),
        "last_layer_lr": schedule(parts.lr, total, scale=scale, freeze=frozen),
        "weight_decay": schedule(parts.weight_decay, total),
        "teacher_temperature": schedule(parts.teacher_temperature, total),
        "momentum": schedule(parts.momentum, total),
        "local_loss_weight": schedule(parts.local_loss_weight, total),
    }
    if config.gram is not None:
        found["gram_weight"] = schedule(config.gram.weight, total)
    return found


def build_pipeline(config: TrainConfig) -> Pipeline:
    """The multi-crop pipeline of the recipe, or a mixture of them."""
    pipelines = tuple(
        build_augmentation(config.crops, one.global_size, one.local_size, gram_views(config, one))
        for one in config.crops.resolutions
    )
    if len(pipelines) == 1:
        return pipelines[0]
    return Mixture(pipelines, tuple(one.probability for one in config.crops.resolutions))


def gram_views(config: TrainConfig, resolution: Resolution) -> tuple[View, ...]:
    """The crops of the Gram teacher, if it has its own."""
    if resolution.gram_size is None:
        return ()
    return (View("global", resolution.gram_size, config.crops.gram_distortions),)


def build_augmentation(
    crops: MultiCropConfig, global_size: int, local_size: int, views: tuple[View, ...] = ()
) -> Augmentation:
    """The multi-crop pipeline of one resolution."""
    first, second, local = crops.blur
    return Augmentation(
        global_crops=(
            CropRecipe(global_size, crops.global_scale, blur_probability=first),
            CropRecipe(
                global_size,
                crops.global_scale,
                blur_probability=second,
                solarize_probability=crops.solarize,
            ),
        ),
        local_crops=(CropRecipe(local_size, crops.local_scale, blur_probability=local),)
        * crops.num_local,
        horizontal_flip=crops.horizontal_flip,
        brightness=crops.brightness,
        contrast=crops.contrast,
        saturation=crops.saturation,
        hue=crops.hue,
        jitter=crops.jitter,
        grayscale=crops.grayscale,
        blur_sigma=crops.blur_sigma,
        mean=crops.mean,
        std=crops.std,
        backgrounds=crops.backgrounds,
        cache_size=crops.cache_size,
        views=views,
    )


def masks_of_step(
    masks: Any, side: int, *, batch_size: int, rows: range, seed: int, step: int
) -> Tensor:
    """Which patches of this rank's global crops the student does not see, bool [G*b, P].

    Args:
        masks: probability and ratio of the recipe.
        side: Patches along a side of a global crop.
        batch_size: Images of the whole step; masks are drawn for all of them together.
        rows: This rank's places among them.
        seed: Of the run.
        step: Of the run.
    """
    drawn = sample_masks(
        2 * batch_size,
        (side, side),
        probability=masks.probability,
        ratio=masks.ratio,
        seed=seed,
        step=step,
    )
    of_crops: Tensor = torch.from_numpy(drawn).unflatten(0, (2, batch_size))
    return of_crops[:, rows.start : rows.stop].flatten(0, 1)


def micro_batches(rows: range, count: int) -> list[range]:
    """A rank's rows in `count` equal parts.

    Raises:
        ConfigError: They cannot be divided so.
    """
    if len(rows) % count:
        msg = f"run.micro_batches: must divide the {len(rows)} rows of a rank, got {count}. Fix it."
        raise ConfigError(msg)
    size = len(rows) // count
    return [range(start, start + size) for start in range(0, len(rows), size)]


def head_shape(head: HeadConfig) -> HeadShape:
    """Sizes of a head."""
    return HeadShape(head.num_prototypes, head.num_layers, head.hidden_dim, head.bottleneck_dim)


def needs_gram_backbone(gram: GramConfig | None) -> bool:
    """Whether the Gram teacher has weights of its own."""
    return gram is not None and gram.teacher != "ema"
