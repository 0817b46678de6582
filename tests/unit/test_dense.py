"""Dense evaluation: halves that never mix, both probes, rows of the report."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dinov3.config import CompositesConfig, SegmentationConfig
from dinov3.errors import DataError
from dinov3.evals.baselines import MAJORITY, MODEL, RANDOM_INIT, RAW_PIXELS
from dinov3.evals.dense import (
    DENSE_PROTOCOLS,
    FOREGROUND,
    SEGMENTATION,
    Pool,
    dense_score,
    judge_dense,
    judge_subjects,
    scene_pair,
)
from dinov3.evals.dense_findings import (
    MIOU,
    PRECISION,
    dense_differences,
    dense_per_class,
    dense_rows,
)
from dinov3.evals.dense_pictures import scene_strips
from dinov3.evals.features import Preparation
from dinov3.evals.segmentation import RawPatches

COLOURS = {"train": ((250, 0, 0), (0, 250, 0)), "test": ((250, 0, 250), (0, 250, 250))}
PHOTOGRAPHS = ((90, 90, 250), (90, 90, 220), (90, 90, 190), (90, 90, 160))
PROBE = SegmentationConfig(
    log10_c=(-2.0, 0.0), num_c=2, max_iter=100, tolerance=1e-3, val_fraction=0.25
)
CPU = torch.device("cpu")


def square(colour):
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    image.paste((*colour, 255), (5, 5, 25, 25))
    return image


PICTURES = [square(colour) for half in ("train", "test") for colour in COLOURS[half]]
POOLS = Pool(np.array([0, 1]), np.array([0, 1])), Pool(np.array([2, 3]), np.array([0, 1]))


def load(places):
    return (PICTURES[place] for place in places)


@pytest.fixture
def composites(tmp_path):
    for number, colour in enumerate(PHOTOGRAPHS):
        Image.new("RGB", (60, 60), colour).save(tmp_path / f"{number}.png")
    return CompositesConfig(
        size=32, num_train=12, num_test=10, num_objects=(2, 3), backgrounds=f"folder:{tmp_path}"
    )


@pytest.fixture
def scenes(composites):
    """The classes have the same colours in both halves: learnable."""
    return scene_pair(
        lambda places: (PICTURES[place % 2] for place in places),
        ("one", "two"),
        *POOLS,
        composites,
        0,
    )


class Blurred(nn.Module):
    """Mean colours of patches: knows colours, not shapes."""

    def get_intermediate_layers(self, x, *, n=1, return_class_token=False):
        tokens = F.avg_pool2d(x, 8).flatten(2).mT
        return ((tokens, tokens.mean(dim=1)),) * n


class Blind(Blurred):
    """The same for every picture."""

    def get_intermediate_layers(self, x, *, n=1, return_class_token=False):
        return super().get_intermediate_layers(torch.zeros_like(x), n=n)


def judge(model, scenes):
    prepare = Preparation("crop", 32, 32, (255,) * 3, (0.5,) * 3, (0.25,) * 3)
    return judge_dense(model, scenes, prepare, PROBE, batch_size=4, device=CPU, seed=0)


def colours_at(scenes, value):
    return {tuple(colour) for colour in scenes.pictures[scenes.masks == value].tolist()}


def test_no_picture_and_no_photograph_stands_in_the_scenes_of_both_halves(composites):
    scenes = scene_pair(load, ("one", "two"), *POOLS, composites, 0)
    assert (len(scenes.train), len(scenes.test)) == (12, 10)
    seen = []
    for half, pictures in (("train", scenes.train), ("test", scenes.test)):
        for index, colour in enumerate(COLOURS[half]):
            assert colour in colours_at(pictures, index + 1)
        foreign = COLOURS["test" if half == "train" else "train"]
        for colour in foreign:
            distance = np.abs(pictures.pictures.astype(int) - colour).max(axis=-1)
            assert distance.min() > 40
        behind = {tuple(sorted(colour)) for colour in colours_at(pictures, 0)}
        seen.append(behind & set(PHOTOGRAPHS))
    assert seen[0] | seen[1] == set(PHOTOGRAPHS)
    assert not seen[0] & seen[1]


def test_a_picture_in_both_halves_is_refused(composites):
    with pytest.raises(DataError, match="a picture is in both halves, got row 1"):
        scene_pair(
            load, ("one", "two"), POOLS[0], Pool(np.array([1]), np.array([0])), composites, 0
        )


def test_without_transparency_in_both_halves_there_are_no_scenes(composites):
    def opaque(places):
        return (PICTURES[place].convert("RGB") for place in places)

    assert scene_pair(opaque, ("one", "two"), *POOLS, composites, 0) is None
    only_first = Pool(np.array([2]), np.array([0]))
    found = scene_pair(load, ("one", "two"), POOLS[0], only_first, composites, 0)
    assert found.train.classes == found.test.classes == ("one",)


def test_untrained_copies_are_one_subject(scenes):
    models = {
        MODEL: Blurred(),
        f"{RANDOM_INIT} 0": Blind(),
        f"{RANDOM_INIT} 1": Blurred(),
        RAW_PIXELS: RawPatches(8),
    }
    prepare = Preparation("crop", 32, 32, (255,) * 3, (0.5,) * 3, (0.25,) * 3)
    found = judge_subjects(models, scenes, prepare, PROBE, batch_size=4, device=CPU, seed=0)
    assert {name: len(every) for name, every in found.items()} == {
        MODEL: 1,
        RANDOM_INIT: 2,
        RAW_PIXELS: 1,
    }
    expected = judge(RawPatches(8), scenes).classes.counts
    assert np.array_equal(found[RAW_PIXELS][0].classes.counts, expected)


def test_strips_show_scene_mask_and_what_each_subject_saw(scenes):
    found = {MODEL: [judge(Blurred(), scenes)], RANDOM_INIT: [judge(Blind(), scenes)]}
    strips = scene_strips(found, scenes, 3)
    assert strips.shape == (3 * 32, 4 * 32, 3)
    assert np.array_equal(strips[32:64, :32], scenes.test.pictures[1])
    mask, seen = strips[32:64, 32:64], strips[32:64, 64:96]
    predicted = found[MODEL][0].classes.predicted[1]
    right = (scenes.test.masks[1] == predicted) & (predicted > 0)
    assert right.any()
    assert (mask[right] == seen[right]).all()
    only_an_object = (predicted == 0) & (found[MODEL][0].foreground.predicted[1] == 1)
    assert (seen[only_an_object] == 110).all()
    assert (seen == 110).all(axis=-1).sum() == only_an_object.sum()
    wrong = (scenes.test.masks[1] != predicted) & (scenes.test.masks[1] != 255)
    assert (mask[wrong] != seen[wrong]).any(axis=-1).all()
    assert (strips[:, 96:] == 0).all()  # blind: background everywhere


def test_rows_hold_every_subject_with_its_interval(scenes):
    blind, colours, raw = (judge(model, scenes) for model in (Blind(), Blurred(), RawPatches(8)))
    found = {MODEL: [colours], RANDOM_INIT: [blind, colours], RAW_PIXELS: [raw]}
    rows = {
        (row["protocol"], row["metric"], row["subject"]): row
        for row in dense_rows(found, scenes, 50, 0)
    }
    assert len(rows) == (2 * 2 + 1) * 4
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert all(row["num_samples"] == 10 for row in rows.values())
    assert rows[FOREGROUND, MIOU, MODEL]["value"] > 0.6  # flat colours give the objects away
    random = rows[SEGMENTATION, MIOU, RANDOM_INIT]
    majority = rows[SEGMENTATION, MIOU, MAJORITY]["value"]
    assert random["per_seed"][0] == pytest.approx(majority)  # blind: a constant guess
    assert random["value"] == pytest.approx(np.mean(random["per_seed"]))


def test_differences_are_paired_with_the_model_first(scenes):
    found = {MODEL: [judge(Blurred(), scenes)], RANDOM_INIT: [judge(Blind(), scenes)]}
    rows = [row for row in dense_differences(found, 200, 0) if row["metric"] == MIOU]
    assert [row["protocol"] for row in rows] == list(DENSE_PROTOCOLS)
    assert all((row["subject"], row["against"]) == (MODEL, RANDOM_INIT) for row in rows)
    assert rows[1]["low"] > 0.1
    precision = [row for row in dense_differences(found, 200, 0) if row["metric"] == PRECISION]
    assert [row["protocol"] for row in precision] == [FOREGROUND]
    assert precision[0]["low"] > 0.1


def test_how_untrained_copies_differ_is_part_of_the_interval(scenes):
    colours, blind = judge(Blurred(), scenes), judge(Blind(), scenes)
    found = {MODEL: [colours], RANDOM_INIT: [colours, blind]}
    either = [row for row in dense_differences(found, 400, 0) if row["protocol"] == FOREGROUND]
    found = {MODEL: [colours], RANDOM_INIT: [blind]}
    one = [row for row in dense_differences(found, 400, 0) if row["protocol"] == FOREGROUND]
    assert len(either) == len(one) == 3
    for both, single in zip(either, one, strict=True):
        assert both["value"] == pytest.approx(single["value"] / 2)
        assert both["low"] < 0 < both["high"]  # one of the copies is no different
        assert 0 < single["low"] <= single["value"] <= single["high"]


def test_other_subjects_are_compared_by_name(scenes):
    found = {MODEL: [judge(Blurred(), scenes)], "before": [judge(Blind(), scenes)]}
    assert dense_differences(found, 10, 0) == []
    rows = dense_differences(found, 10, 0, ["before"])
    assert {row["against"] for row in rows} == {"before"}
    assert len(rows) == 5


def test_per_class_figures_name_the_background_first(scenes):
    rows = dense_per_class({MODEL: [judge(Blurred(), scenes)]}, scenes)
    assert [row["label"] for row in rows] == ["background", "one", "two"]
    assert rows[0][MODEL] > 0.5


def test_the_score_is_the_mean_of_both_mious(scenes):
    found = judge(Blurred(), scenes)
    rows = {
        row["protocol"]: row
        for row in dense_rows({MODEL: [found]}, scenes, 5, 0)
        if row["metric"] == MIOU and row["subject"] == MODEL
    }
    expected = np.mean([rows[protocol]["value"] for protocol in DENSE_PROTOCOLS])
    assert dense_score(found, 5, 0)[0] == pytest.approx(expected)
