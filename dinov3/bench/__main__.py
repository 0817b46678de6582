"""Speed as ratios, measured in one run on one thread; prints JSON.

    python -m dinov3.bench augmentation   what follows cropping, against torchvision
    python -m dinov3.bench step           the parts of a training step, images per second
    python -m dinov3.bench distillation   two students together, against two runs
    python -m dinov3.bench checkpoints    how long a background write holds up the loop
    python -m dinov3.bench hashing        file and tensor digests in one pass, against one digest
    python -m dinov3.bench --against REF  a step here, against one of another commit

Without a part all five are measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from dinov3.bench.against import step_against
from dinov3.bench.augmentation import augmentation_ratio
from dinov3.bench.checkpoints import checkpoint_stall
from dinov3.bench.distillation import distillation_ratio
from dinov3.bench.hashing import hashing_ratio
from dinov3.bench.pictures import DrawnImages
from dinov3.config import TrainConfig
from dinov3.errors import DinoError
from dinov3.recipe import load_recipe
from dinov3.train.build import build_pipeline
from dinov3.train.timing import step_split

_NUM_STEPS = 40
_SIDE = 96  # pixels


def main(arguments: list[str] | None = None) -> int:
    """Measures what the command line names and prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=["all", *_PARTS], default="all")
    parser.add_argument("--against", metavar="REF", help="compare a step with this commit's")
    wanted = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if wanted.against is not None:
            figures: dict[str, Any] = {"against": step_against(wanted.against)}
        else:
            parts = _PARTS if wanted.part == "all" else {wanted.part: _PARTS[wanted.part]}
            figures = {title: measure() for title, measure in parts.values()}
    except DinoError as error:
        sys.stderr.write(f"dinov3.bench: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(figures, indent=2, default=float) + "\n")
    return 0


def _demo() -> TrainConfig:
    return cast(TrainConfig, load_recipe("demo"))


def _augmentation() -> dict[str, float]:
    return augmentation_ratio(DrawnImages(32, _SIDE), build_pipeline(_demo()).of_step(0, 0))


def _step() -> dict[str, float]:
    split = step_split(_demo(), DrawnImages(256, _SIDE), num_steps=_NUM_STEPS)
    return {name: round(value, 4) for name, value in split.items()}


def _checkpoints() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="dinov3-bench-") as folder:
        return checkpoint_stall(_demo(), DrawnImages(256, _SIDE), Path(folder))


def _hashing() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="dinov3-bench-") as folder:
        return hashing_ratio(Path(folder))


_PARTS: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {
    "augmentation": ("augmentation", _augmentation),
    "step": ("training step", _step),
    "distillation": ("distillation", distillation_ratio),
    "checkpoints": ("checkpoints", _checkpoints),
    "hashing": ("hashing", _hashing),
}

if __name__ == "__main__":
    sys.exit(main())
