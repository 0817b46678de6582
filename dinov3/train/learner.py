"""One student being trained, with its EMA, optimizer and schedules; the guard stands here.

Guard order: losses finite, gradients finite, clip, optimizer, EMA. A step that is not finite
changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

from dinov3.distributed import Group, whole
from dinov3.train.ema import ema_update
from dinov3.train.optim import apply_schedule, clip_gradients
from dinov3.train.schedules import Schedule

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Outcome:
    """What a step did: its numbers, and the names of those that are not finite."""

    numbers: dict[str, float]
    bad: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """Whether the update was taken."""
        return not self.bad


@dataclass
class Learner:
    """A student and what belongs to it.

    Attributes:
        name: Of the student; empty where there is only one.
        student: Is trained.
        ema: Follows it; None where there is no average.
        parts: Sub-modules of the student that are clipped on their own.
        optimizer: Over the student's trainable parameters.
        schedules: lr and weight_decay, perhaps last_layer_lr and momentum, and what is only logged.
        clip: Largest gradient norm of a part; None leaves gradients as they are.
        group: The ranks that train it together.
        bad_steps: Non-finite steps in a row.
        health: As last measured.
    """

    name: str
    student: nn.Module
    ema: nn.Module | None
    parts: Mapping[str, nn.Module]
    optimizer: optim.Optimizer
    schedules: Mapping[str, Schedule]
    clip: float | None
    group: Group = None
    bad_steps: int = 0
    health: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the optimizer's state, so that every tensor of a run exists from the start."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    # fused AdamW counts on the parameters' device
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    **{name: torch.zeros_like(parameter) for name in _MOMENTS},
                }

    def at(self, step: int) -> dict[str, float]:
        """Every scheduled value at one step."""
        return {name: schedule(step) for name, schedule in self.schedules.items()}

    def update(self, step: int, losses: Mapping[str, float]) -> Outcome:
        """Takes the optimizer's step if losses and gradients are finite; gradients are used up.

        Args:
            step: Counted from 0.
            losses: Of this step, means over all ranks of the group.
        """
        now = self.at(step)
        norms: dict[str, float] = {}
        if all(map(math.isfinite, losses.values())):
            clipped = clip_gradients(self.parts, math.inf if self.clip is None else self.clip)
            norms = {f"gradient_norm/{name}": float(whole(norm)) for name, norm in clipped.items()}
        numbers = {**losses, **norms}
        bad = tuple(sorted(name for name, value in numbers.items() if not math.isfinite(value)))
        if not bad:
            last_layer_lr = now.get("last_layer_lr", now["lr"])
            apply_schedule(self.optimizer, now["lr"], now["weight_decay"], last_layer_lr)
            self.optimizer.step()
            if self.ema is not None:
                ema_update(self.ema, self.student, now["momentum"])
        self.bad_steps = self.bad_steps + 1 if bad else 0
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome({**numbers, **{f"schedule/{name}": v for name, v in now.items()}}, bad)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, live and by name."""
        prefix = f"{self.name}." if self.name else ""
        found = {f"{prefix}student.{name}": t for name, t in self.student.state_dict().items()}
        if self.ema is not None:
            found |= {f"{prefix}ema.{name}": t for name, t in self.ema.state_dict().items()}
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in self.optimizer.state[parameter].items():
                    found[f"{prefix}optimizer.{name}.{key}"] = value
        return found

    def facts(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {"bad_steps": self.bad_steps, "health": self.health}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Takes back what `facts` gave."""
        self.bad_steps, self.health = facts["bad_steps"], facts["health"]
