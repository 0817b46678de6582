"""The stored numbers of the released model, and how a tensor is held against them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = json.loads((Path(__file__).parent / "golden" / "GOLDEN.json").read_text(encoding="utf-8"))


def inp(*shape: int) -> torch.Tensor:
    """The input that the stored numbers were made with."""
    steps = np.arange(np.prod(shape), dtype=np.float64)
    values = np.sin(0.013 * steps) + np.cos(0.0071 * steps)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def assert_matches(actual: torch.Tensor, stored: dict[str, Any]) -> None:
    """Shape, first and last elements, sum and absolute sum agree."""
    values = actual.detach().double().flatten()
    assert list(actual.shape) == stored["shape"]
    elements = torch.cat([values[:8], values[-4:]])
    expected = torch.tensor([*stored["first8"], *stored["last4"]], dtype=torch.float64)
    torch.testing.assert_close(elements, expected, rtol=0, atol=1e-5)
    assert values.sum().item() == pytest.approx(stored["sum"], abs=1e-7 * stored["n"], rel=0)
    assert values.abs().sum().item() == pytest.approx(
        stored["abssum"], abs=1e-7 * stored["n"], rel=0
    )
