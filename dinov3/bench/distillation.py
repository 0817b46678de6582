"""Two students on one pass of their teacher, against two runs that each show it everything.

Timed are whole steps on batches that are there already: the teacher's pass, every student's forward
and backward pass, its update and its EMA.
"""

import json
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3.bench.pictures import DrawnImages
from dinov3.bench.rounds import times_in_turns
from dinov3.config import DistillConfig, TrainConfig
from dinov3.data.augment import Batch
from dinov3.data.loader import TrainingLoader
from dinov3.recipe import load_recipe
from dinov3.train.build import build_pair
from dinov3.train.distillation import DistillationPhase
from dinov3.train.network import Network

_PATCH = 16
_CROPS = {"global_size": 64, "local_size": 32}  # pixels
_HEAD = {"num_prototypes": 256, "num_layers": 3, "hidden_dim": 256, "bottleneck_dim": 128}


class Shape(NamedTuple):
    """Size of a vision transformer."""

    embed_dim: int
    depth: int
    num_heads: int


VIT_L = Shape(1024, 8, 16)  # as wide as ViT-L, a third as deep
VIT_S = Shape(384, 4, 6)  # as wide as ViT-S, a third as deep


def distillation_ratio(
    teacher: Shape = VIT_L, student: Shape = VIT_S, *, batch_size: int = 4, num_rounds: int = 5
) -> dict[str, float]:
    """Time of a step that trains two students together, as a share of two steps of one each.

    Args:
        teacher: The frozen network.
        student: Both students.
        batch_size: Images per step.
        num_rounds: Of which the medians are taken.

    Returns:
        `ratio` of times, `ratio_of_flops`, and how many times a student's floating-point operations
        per step, backward pass included, the teacher's are.
    """
    torch.set_num_threads(1)
    network = _teacher(teacher)
    phases = {
        name: _phase(network, student, names, batch_size)
        for name, names in (("together", ["one", "two"]), ("one", ["one"]), ("two", ["two"]))
    }
    steps = {name: partial(phase.step, _batch(phase)) for name, phase in phases.items()}
    both, alone = _flops(steps["together"]), _flops(steps["one"])
    seconds = {name: median(values) for name, values in times_in_turns(steps, num_rounds).items()}
    return {
        "ratio": seconds["together"] / (seconds["one"] + seconds["two"]),
        "ratio_of_flops": both / (2 * alone),
        "teacher_flops_per_student": (2 * alone - both) / (both - alone),
        "seconds_together": seconds["together"],
        "images_per_second_together": batch_size / seconds["together"],
    }


def _teacher(shape: Shape) -> Network:
    recipe = load_recipe("demo", phase="pretrain")
    tree = recipe.model_dump(mode="json")
    tree["model"] |= {**shape._asdict(), "patch_size": _PATCH}
    tree["heads"] |= {"dino": _HEAD, "ibot": _HEAD}
    tree["crops"] |= _CROPS
    config = TrainConfig.model_validate_json(json.dumps(tree))
    return build_pair(config.model.model_dump(), config.heads, config.seed)[1]


def _phase(
    teacher: Network, shape: Shape, names: Sequence[str], batch_size: int
) -> DistillationPhase:
    tree: dict[str, Any] = load_recipe("demo", phase="distill").model_dump(mode="json")
    student = tree["students"]["vits"]
    student["model"] |= {**shape._asdict(), "patch_size": _PATCH}
    student["heads"] |= {"dino": _HEAD, "ibot": _HEAD}
    student["crops"] |= _CROPS
    tree |= {"students": dict.fromkeys(names, student), "batch_size": batch_size}
    tree["crops"] |= {"global_size": _CROPS["global_size"], "num_local": 2}
    tree["health"]["num_images"] = 2
    config = DistillConfig.model_validate_json(json.dumps(tree))
    images = DrawnImages(2 * batch_size, 96)
    cpu = torch.device("cpu")
    return DistillationPhase(config, images, cpu, teacher=teacher, teacher_patch=_PATCH)


def _batch(phase: DistillationPhase) -> Batch:
    config = phase.config
    loader = TrainingLoader(
        DrawnImages(2 * config.batch_size, 96),
        augmentation=phase.pipeline,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=0,
        num_steps=1,
        num_workers=0,
    )
    return next(iter(loader))


def _flops(step: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
