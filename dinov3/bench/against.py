"""The demo's pre-training step here against that of another commit.

Each side is a process of its own, started in its own checkout by this interpreter: its code, its
recipe, and the figure that its own `python -m dinov3.bench step` prints. Where the recipes differ,
so does the work; the ratio says what a user of the demo would notice.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from dinov3.errors import ConfigError
from dinov3.stage import CHECKOUT

_COMMAND = ("-m", "dinov3.bench", "step")


def step_against(
    reference: str, *, checkout: Path = CHECKOUT, num_rounds: int = 3
) -> dict[str, Any]:
    """Medians of seconds per step on both sides, whose rounds alternate, and their ratio.

    Args:
        reference: A commit, a tag or a branch.
        checkout: The working tree to compare it with.
        num_rounds: Processes on each side.

    Raises:
        ConfigError: There is no such commit, or its benchmark does not run.
    """
    with _checked_out(reference, checkout) as there:
        sides: dict[str, list[float]] = {"here": [], "there": []}
        for _ in range(num_rounds):
            for name, folder in (("here", checkout), ("there", there)):
                sides[name].append(_seconds_per_step(folder))
    seconds = {name: median(values) for name, values in sides.items()}
    return {
        "compared": f"seconds per step of the demo's pre-training, here and at {reference}",
        "here": seconds["here"],
        "there": seconds["there"],
        "here_for_there": seconds["here"] / seconds["there"],
        "rounds": sides,
    }


@contextlib.contextmanager
def _checked_out(reference: str, checkout: Path) -> Iterator[Path]:
    """A working tree of a commit, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dinov3-bench-") as parent:
        folder = Path(parent, "tree")
        _git(checkout, "worktree", "add", "--detach", str(folder), reference)
        try:
            yield folder
        finally:
            _git(checkout, "worktree", "remove", "--force", str(folder))


def _git(checkout: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip()
        msg = f"--against: git {' '.join(arguments[:2])} failed, got {said!r}. Name a commit."
        raise ConfigError(msg)


def _seconds_per_step(folder: Path) -> float:
    # an inherited path would bring this checkout's package into the other's process
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *_COMMAND],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return float(json.loads(done.stdout)["training step"]["seconds_per_step"])
    except (ValueError, KeyError, TypeError) as error:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        msg = f"--against: no seconds per step from {folder}, got {said}. Choose a later commit."
        raise ConfigError(msg) from error
