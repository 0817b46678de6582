"""How long a state that is written in the background holds up the training loop."""

import time
from pathlib import Path
from statistics import median

import torch

from dinov3.config import TrainConfig
from dinov3.data.loader import ImageSet
from dinov3.state import StateWriter
from dinov3.train.self_distillation import SelfDistillationPhase
from dinov3.train.timing import training_loader


def checkpoint_stall(
    config: TrainConfig,
    images: ImageSet,
    folder: Path,
    *,
    num_saves: int = 6,
    steps_between: int = 4,
) -> dict[str, float]:
    """What `StateWriter.save` takes inside a training loop, as shares of a step.

    Args:
        config: The recipe; its device is the CPU here.
        images: Training images.
        folder: Where states go.
        num_saves: How many are timed, after a first that also allocates memory.
        steps_between: Steps from one to the next.

    Returns:
        `stall_share` of the median step; `waiting_share`, what the same write takes where the loop
        waits for it; `next_step`, the step beside which a state is being written, in median steps.
    """
    torch.set_num_threads(1)
    phase = SelfDistillationPhase(config, images, torch.device("cpu"))
    steps: list[float] = []
    stalls: list[float] = []
    with StateWriter(folder, keep=1) as writer:
        for batch in training_loader(phase, images, steps_between * (num_saves + 1) + 1):
            began = time.perf_counter()
            phase.step(batch)
            steps.append(time.perf_counter() - began)
            if len(steps) % steps_between == 0:
                stalls.append(_save(writer, phase, len(steps)))
        waiting = [_save(writer, phase, len(steps), wait=True) for _ in range(num_saves)]
    usual = median(steps[1:])
    return {
        "stall_share": median(stalls[1:]) / usual,
        "first_stall_share": stalls[0] / usual,
        "waiting_share": median(waiting) / usual,
        "next_step": median(steps[2 * steps_between :: steps_between]) / usual,
        "seconds_per_step": usual,
    }


def _save(
    writer: StateWriter, phase: SelfDistillationPhase, step: int, *, wait: bool = False
) -> float:
    began = time.perf_counter()
    writer.save(step, phase.tensors(), {"method": phase.facts()}, wait=wait)
    return time.perf_counter() - began
