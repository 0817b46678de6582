"""From a recipe to the parts of a run: models and losses take plain arguments, filled in here."""

from dataclasses import dataclass

import torch
from torch import Tensor, optim

from dinov3.config import HeadConfig, ScheduleConfig, TrainConfig
from dinov3.data.augment import Augmentation, CropRecipe
from dinov3.data.masking import sample_masks
from dinov3.models.vit import ViTConfig
from dinov3.train.method import HeadShape, Network, Objective, SelfDistillation
from dinov3.train.optim import build_adamw, parameter_groups
from dinov3.train.schedules import Schedule, scaled_lr


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run as functions of the step."""

    lr: Schedule
    last_layer_lr: Schedule
    weight_decay: Schedule
    teacher_temperature: Schedule
    momentum: Schedule

    def at(self, step: int) -> dict[str, float]:
        """Every value at one step."""
        return {name: getattr(self, name)(step) for name in self.__dataclass_fields__}


def build_network(config: TrainConfig, device: torch.device | None = None) -> Network:
    """A backbone with its heads, uninitialised where the device is `meta`."""
    fields = config.model.model_dump()
    return Network(
        ViTConfig.from_fields(fields), _shape(config.heads.dino), _shape(config.heads.ibot), device
    )


def build_method(config: TrainConfig, device: torch.device) -> SelfDistillation:
    """Student and teacher with equal weights drawn from the recipe's seed."""
    student = build_network(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student.reset_parameters(config.heads.last_layer_gain)
    teacher = build_network(config)
    teacher.load_state_dict(student.state_dict())
    return SelfDistillation(
        student.to(device), teacher.to(device), Objective(**config.losses.model_dump())
    )


def build_optimizer(config: TrainConfig, student: Network) -> optim.Optimizer:
    """AdamW over fused groups; the schedules set learning rate and weight decay each step."""
    settings = config.optim
    groups = [
        group
        for name, part in student.parts().items()
        for group in parameter_groups(
            part,
            name=name,
            layerwise_decay=settings.layerwise_decay,
            patch_embed_lr_mult=settings.patch_embed_lr_mult,
        )
    ]
    return build_adamw(groups, betas=settings.betas)


def build_schedules(config: TrainConfig) -> Schedules:
    """Schedules of the recipe; the scaling rule multiplies peak and end of the learning rate."""
    schedules, settings = config.schedules, config.optim

    def schedule(part: ScheduleConfig, scale: float = 1.0, freeze: int = 0) -> Schedule:
        return Schedule(
            part.start,
            part.peak * scale,
            part.end * scale,
            part.warmup_steps,
            schedules.num_steps,
            cosine_steps=part.cosine_steps,
            freeze_steps=freeze,
        )

    scale = scaled_lr(settings.lr_scaling, 1.0, settings.batch_size)
    return Schedules(
        lr=schedule(schedules.lr, scale),
        last_layer_lr=schedule(schedules.lr, scale, settings.freeze_last_layer_steps),
        weight_decay=schedule(schedules.weight_decay),
        teacher_temperature=schedule(schedules.teacher_temperature),
        momentum=schedule(schedules.momentum),
    )


def build_augmentation(config: TrainConfig) -> Augmentation:
    """The multi-crop pipeline of the recipe."""
    crops = config.crops
    return Augmentation(
        global_crops=(
            CropRecipe(crops.global_size, crops.global_scale, blur_probability=crops.blur[0]),
            CropRecipe(
                crops.global_size,
                crops.global_scale,
                blur_probability=crops.blur[1],
                solarize_probability=crops.solarize,
            ),
        ),
        local_crops=(
            CropRecipe(crops.local_size, crops.local_scale, blur_probability=crops.blur[2]),
        )
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
    )


def masks_of_step(config: TrainConfig, num_crops: int, step: int) -> Tensor:
    """Which patches of which global crops the student does not see, bool [num_crops, P]."""
    side = config.crops.global_size // config.model.patch_size
    masks = sample_masks(
        num_crops,
        (side, side),
        probability=config.masks.probability,
        ratio=config.masks.ratio,
        seed=config.seed,
        step=step,
    )
    return torch.from_numpy(masks)


def _shape(head: HeadConfig) -> HeadShape:
    return HeadShape(head.num_prototypes, head.num_layers, head.hidden_dim, head.bottleneck_dim)
