"""The image table of many pictures: memory stays flat, and the rate is said.

DINOV3_NUM_IMAGES=200000 python -m pytest tests/flow/test_manifest_scale.py -m slow -s
"""

import os
import subprocess
import sys
import time

import numpy as np
import polars as pl
import psutil
import pytest
from PIL import Image

NUM_IMAGES = int(os.environ.get("DINOV3_NUM_IMAGES", "20000"))
LIMIT = 2**30  # bytes: sum of resident sizes over the process tree
MAKE = (
    "import sys; from pathlib import Path; from dinov3.recipe import load_recipe; "
    "from dinov3.curation.manifest import make_manifest; "
    "make_manifest(source=sys.argv[1], output=Path(sys.argv[2]), "
    "config=load_recipe('default/manifest'))"
)


def generate(folder, num_images):
    """64 x 64 JPEGs, 1,000 a folder, no two alike."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        place = folder / f"class{i // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(place / f"{i:07d}.jpg", quality=80)


def tree_rss(process):
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


@pytest.mark.slow
def test_peak_memory_of_the_process_tree_stays_below_one_gibibyte(tmp_path):
    generate(tmp_path / "in", NUM_IMAGES)
    output = tmp_path / "out" / "image_manifest"
    started = time.monotonic()
    command = [sys.executable, "-c", MAKE, f"folder:{tmp_path / 'in'}", str(output)]
    running = subprocess.Popen(command)
    watched, peak = psutil.Process(running.pid), 0
    while running.poll() is None:
        try:
            peak = max(peak, tree_rss(watched))
            running.wait(0.1)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            continue
    rate = NUM_IMAGES / (time.monotonic() - started)
    sys.stderr.write(f"{NUM_IMAGES} images, {rate:.0f} a second, peak {peak / 2**20:.0f} MiB\n")
    assert running.returncode == 0
    assert (
        pl.scan_parquet(output / "manifest.parquet").select(pl.len()).collect().item() == NUM_IMAGES
    )
    assert 0 < peak < LIMIT
