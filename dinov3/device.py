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
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        msg = f"run.device: not usable here, got {name!r} ({error}). Set run.device=auto."
        raise ConfigError(msg) from error
    if device.type == "meta":
        msg = f"run.device: computes nothing, got {name!r}. Set run.device=auto."
        raise ConfigError(msg)
    return device
