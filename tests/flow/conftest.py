"""A small world: drawn pictures taken through the real stages before training."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

SHAPES = ("ellipse", "rectangle", "line")


def draw_pictures(folder: Path, *, num_per_class: int, seed: int = 0) -> None:
    """Labelled pictures: one sub-folder per shape, colours and places at random."""
    rng = random.Random(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for number in range(num_per_class):
            image = Image.new("RGB", (64, 48), tuple(rng.randrange(256) for _ in range(3)))
            draw = ImageDraw.Draw(image)
            for _ in range(3):
                x, y = rng.randrange(40), rng.randrange(28)
                box = (x, y, x + rng.randrange(6, 24), y + rng.randrange(6, 20))
                getattr(draw, shape)(box, fill=tuple(rng.randrange(256) for _ in range(3)))
            image.save(folder / shape / f"{number:03d}.png")


def dinov3(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """Runs one verb of the command line to its end."""
    command = [sys.executable, "-m", "dinov3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class World:
    """A folder with pictures and the stages made from them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = f"folder:{root / 'pictures'}"
        self.manifest = root / "data" / "image_manifest" / "manifest.parquet"
        self.embeddings = root / "data" / "image_embeddings" / "embeddings.parquet"
        self.dataset = root / "data" / "curated_dataset" / "curated.parquet"

    def build(self) -> None:
        """Runs the stages before training."""
        draw_pictures(self.root / "pictures", num_per_class=8)
        common = ("--recipe", "smoke_cpu")
        table = ("--manifest", self.manifest)
        for arguments in (
            ("manifest", *common, "--source", self.source, "--output", self.manifest.parent),
            (
                *("embeddings", *common, "--source", self.source, *table),
                *("--output", self.embeddings.parent),
            ),
            (
                *("curate", *common, *table, "--embeddings", self.embeddings),
                *("--output", self.dataset.parent),
            ),
        ):
            done = dinov3(*arguments)
            assert done.returncode == 0, done.stderr

    def training(self, output: Path, *overrides: str) -> tuple[str | Path, ...]:
        """Arguments of a training run."""
        inputs = ("--source", self.source, "--manifest", self.manifest, "--dataset", self.dataset)
        stage = ("train", "pretrained_checkpoint", "--recipe", "smoke_cpu", "run.device=cpu")
        return (*stage, *inputs, "--output", output, *overrides)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; tests write to folders of their own."""
    made = World(tmp_path_factory.mktemp("world"))
    made.build()
    return made
