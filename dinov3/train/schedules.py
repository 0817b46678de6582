"""Schedules as pure functions of the step; nothing is precomputed, so nothing needs saving.

Two families exist in the published recipes: a cosine that stops one step short of its end
(optionally truncated), and linear warm-up, cosine, constant. Recipes here use the second.
"""

import math
from dataclasses import dataclass

from dinov3.errors import ConfigError


def cosine_schedule(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start_warmup: float = 0.0,
    freeze_steps: int = 0,
    trunc_extra: float = 0.0,
) -> float:
    """Zero while frozen, linear warm-up that ends on `base`, then cosine towards `final`.

    Args:
        step: From 0; from `total_steps` on the value is `final`.
        base: Value at the end of the warm-up.
        final: Value after the last step.
        total_steps: All steps, frozen ones and warm-up included.
        warmup_steps: The last of them already has the value `base`.
        start_warmup: Value at the first step of the warm-up.
        freeze_steps: Steps before the warm-up, with value 0.
        trunc_extra: Lay the cosine over (1 + trunc_extra) times its steps and stretch what is left
            so that the last step has the value `final`.
    """
    if step >= total_steps:
        return final
    if step < freeze_steps:
        return 0.0
    index = step - freeze_steps
    if index < warmup_steps:
        return start_warmup + (base - start_warmup) * index / max(warmup_steps - 1, 1)
    index -= warmup_steps
    num_steps = total_steps - freeze_steps - warmup_steps
    if trunc_extra == 0:
        return final + (base - final) * _fall(index, num_steps)
    # the divisor is one less than the number of steps here, unlike above; so are published runs
    divisor = int((1 + trunc_extra) * num_steps) - 1
    lowest = _fall(num_steps - 1, divisor)
    return final + (base - final) * (_fall(index, divisor) - lowest) / (1 - lowest)


def linear_warmup_cosine(
    step: int,
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    total_steps: int,
    cosine_steps: int | None = None,
) -> float:
    """Linear from `start` to `peak`, cosine to `end`, then constant.

    Args:
        step: From 0; beyond `total_steps` the value stays `end`.
        start: Value at step 0.
        peak: Value at step `warmup_steps`.
        end: Value at the last step of the cosine and ever after.
        warmup_steps: Steps below `peak`.
        total_steps: All steps.
        cosine_steps: Length of the cosine; all that remain if None.
    """
    if step >= total_steps:
        return end
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    index = step - warmup_steps
    num_steps = total_steps - warmup_steps if cosine_steps is None else cosine_steps
    if index >= num_steps:
        return end
    return end + (peak - end) * _fall(index, max(num_steps - 1, 1))


@dataclass(frozen=True)
class Schedule:
    """`linear_warmup_cosine` with its numbers filled in; call it with a step.

    Attributes:
        start: Value at step 0.
        peak: Value at step `warmup_steps`.
        end: Value at the end of the cosine and at every later step, also beyond `total_steps`.
        warmup_steps: Steps below `peak`.
        total_steps: Steps of the run.
        cosine_steps: Length of the cosine; all that remain if None.
        freeze_steps: The first so many steps give 0 whatever the rest says.

    Raises:
        ConfigError: Negative lengths, or a warm-up and cosine longer than the run.
    """

    start: float
    peak: float
    end: float
    warmup_steps: int
    total_steps: int
    cosine_steps: int | None = None
    freeze_steps: int = 0

    def __post_init__(self) -> None:
        lengths = (self.warmup_steps, self.cosine_steps or 0)
        if min(*lengths, self.freeze_steps) < 0:
            msg = f"schedule: lengths must not be negative, got {self}. Use 0 or more steps."
            raise ConfigError(msg)
        if sum(lengths) > self.total_steps:
            msg = (
                f"schedule: warmup_steps and cosine_steps must fit into the {self.total_steps} "
                f"steps of the run, got {lengths[0]} + {lengths[1]}. Shorten them or train longer."
            )
            raise ConfigError(msg)

    def __call__(self, step: int) -> float:
        """The value at a step."""
        if step < self.freeze_steps:
            return 0.0
        return linear_warmup_cosine(
            step,
            start=self.start,
            peak=self.peak,
            end=self.end,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            cosine_steps=self.cosine_steps,
        )


def scaled_lr(rule: str, lr: float, batch_size: int) -> float:
    """Learning rate for a batch, from the one stated for the rule's own batch.

    Args:
        rule: `linear_wrt_256`, `sqrt_wrt_1024` or `none`.
        lr: As the recipe states it. The square-root rule multiplies it by 4 at 1024 images: it was
            made to agree with the linear one there.
        batch_size: Images per step over all ranks.

    Raises:
        ConfigError: No rule has that name.
    """
    if rule == "linear_wrt_256":
        return lr * batch_size / 256
    if rule == "sqrt_wrt_1024":
        return lr * 4 * math.sqrt(batch_size / 1024)
    if rule == "none":
        return lr
    msg = f"lr_scaling: unknown rule, got {rule!r}. Use linear_wrt_256, sqrt_wrt_1024 or none."
    raise ConfigError(msg)


def _fall(index: int, divisor: int) -> float:
    """Half a cosine wave from 1 at index 0 to 0 at index `divisor`."""
    return (1 + math.cos(math.pi * index / divisor)) / 2
