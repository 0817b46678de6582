"""A small world: drawn pictures taken through the real stages before training."""

import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from PIL import Image, ImageDraw

from tests.flow.forks import fork

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
            done = fork(*arguments)
            assert done.returncode == 0, done.stderr

    def training(self, output: Path, *overrides: str) -> tuple[str | Path, ...]:
        """Arguments of a training run."""
        stage = ("train", "pretrained_checkpoint", "--recipe", "smoke_cpu", "run.device=cpu")
        return (*stage, *self.inputs, "--output", output, *overrides)

    @property
    def inputs(self) -> tuple[str | Path, ...]:
        """What every training stage reads."""
        return ("--source", self.source, "--manifest", self.manifest, "--dataset", self.dataset)


class Chain:
    """The phases one after the other, each once, a few steps long."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.outputs = {
            "pretrain": world.root / "data" / "pretrained_checkpoint",
            "gram": world.root / "data" / "gram_checkpoint",
            "highres": world.root / "data" / "highres_model",
        }
        self.pairs = world.root / "data" / "caption_pairs" / "pairs.parquet"

    def build(self) -> None:
        """Runs them."""
        for phase, output in self.outputs.items():
            done = fork(*self.training(phase, output))
            assert done.returncode == 0, done.stderr
        self._write_captions()

    def _write_captions(self) -> None:
        """Stage caption_pairs, from a table of one's own: a line for each picture."""
        world, own = self.world, self.world.root / "captions.parquet"
        places = [path.parts[-2:] for path in sorted(world.root.glob("pictures/*/*.png"))]
        images = ["/".join(place) for place in places]
        captions = [f"picture {Path(name).stem} of a {shape}" for shape, name in places]
        pl.DataFrame({"image": images, "caption": captions}).write_parquet(own)
        tables = ("--manifest", world.manifest, "--dataset", world.dataset, "--pairs", own)
        common = ("--recipe", "smoke_cpu", "--output", self.pairs.parent)
        done = fork("captions", "caption_pairs", *tables, *common)
        assert done.returncode == 0, done.stderr

    def training(self, phase: str, output: Path, *overrides: str) -> tuple[str | Path, ...]:
        """Arguments of a phase, on the artifacts of the phases before it."""
        pretrained, gram, highres = self.outputs.values()
        given: dict[str, tuple[str | Path, ...]] = {
            "pretrain": ("train", "pretrained_checkpoint"),
            "gram": (
                *("train", "gram_checkpoint", "--phase", "gram"),
                *("--init-from", pretrained, "--gram-teacher", pretrained),
            ),
            "highres": (
                *("train", "highres_model", "--phase", "highres"),
                *("--init-from", gram, "--gram-teacher", pretrained),
            ),
            "distill": ("distill", "distilled_students", "--teacher", highres),
            "dinotxt": ("align", "dinotxt", "--pairs", self.pairs, "--backbone", highres),
        }
        inputs = self.world.inputs if phase != "dinotxt" else ("--source", self.world.source)
        common = ("--recipe", "smoke_cpu", "run.device=cpu", "--output", output)
        return (*given[phase], *inputs, *common, *overrides)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; tests write to folders of their own."""
    made = World(tmp_path_factory.mktemp("world"))
    made.build()
    return made


@pytest.fixture(scope="session")
def chain(world: World) -> Chain:
    """Trained once; tests write to folders of their own."""
    made = Chain(world)
    made.build()
    return made
