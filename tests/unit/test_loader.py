"""Batches are pure functions of (seed, step); workers only decode and crop, and die with us."""

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

from dinov3.data.augment import (
    Augmentation,
    Batch,
    CropParameters,
    CropRecipe,
    View,
    cut,
    draw_parameters,
)
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


def loader(images: ImageSet, **options: object) -> TrainingLoader:
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


def digests(images: ImageSet, **options: object) -> list[str]:
    return [digest(batch) for batch in loader(images, **options)]


def folder_of(root: Path, num_images: int) -> SourceImages:
    """Pictures of 40 x 30; half of them are transparent."""
    for number in range(num_images):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)
        if number % 2:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(root / f"{number}.png")
    return images_in(root)


def images_in(root: Path) -> SourceImages:
    source = open_source(f"folder:{root}")
    paths = [entry.path for entry in source.entries()]
    return SourceImages(
        source, paths, [hashlib.sha256(source.read(path)).hexdigest() for path in paths]
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> SourceImages:
    return folder_of(tmp_path_factory.mktemp("images"), 10)


def test_a_batch_holds_the_crops_of_its_images_crop_major(images):
    augmentation = dataclasses.replace(AUGMENTATION, cache_size=None)
    batch = next(iter(loader(images, augmentation=augmentation)))
    assert batch.global_crops.shape == (8, 3, 16, 16)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    pictures = [decode_image(images.read(int(index))) for index in batch.indices]
    shapes = np.array([picture.size for picture in pictures])
    drawn = draw_parameters(augmentation, seed=0, step=0, sizes=shapes)
    for row, crop in enumerate([*batch.global_crops, *batch.local_crops]):
        background = augmentation.backgrounds[drawn.background[row]]
        opaque = composite(pictures[row % 4], background)
        expected = cut(opaque, drawn.box[row], crop.shape[-1])
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


def test_the_number_of_workers_changes_no_bit(images):
    expected = digests(images)
    assert digests(images, num_workers=2) == expected
    assert multiprocessing.active_children() == []


def test_a_run_that_starts_later_gets_the_same_batches(images):
    assert digests(images, start_step=2, num_steps=2) == digests(images)[2:]


def test_other_seeds_give_other_batches(images):
    assert set(digests(images, seed=1)).isdisjoint(digests(images))


def test_fewer_images_than_a_batch_are_enough(tmp_path):
    batch = next(iter(loader(folder_of(tmp_path, 2), batch_size=7)))
    assert np.bincount(batch.indices).min() >= 3
    assert batch.global_crops.shape[0] == 14


def test_no_steps_are_no_batches(images):
    assert len(loader(images, num_steps=0)) == 0
    assert digests(images, num_steps=0) == []


def test_nothing_is_drawn_from_the_global_generator(images):
    before = torch.get_rng_state()
    digests(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_memory_of_decoded_images_changes_nothing(images, monkeypatch):
    expected = digests(images, num_steps=8)
    monkeypatch.setattr("dinov3.data.loader._CACHE_BYTES", 3 * 24 * 18 * 3)
    assert digests(images, num_steps=8) == expected


def test_kept_images_are_not_read_again(tmp_path):
    images = folder_of(tmp_path, 4)
    batches = iter(loader(images, num_steps=5))
    first = next(batches)
    for path in images.paths:
        (tmp_path / path).unlink()
    assert sorted(first.indices) == [0, 1, 2, 3]
    assert len(list(batches)) == 4


def test_without_a_cache_size_images_are_read_each_time(tmp_path):
    images = folder_of(tmp_path, 4)
    augmentation = dataclasses.replace(AUGMENTATION, cache_size=None)
    batches = iter(loader(images, augmentation=augmentation))
    next(batches)
    (tmp_path / "3.png").unlink()
    with pytest.raises(LineageBroken, match=r"3\.png: can no longer be read"):
        next(batches)


@pytest.mark.parametrize(("cache_size", "longest"), [(5, 5), (1000, 40)])
def test_images_are_reduced_to_the_cache_size_and_never_enlarged(images, cache_size, longest):
    augmentation = dataclasses.replace(AUGMENTATION, cache_size=cache_size)
    ends = [
        batch.parameters.box[:, :2] + batch.parameters.box[:, 2:]
        for batch in loader(images, augmentation=augmentation, num_steps=20)
    ]
    assert np.max(ends) == longest


def test_an_empty_set_of_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="training images: at least one is needed, got 0"):
        loader(images_in(tmp_path))


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


def test_signals_leave_the_workers_at_work(images):
    batches = iter(loader(images, num_workers=1, num_steps=6))
    found = [digest(next(batches))]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    found += [digest(batch) for batch in batches]
    assert found == digests(images, num_steps=6)


def test_a_killed_worker_is_one_clear_error(images):
    batches = iter(loader(images, num_workers=1, num_steps=1000))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a loading process died, got \w+\. Free memory"):
        list(batches)


CHILD = """
import multiprocessing, sys
from dinov3.data.augment import Augmentation, CropRecipe
from dinov3.data.loader import TrainingLoader
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages

if __name__ == "__main__":
    _, root, sha256, what = sys.argv
    images = SourceImages(open_source(f"folder:{root}"), ["0.png"], [sha256])
    crop = CropRecipe(8, (0.5, 1.0))
    batches = iter(
        TrainingLoader(
            images,
            augmentation=Augmentation((crop, crop), (crop,)),
            batch_size=2,
            seed=0,
            start_step=0,
            num_steps=1000,
            num_workers=1,
        )
    )
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    if what == "wait":
        sys.stdin.read()
    raise RuntimeError("leaving with batches still open")
"""


def start_child(root: Path, what: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A trainer that has got its first batch, and its worker."""
    (sha256,) = folder_of(root, 1).sha256
    script = root / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, str(script), str(root), sha256, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return child, psutil.Process(int(child.stdout.readline()))


def is_gone(process: psutil.Process) -> bool:
    """A zombie is gone: who should reap it may be slow."""
    _, alive = psutil.wait_procs([process], timeout=20)
    return not alive or process.status() == psutil.STATUS_ZOMBIE


def test_workers_die_with_a_killed_trainer(tmp_path):
    child, worker = start_child(tmp_path, "wait")
    with child:
        child.kill()
    assert is_gone(worker)


def test_an_interpreter_ends_although_batches_are_still_open(tmp_path):
    child, worker = start_child(tmp_path, "leave")
    with child:
        _, errors = child.communicate()
    assert "leaving with batches still open" in errors
    assert child.returncode == 1
    assert is_gone(worker)


VIEWS = (View("global", 24), View("local", 12, is_distorted=False), View("global", 8))
WITH_VIEWS = dataclasses.replace(AUGMENTATION, views=VIEWS)


def parts_of(batch: Batch) -> dict[str, object]:
    """Everything in a batch, by name."""
    names = [one.name for one in dataclasses.fields(CropParameters)]
    drawn = {name: getattr(batch.parameters, name) for name in names}
    plain = {"indices": batch.indices, "global": batch.global_crops, "local": batch.local_crops}
    return {**plain, **drawn, **{str(view): crops for view, crops in batch.views.items()}}


def assert_same_batch(found: Batch, expected: Batch) -> None:
    assert found.step == expected.step
    ours, theirs = parts_of(found), parts_of(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.array_equal(np.asarray(ours[name]), np.asarray(value)), name


@pytest.mark.parametrize("rows", [range(2), range(2, 6), range(5, 6), range(6)])
def test_rows_of_a_batch_are_the_batch_of_those_rows(images, rows):
    """What a rank builds for itself is its part of what one process would have built."""
    options = {"augmentation": WITH_VIEWS, "batch_size": 6, "num_steps": 3}
    for whole, own in zip(
        loader(images, **options), loader(images, rows=rows, **options), strict=True
    ):
        assert len(own.indices) == len(rows)
        assert_same_batch(whole.rows(rows.start, rows.stop), own)
        assert_same_batch(whole.pick(list(rows)), own)


def test_picked_images_keep_their_crops_and_what_was_drawn(images):
    whole = next(iter(loader(images, augmentation=WITH_VIEWS, batch_size=6)))
    picked = whole.pick([4, 1])
    assert picked.indices.tolist() == whole.indices[[4, 1]].tolist()
    for place, image in enumerate([4, 1]):
        for crop in range(2):
            assert torch.equal(
                picked.global_crops[2 * crop + place], whole.global_crops[6 * crop + image]
            )
        assert_same_batch(picked.rows(place, place + 1), whole.rows(image, image + 1))


def test_nothing_picked_is_an_empty_batch(images):
    whole = next(iter(loader(images, augmentation=WITH_VIEWS, batch_size=6)))
    nothing = whole.pick([])
    assert nothing.global_crops.shape == (0, 3, 16, 16)
    assert nothing.views[VIEWS[1]].shape == (0, 3, 12, 12)
    assert len(nothing.indices) == len(nothing.parameters.box) == 0


def test_views_are_the_same_cuts_at_their_own_sizes(images):
    batch = next(
        iter(loader(images, augmentation=dataclasses.replace(WITH_VIEWS, cache_size=None)))
    )
    assert list(batch.views) == list(VIEWS)
    pictures = [decode_image(images.read(int(index))) for index in batch.indices]
    drawn, num_global = batch.parameters, len(batch.global_crops)
    for view, crops in batch.views.items():
        first = 0 if view.kind == "global" else num_global
        for row, crop in enumerate(crops):
            background = AUGMENTATION.backgrounds[drawn.background[first + row]]
            opaque = composite(pictures[row % len(pictures)], background)
            expected = cut(opaque, drawn.box[first + row], view.size)
            assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


def test_views_change_nothing_else_of_a_batch(images):
    plain = next(iter(loader(images)))
    with_views = next(iter(loader(images, augmentation=WITH_VIEWS)))
    assert digest(plain) == digest(with_views)


def test_a_batch_without_local_crops_has_none(images):
    alone = dataclasses.replace(AUGMENTATION, local_crops=None)
    batch = next(iter(loader(images, augmentation=alone)))
    assert len(batch.local_crops) == 0
    assert len(batch.parameters.box) == len(batch.global_crops) == 8
