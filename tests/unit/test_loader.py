"""Batches are pure functions of (seed, step); workers only decode and crop, and never outlive us."""

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dinov3.bench import DrawnImages
from dinov3.data.augment import Augmentation, Batch, CropRecipe, cut, draw_parameters
from dinov3.data.decode import composite, decode_image
from dinov3.data.loader import ImageSet, TrainingLoader
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.errors import DataError, LineageBroken

AUGMENTATION = Augmentation(
    (CropRecipe(16, (0.4, 1.0)),) * 2,
    (CropRecipe(8, (0.1, 0.4)),) * 3,
    backgrounds=((255, 255, 255), (0, 0, 0)),
    cache_size=24,
)
IMAGES = DrawnImages(10, 40)


def loader(images: ImageSet = IMAGES, **options: object) -> TrainingLoader:
    options = {
        "augmentation": AUGMENTATION,
        "batch_size": 4,
        "seed": 0,
        "start_step": 0,
        "num_steps": 4,
        "num_workers": 0,
        **options,
    }
    return TrainingLoader(images, **options)


def digest(batch: Batch) -> str:
    """Of everything in a batch."""
    state = hashlib.sha256(str(batch.step).encode())
    arrays = [batch.indices, batch.global_crops.numpy(), batch.local_crops.numpy()]
    arrays += [
        getattr(batch.parameters, field.name) for field in dataclasses.fields(batch.parameters)
    ]
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def digests(**options: object) -> list[str]:
    return [digest(batch) for batch in loader(**options)]


def folder_of(root: Path, num_images: int) -> SourceImages:
    """Half of the pictures are transparent."""
    for number in range(num_images):
        picture = decode_image(IMAGES.read(number % len(IMAGES)))
        if number % 2:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(root / f"{number}.png")
    source = open_source(f"folder:{root}")
    paths = [entry.path for entry in source.entries()]
    return SourceImages(
        source, paths, [hashlib.sha256(source.read(path)).hexdigest() for path in paths]
    )


def test_a_batch_holds_the_crops_of_its_images_crop_major(tmp_path):
    images = folder_of(tmp_path, 6)
    augmentation = dataclasses.replace(AUGMENTATION, cache_size=None)
    batch = next(iter(loader(images, augmentation=augmentation)))
    assert batch.global_crops.shape == (8, 3, 16, 16)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    pictures = [decode_image(images.read(int(index))) for index in batch.indices]
    shapes = np.array([picture.size for picture in pictures])
    drawn = draw_parameters(augmentation, seed=0, step=0, sizes=shapes)
    everything = [*batch.global_crops, *batch.local_crops]
    for row, crop in enumerate(everything):
        background = augmentation.backgrounds[drawn.background[row]]
        opaque = composite(pictures[row % 4], background)
        expected = cut(opaque, drawn.box[row], crop.shape[-1])
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


def test_the_number_of_workers_changes_no_bit():
    expected = digests()
    assert digests(num_workers=2) == expected
    assert multiprocessing.active_children() == []


def test_a_run_that_starts_later_gets_the_same_batches():
    assert digests(start_step=2, num_steps=2) == digests()[2:]


def test_other_seeds_give_other_batches():
    assert set(digests(seed=1)).isdisjoint(digests())


def test_fewer_images_than_a_batch_are_enough():
    batch = next(iter(loader(DrawnImages(2, 20), batch_size=7)))
    assert np.bincount(batch.indices).min() >= 3
    assert batch.global_crops.shape[0] == 14


def test_no_steps_are_no_batches():
    assert len(loader(num_steps=0)) == 0
    assert digests(num_steps=0) == []


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    digests()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_memory_of_decoded_images_changes_nothing(monkeypatch):
    expected = digests(num_steps=8)
    monkeypatch.setattr("dinov3.data.loader._CACHE_BYTES", 3 * 24 * 24 * 3)
    assert digests(num_steps=8) == expected


def test_kept_images_are_not_read_again():
    class Counted(DrawnImages):
        reads = 0

        def read(self, index: int) -> bytes:
            self.reads += 1
            return super().read(index)

    images = Counted(5, 40)
    digests(images=images, num_steps=10)
    assert images.reads == 5


def test_images_are_reduced_to_the_cache_size_and_never_enlarged():
    class Boxes(DrawnImages):
        def __init__(self) -> None:
            super().__init__(1, 40)

    reduced = dataclasses.replace(AUGMENTATION, cache_size=5)
    box = next(iter(loader(Boxes(), augmentation=reduced))).parameters.box
    assert (box[:, :2] + box[:, 2:]).max() <= 5
    enlarged = dataclasses.replace(AUGMENTATION, cache_size=1000)
    box = next(iter(loader(Boxes(), augmentation=enlarged))).parameters.box
    assert 5 < (box[:, :2] + box[:, 2:]).max() <= 40


def test_an_empty_set_of_images_is_refused():
    with pytest.raises(DataError, match="training images: at least one is needed, got 0"):
        loader(DrawnImages(0, 8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_undecodable_image_is_named(tmp_path, num_workers):
    images = folder_of(tmp_path, 4)
    data = (tmp_path / "2.png").read_bytes()[:200]
    (tmp_path / "2.png").write_bytes(data)
    images.sha256[2] = hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match=r"^2\.png: cannot be decoded, got truncated"):
        list(loader(images, num_workers=num_workers))
    assert multiprocessing.active_children() == []


def test_an_image_that_changed_since_its_table_is_refused(tmp_path):
    images = folder_of(tmp_path, 4)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(LineageBroken, match=r"1\.png: its bytes differ"):
        list(loader(images))


def test_signals_leave_the_workers_at_work():
    batches = iter(loader(num_workers=1, num_steps=6))
    found = [digest(next(batches))]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    found += [digest(batch) for batch in batches]
    assert found == digests(num_steps=6)


def test_a_killed_worker_is_one_clear_error():
    batches = iter(loader(num_workers=1, num_steps=1000))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loading process died, got 'DataLoader worker"):
        list(batches)


CHILD = """
import sys
from tests.unit.test_loader import loader

if __name__ == "__main__":
    batches = iter(loader(num_workers=2, num_steps=1000))
    next(batches)
    import multiprocessing
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
    raise RuntimeError("leaving with batches still open")
"""


def start_child(tmp_path: Path, what: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, str(script), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    workers = [psutil.Process(int(pid)) for pid in child.stdout.readline().split()]
    assert len(workers) == 2
    return child, workers


def are_gone(processes: list[psutil.Process]) -> bool:
    """A zombie is gone: who should reap it may be slow."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_workers_die_with_a_killed_trainer(tmp_path):
    child, workers = start_child(tmp_path, "wait")
    with child:
        child.kill()
    assert are_gone(workers)


def test_an_interpreter_ends_although_batches_are_still_open(tmp_path):
    child, workers = start_child(tmp_path, "leave")
    with child:
        _, errors = child.communicate()
    assert "leaving with batches still open" in errors
    assert child.returncode == 1
    assert are_gone(workers)
