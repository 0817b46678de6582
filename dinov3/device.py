"""Which device to compute on."""

import torch

from dinov3.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one.

    Raises:
        ConfigError: The named device is not there, or cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        msg = f"run.device: not usable here, got {name!r} ({error}). Set run.device=auto."
        raise ConfigError(msg) from error
    device = torch.device(name)  # `cuda` without a number stays so: each rank has one of its own
    if device.type == "meta":
        msg = f"run.device: computes nothing, got {name!r}. Set run.device=auto."
        raise ConfigError(msg)
    return device
