"""Calibration reports what a count by hand gives, and refuses what it cannot separate."""

import numpy as np
import pytest
from PIL import Image

from dinov3.config import CurationConfig, EmbeddingsConfig
from dinov3.curation.calibrate import COPIES, calibrate, run_calibration
from dinov3.curation.embedders import PixelEmbedder, open_embedder
from dinov3.curation.manifest import make_manifest
from dinov3.errors import DataError
from dinov3.recipe import load_recipe
from tests.drawn import draw


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(seed, seed / 40) for seed in range(40)]


def _measured_by_hand(pictures, threshold, seed):
    """Recall and share of wrongly linked pictures, by loops."""
    embed = PixelEmbedder(16)
    rows = [embed([picture])[0] for picture in pictures]
    recalls = []
    for number, copy in enumerate(COPIES.values()):
        above = 0
        for index, picture in enumerate(pictures):
            planted = copy(picture, np.random.default_rng([seed, 1, index, number]))
            above += float(embed([planted])[0] @ rows[index]) > threshold
        recalls.append(above / len(pictures))
    wrong = 0
    for index, row in enumerate(rows):
        wrong += max(float(row @ other) for other in rows if other is not rows[index]) > threshold
    return recalls, wrong / len(rows)


def test_reported_figures_equal_a_count_by_hand(pictures):
    found = calibrate(PixelEmbedder(16), pictures, seed=3)
    for name in ("self", "relative"):
        recalls, wrong = _measured_by_hand(pictures, found[f"{name}_threshold"], seed=3)
        assert list(found[name]["recall_by_kind"].values()) == pytest.approx(recalls, abs=1e-4)
        assert found[name]["wrongly_linked"] == pytest.approx(wrong, abs=1e-4)
        assert found[name]["recall"] == pytest.approx(np.mean(recalls), abs=1e-4)
        assert found[name]["precision"] >= 0.95


def test_calibration_is_a_function_of_the_seed(pictures):
    first, again, other = (calibrate(PixelEmbedder(16), pictures, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_copies_already_in_the_pool_are_no_wrong_links(pictures):
    plain = calibrate(PixelEmbedder(16), pictures, seed=0)
    doubled = calibrate(PixelEmbedder(16), [*pictures, *pictures], seed=0)
    assert doubled["num_images"] == plain["num_images"] == 40
    assert doubled["self"]["wrongly_linked"] == plain["self"]["wrongly_linked"]


class _Blind:
    """An embedder to which all pictures are nearly alike."""

    name, dim = "blind", 3

    def __call__(self, images):
        seen = [[1, 1e-2 * np.asarray(image).mean() / 255, 1e-3] for image in images]
        rows = np.array(seen, np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_an_embedder_that_cannot_tell_pictures_apart_is_refused(pictures):
    with pytest.raises(DataError, match="does not tell copies from other pictures"):
        calibrate(_Blind(), pictures, seed=0)


def test_one_picture_cannot_calibrate(pictures):
    with pytest.raises(DataError, match="two distinct pictures are needed, got 1"):
        calibrate(PixelEmbedder(16), [pictures[0], pictures[0]], seed=0)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_the_smallest_pictures_are_pictures(kind):
    for size in ((1, 1), (1, 40), (300, 2)):
        for seed in range(20):
            copy = COPIES[kind](Image.new("RGB", size), np.random.default_rng(seed))
            assert min(copy.size) >= 1
            assert copy.mode == "RGB"


def test_crops_keep_at_least_four_fifths_of_the_area():
    picture = draw(0, size=(200, 160))
    kept = [
        np.prod(COPIES["crop"](picture, np.random.default_rng(seed)).size) / (200 * 160)
        for seed in range(200)
    ]
    assert 0.79 < min(kept) < 0.85
    assert 0.95 < max(kept) <= 1


def test_calibration_of_a_table_uses_its_training_images_only(tmp_path, pictures):
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index:02}.png")
    recipe = load_recipe("default", ["split.unlabelled_test_fraction=0.5"], phase="manifest")
    source, table = f"folder:{tmp_path}", tmp_path / "out" / "manifest.parquet"
    make_manifest(source=source, output=table.parent, config=recipe, num_workers=1)
    config = load_recipe("default", phase="embeddings")
    assert isinstance(config, EmbeddingsConfig)
    found = run_calibration(source, table, config)
    assert 5 <= found["num_images"] <= 35
    assert (found["embedder"], found["size"]) == ("pixels", 16)


def test_recipes_name_the_embedder_their_thresholds_belong_to():
    for family in ("default", "demo", "smoke_cpu"):
        curation = load_recipe(family, phase="curation")
        embeddings = load_recipe(family, phase="embeddings")
        assert isinstance(curation, CurationConfig)
        assert isinstance(embeddings, EmbeddingsConfig)
        calibration = curation.dedup.calibration
        assert (calibration.embedder, calibration.size) == (embeddings.embedder, embeddings.size)
        assert open_embedder(embeddings).name == calibration.embedder
        assert calibration.precision >= 0.9
