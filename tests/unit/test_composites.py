"""Composites: exact masks, pure functions of seed and number, halves that never mix."""

import io
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from dinov3.errors import DataError
from dinov3.evals.composites import (
    IGNORED,
    PACKAGED,
    Half,
    Layout,
    build_composites,
    compose,
    cut_outs,
    digest_half,
    packaged_photographs,
    photographs_digest,
    shared_classes,
    source_photographs,
    split_photographs,
)

TEAL, RED, GREEN = (90, 150, 90), (250, 0, 0), (0, 250, 0)
LAYOUT = Layout(48, (3, 6))


def disc(colour, side=40):
    """A disc of one colour, nothing around it."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    inside = np.hypot(rows, columns) < side / 2 - 2
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = np.where(inside, 255, 0)
    return Image.fromarray(pixels)


def flat(colour, alpha, size=(16, 16)):
    return Image.new("RGBA", size, (*colour, alpha))


def photograph(colour, size=(60, 50)):
    return Image.new("RGB", size, colour)


def half(*cutouts, photographs=None):
    cut_by_class = tuple((cut,) for cut in cutouts)
    return Half(cut_by_class, tuple(photographs or [photograph(TEAL)]))


def near(pictures, colour, tolerance=26):
    """Where a picture has a colour, up to a twentieth for each of two faint edges above it."""
    return (np.abs(pictures.astype(int) - colour) <= tolerance).all(axis=-1)


def test_a_scene_depends_on_nothing_but_seed_and_number():
    made = half(disc(RED), disc(GREEN))
    short = build_composites(("a", "b"), made, LAYOUT, 3, seed=1, stream=0)
    long = build_composites(("a", "b"), made, LAYOUT, 6, seed=1, stream=0)
    assert np.array_equal(short.pictures, long.pictures[:3])
    assert np.array_equal(short.masks, long.masks[:3])
    picture, mask = compose(made, LAYOUT, 1, 0, 4)
    assert np.array_equal(picture, long.pictures[4])
    assert np.array_equal(mask, long.masks[4])


@pytest.mark.parametrize("changed", [{"seed": 2}, {"stream": 1}])
def test_another_seed_or_stream_gives_other_scenes(changed):
    made = half(disc(RED), disc(GREEN))
    draws = {"seed": 1, "stream": 0}
    one = build_composites(("a", "b"), made, LAYOUT, 4, **draws)
    other = build_composites(("a", "b"), made, LAYOUT, 4, **draws | changed)
    assert all(not np.array_equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))


def test_the_mask_says_exactly_what_the_pixels_show():
    scenes = build_composites(
        ("red", "green"), half(disc(RED), disc(GREEN)), LAYOUT, 20, seed=0, stream=0
    )
    behind = list(permutations(TEAL))  # backgrounds come in any order of their channels
    for value, colours in enumerate((behind, [RED], [GREEN])):
        labelled = scenes.masks == value
        assert labelled.any()
        assert np.any([near(scenes.pictures[labelled], one) for one in colours], axis=0).all()
        pure = np.any([near(scenes.pictures, one, 0) for one in colours], axis=0)
        assert set(np.unique(scenes.masks[pure])) <= {value, IGNORED}
    assert 0 < (scenes.masks == IGNORED).mean() < 0.2


@pytest.mark.parametrize(("alpha", "value"), [(12, 0), (13, IGNORED), (242, IGNORED), (243, 1)])
def test_alpha_between_five_and_ninety_five_hundredths_is_ignored(alpha, value):
    made = half(flat(RED, alpha))
    _, mask = compose(made, Layout(40, (1, 1)), 0, 0, 0)
    assert set(np.unique(mask)) == {0, value}


@pytest.mark.parametrize(("fewest", "most"), [(1, 1), (2, 4)])
def test_a_scene_has_as_many_objects_as_the_layout_says(fewest, most):
    colours = [(25 * index, 250, 0) for index in range(8)]
    made = half(*(flat(colour, 255, (4, 1)) for colour in colours))
    layout = Layout(400, (fewest, most))  # thin lines seldom hide each other wholly
    scenes = build_composites(tuple("abcdefgh"), made, layout, 40, seed=0, stream=0)
    counts = [len(set(np.unique(mask)) - {0, IGNORED}) for mask in scenes.masks]
    assert max(counts) == most
    assert np.mean(counts) == pytest.approx((fewest + most) / 2, abs=0.6)


def test_objects_lie_wholly_inside_the_scene_and_keep_their_shape():
    made = half(flat(RED, 255, (30, 10)))
    for number in range(20):
        _, mask = compose(made, Layout(60, (1, 1)), 0, 0, number)
        rows, columns = np.nonzero(mask == 1)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 18 <= width <= 36
        assert height == pytest.approx(width / 3, abs=1)


def test_every_class_is_equally_likely_however_many_pictures_it_has():
    many = tuple(flat(RED, 255) for _ in range(30))
    made = Half((many, (flat(GREEN, 255),)), (photograph(TEAL),))
    scenes = build_composites(("many", "one"), made, Layout(20, (1, 1)), 200, seed=0, stream=0)
    assert np.mean([(mask == 2).any() for mask in scenes.masks]) == pytest.approx(0.5, abs=0.1)


def test_cut_outs_are_the_pictures_with_a_shape_cut_to_what_is_visible():
    wide = Image.new("RGBA", (100, 80), (0, 0, 0, 0))
    wide.paste(disc(RED, 60), (20, 10))
    images = [wide, photograph(GREEN), flat(GREEN, 255), flat(GREEN, 0), flat(GREEN, 128)]
    found = cut_outs(images, np.array([1, 0, 0, 1, 0]), 2, max_side=30)
    assert [len(cuts) for cuts in found] == [0, 1]
    assert found[1][0].size == (30, 30)
    assert found[1][0].getchannel("A").getbbox() == (0, 0, 30, 30)


def test_only_classes_with_cut_outs_in_both_halves_stay():
    red, green = (disc(RED),), (disc(GREEN),)
    first, second = Half((red, (), green), ()), Half(((), red, green), ())
    classes, one, other = shared_classes(("a", "b", "c"), first, second)
    assert classes == ("c",)
    assert one.cutouts == other.cutouts == (green,)


def test_packaged_photographs_are_all_there_and_all_different():
    found = packaged_photographs()
    assert len(found) == len(PACKAGED) == 16
    assert min(min(image.size) for image in found.values()) > 150
    assert {image.mode for image in found.values()} == {"L", "RGB"}


def test_the_halves_of_the_photographs_share_none_and_leave_none_out():
    photographs = packaged_photographs()
    one, other = split_photographs(photographs, seed=0)
    drawn = [id(image) for image in one + other]
    assert sorted(drawn) == sorted(id(image) for image in photographs.values())
    assert len(one) == len(other) == 8
    again, _ = split_photographs(dict(reversed(photographs.items())), seed=0)
    assert [id(image) for image in again] == drawn[:8]
    assert [id(image) for image in split_photographs(photographs, seed=1)[0]] != drawn[:8]


def test_a_grey_photograph_is_coloured_lest_colour_tell_the_objects():
    grey = Image.effect_noise((50, 50), 60)
    scenes = build_composites(
        ("a",), half(disc(RED), photographs=[grey]), LAYOUT, 5, seed=0, stream=0
    )
    behind = scenes.pictures[scenes.masks == 0].astype(int)
    assert np.ptp(behind, axis=-1).mean() > 20


def test_the_few_photographs_are_turned_and_recoloured():
    ramp = np.zeros((50, 50, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 250, 50)[:, None], 60
    made = half(flat(RED, 0), photographs=[Image.fromarray(ramp)])
    scenes = build_composites(("a",), made, Layout(20, (1, 1)), 60, seed=0, stream=0)
    pictures = scenes.pictures.astype(int)
    darkest = {int(channel) for channel in pictures.max(axis=(1, 2)).argmin(axis=-1)}
    assert darkest == {0, 1, 2}
    grey = pictures.max(axis=-1)
    rises = {
        (
            int(np.sign(one[-1].sum() - one[0].sum())),
            int(np.sign(one[:, -1].sum() - one[:, 0].sum())),
        )
        for one in grey
    }
    assert rises == {(1, 0), (-1, 0), (0, 1), (0, -1)}


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_own_backgrounds_come_from_any_source_and_copies_count_once(tmp_path):
    save(tmp_path / "a.png", photograph(RED))
    save(tmp_path / "b" / "copy.png", photograph(RED))
    save(tmp_path / "c.png", photograph(GREEN, size=(1500, 1100)))
    found = source_photographs(f"folder:{tmp_path}")
    assert sorted(image.size for image in found.values()) == [(60, 50), (698, 512)]
    (tmp_path / "b" / "copy.png").unlink()
    assert photographs_digest(source_photographs(f"folder:{tmp_path}")) == photographs_digest(found)


def test_one_photograph_cannot_be_split(tmp_path):
    save(tmp_path / "a.png", photograph(RED))
    save(tmp_path / "b.png", photograph(RED))
    with pytest.raises(DataError, match=r"two different photographs are needed, got 1\."):
        split_photographs(source_photographs(f"folder:{tmp_path}"), seed=0)


def test_a_damaged_background_is_named(tmp_path):
    stream = io.BytesIO()
    photograph(RED).save(stream, format="png")
    (tmp_path / "half.png").write_bytes(stream.getvalue()[:-40])
    with pytest.raises(DataError, match=r"half\.png: no background, got truncated"):
        source_photographs(f"folder:{tmp_path}")


def test_scenes_without_any_class_are_refused():
    with pytest.raises(DataError, match="needs pictures with transparency"):
        build_composites((), half(), LAYOUT, 2, seed=0, stream=0)


def test_pixels_alone_say_which_half_a_training_picture_belongs_to():
    digests = [f"{number:064x}" for number in range(2000)]
    halves = [digest_half(digest) for digest in digests]
    assert set(halves) == {0, 1}
    assert np.mean(halves) == pytest.approx(0.5, abs=0.05)
    assert halves[:10] == [digest_half(digest) for digest in digests[:10]]
