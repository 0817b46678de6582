"""Where a training step's time goes: the parts of one step, timed apart on one thread."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinov3.config import TrainConfig
from dinov3.data.loader import ImageSet, TrainingLoader
from dinov3.train.build import (
    build_augmentation,
    build_method,
    build_optimizer,
    build_schedules,
    masks_of_step,
)
from dinov3.train.ema import ema_update
from dinov3.train.optim import apply_schedule, clip_gradients

PARTS = ("waiting", "augmentation", "teacher", "student", "loss", "backward", "optimizer")
_NUM_WARM_UP = 3


class _Clock:
    """Adds up seconds by the name of the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


def step_split(config: TrainConfig, images: ImageSet, *, num_steps: int) -> dict[str, float]:
    """Shares of a training step, the parts of PARTS adding up to 1, and `seconds_per_step`.

    Args:
        config: The recipe; its device is the CPU here.
        images: Training images.
        num_steps: Steps that are timed, after a few that are not.
    """
    device = torch.device("cpu")
    method = build_method(config, device)
    optimizer = build_optimizer(config, method.student)
    schedules, augmentation = build_schedules(config), build_augmentation(config)
    clock = _Clock()
    loader = iter(
        TrainingLoader(
            images,
            augmentation=augmentation,
            batch_size=config.optim.batch_size,
            seed=config.seed,
            start_step=0,
            num_steps=_NUM_WARM_UP + num_steps,
            num_workers=config.run.num_workers,
        )
    )
    for step in range(_NUM_WARM_UP + num_steps):
        if step == _NUM_WARM_UP:
            clock = _Clock()
        now = schedules.at(step)
        with clock("waiting"):
            batch = next(loader)
        with clock("augmentation"):
            global_crops, local_crops = augmentation.apply(batch, device)
            masks = masks_of_step(config, len(global_crops), step)
        with clock("teacher"):
            targets = method.targets(global_crops, masks, now["teacher_temperature"])
        with clock("student"):
            predictions = method.predictions(global_crops, local_crops, masks)
        with clock("loss"):
            loss = method.terms(predictions, targets, masks)["loss"]
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            clip_gradients(method.student.parts(), config.optim.clip)
            apply_schedule(optimizer, now["lr"], now["weight_decay"], now["last_layer_lr"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema_update(method.teacher, method.student, now["momentum"])
    total = sum(clock.seconds.values())
    return {
        **{part: clock.seconds[part] / total for part in PARTS},
        "seconds_per_step": total / num_steps,
    }
