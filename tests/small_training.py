"""What tests of training share: tiny networks, drawn pictures, crops of noise, one learner."""

import hashlib
from dataclasses import replace

import torch

from dinov3.config import HeadConfig, HeadsConfig
from dinov3.data.masking import sample_masks
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.train.build import build_optimizer, build_pair
from dinov3.train.learner import Learner
from dinov3.train.method import SelfDistillation, Share
from dinov3.train.objective import Objective
from dinov3.train.schedules import Schedule
from tests.drawn import draw

VIT = {
    "arch": "vit",
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "num_registers": 1,
    "layerscale": 0.1,
}
HEAD = HeadConfig(num_prototypes=16, num_layers=2, hidden_dim=24, bottleneck_dim=8)
HEADS = HeadsConfig(dino=HEAD, ibot=HEAD, last_layer_gain=5.0)
OBJECTIVE = Objective(
    dino=1.0,
    ibot=0.7,
    koleo=0.1,
    koleo_group_size=None,
    student_temperature=0.1,
    ignore_diagonal=True,
)
BATCH, NUM_LOCAL = 4, 3


class OptimSettings:
    """As the recipe's `optim`, in plain values."""

    layerwise_decay = 1.0
    patch_embed_lr_mult = 1.0
    betas = (0.9, 0.999)


def constant(value, num_steps=1000):
    return Schedule(value, value, value, 0, num_steps, cosine_steps=0)


def a_learner(*, seed=0, name="", **values):
    """Student and EMA of equal weights; `values` are schedules or fields of the ViT, by name."""
    fields = {key: values.pop(key) for key in ("drop_path", "rope_jitter") if key in values}
    student, ema = build_pair({**VIT, **fields}, HEADS, seed)
    numbers = {
        "lr": 1e-3,
        "weight_decay": 0.04,
        "teacher_temperature": 0.05,
        "momentum": 0.9,
        "local_loss_weight": 1.0,
        **values,
    }
    return Learner(
        name=name,
        student=student,
        ema=ema,
        parts=student.parts(),
        optimizer=build_optimizer(student.parts(), OptimSettings),
        schedules={key: constant(value) for key, value in numbers.items()},
        clip=3.0,
    )


def a_method(gram=None, *, masks_input=True, learner=None, objective=OBJECTIVE, **aims):
    return SelfDistillation(
        learner or a_learner(),
        replace(objective, **aims),
        seed=0,
        gram=gram,
        masks_input=masks_input,
    )


def a_share(batch=BATCH, *, seed=1, gram_size=None, size=32):
    """Noise crops of a whole batch and their masks."""
    generator = torch.Generator().manual_seed(seed)
    global_crops = torch.randn(2 * batch, 3, size, size, generator=generator)
    local_crops = torch.randn(NUM_LOCAL * batch, 3, 16, 16, generator=generator)
    side = size // VIT["patch_size"]
    masks = sample_masks(2 * batch, (side, side), probability=0.5, ratio=(0.1, 0.5), seed=0, step=0)
    gram = None
    if gram_size is not None:
        gram = torch.randn(2 * batch, 3, gram_size, gram_size, generator=generator)
    return Share(global_crops, local_crops, torch.from_numpy(masks.copy()), gram)


def cut_share(share, parts):
    """A share as so many equal micro-batches."""
    size = share.num_images // parts

    def part(crops, first):
        by_crop = crops.unflatten(0, (-1, share.num_images))
        return by_crop[:, first : first + size].flatten(0, 1)

    return [
        Share(
            part(share.global_crops, first),
            part(share.local_crops, first),
            part(share.masks, first),
            None if share.gram_crops is None else part(share.gram_crops, first),
            position=share.position + first,
        )
        for first in range(0, share.num_images, size)
    ]


def copy_of(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def drawn_images(folder, num_images=12, size=(60, 50)):
    """Pictures drawn into a folder, as training images."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        draw(number, hue=number / num_images, size=size).save(folder / f"{number:03d}.png")
    source = open_source(f"folder:{folder}")
    paths = [entry.path for entry in source.entries()]
    digests = [hashlib.sha256(source.read(path)).hexdigest() for path in paths]
    return SourceImages(source, paths, digests)
