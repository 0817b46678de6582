"""The teacher: an exponential moving average of the student's parameters."""

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov3.errors import ConfigError


def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set every teacher parameter to momentum * teacher + (1 - momentum) * student, in place.

    Buffers are left alone: those of a backbone and its heads are constants.

    Raises:
        ConfigError: The momentum is outside [0, 1], or the modules have different parameters.
    """
    if not 0 <= momentum <= 1:
        msg = f"momentum: must lie in [0, 1], got {momentum}. Correct the schedule."
        raise ConfigError(msg)
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        msg = (
            f"teacher: must have the student's parameters, got {odd} on one side only. Rebuild it."
        )
        raise ConfigError(msg)
    average = get_ema_multi_avg_fn(momentum)
    average(list(ours.values()), [theirs[name] for name in ours], 0)  # the count is not used
