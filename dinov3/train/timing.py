"""Where a training step's time goes: the parts of the step the trainer takes, timed apart.

The phase is the trainer's own; clocks stand around its parts, so nothing is built a second time.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from dinov3.config import TrainConfig
from dinov3.data.loader import ImageSet, TrainingLoader
from dinov3.train.self_distillation import SelfDistillationPhase

PARTS = ("waiting", "augmentation", "teacher", "student", "loss", "backward", "optimizer")
_NUM_WARM_UP = 3


class Clock:
    """Adds up seconds by the name of the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work; what it takes is added to the part."""

        @functools.wraps(work)
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = work(*arguments, **named)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began
            return result

        return run

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Stands around a method of one object."""
        setattr(owner, method, self.timed(part, getattr(owner, method)))


def step_split(config: TrainConfig, images: ImageSet, *, num_steps: int) -> dict[str, float]:
    """Shares of a training step, the parts of PARTS adding up to 1, and what a step takes.

    `backward` is all of a step that no other part accounts for.

    Args:
        config: The recipe; its device is the CPU here.
        images: Training images.
        num_steps: Steps that are timed, after a few that are not.

    Returns:
        The shares, `seconds_per_step` and `images_per_second`.
    """
    phase = SelfDistillationPhase(config, images, torch.device("cpu"))
    clock = _watched(phase)
    loader = iter(training_loader(phase, images, _NUM_WARM_UP + num_steps))
    fetch = clock.timed("waiting", functools.partial(next, loader))
    step = clock.timed("step", phase.step)
    for number in range(_NUM_WARM_UP + num_steps):
        if number == _NUM_WARM_UP:
            clock.seconds.clear()
        step(fetch())
    seconds = clock.seconds
    inner = sum(value for part, value in seconds.items() if part not in {"step", "waiting"})
    total = seconds["waiting"] + seconds["step"]
    seconds["backward"] = seconds["step"] - inner
    return {
        **{part: seconds[part] / total for part in PARTS},
        "seconds_per_step": total / num_steps,
        "images_per_second": config.optim.batch_size * num_steps / total,
    }


def _watched(phase: SelfDistillationPhase) -> Clock:
    clock = Clock()
    clock.watch(phase, "shares", "augmentation")
    for method, part in (("targets", "teacher"), ("predictions", "student"), ("terms", "loss")):
        clock.watch(phase.method, method, part)
    clock.watch(phase.learner, "update", "optimizer")
    return clock


def training_loader(
    phase: SelfDistillationPhase, images: ImageSet, num_steps: int
) -> TrainingLoader:
    """The first steps' batches, as the recipe wants them."""
    config = phase.config
    return TrainingLoader(
        images,
        augmentation=phase.pipeline,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        start_step=0,
        num_steps=num_steps,
        num_workers=config.run.num_workers,
        rows=phase.rows,
    )
