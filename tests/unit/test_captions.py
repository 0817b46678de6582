"""Caption pairs: who is paired, who is left out and why, and that no half leaks into the other."""

import json

import polars as pl
import pytest

from dinov3.curation.captions import (
    DUPLICATE,
    HELD_OUT_TWIN,
    NO_CAPTION,
    NOT_KEPT,
    PAIRS_SCHEMA,
    TOO_LONG,
    TOO_SHORT,
    UNKNOWN,
    make_caption_pairs,
)
from dinov3.errors import DataError, LineageBroken
from dinov3.recipe import load_recipe
from dinov3.release.record import file_sha256, read_record
from dinov3.stage import open_stage

ROWS = [  # path, pixels, caption, split
    ("a.png", "1", "A red  apple.\n", "train"),
    ("b.png", "2", "A pear.", "train"),
    ("c.png", "3", None, "train"),
    ("d.png", "4", "x", "train"),
    ("e.png", "5", "long " * 100, "train"),
    ("f.png", "2", "A pear.", "train"),  # the same picture in another file
    ("g.png", "7", "A pear.", "train"),  # another picture of the same text
    ("h.png", "8", "A plum.", "train"),  # not kept
    ("i.png", "9", "A held-out fig.", "train"),  # the pixels of j
    ("j.png", "9", "A fig.", "test"),
    ("k.png", "10", "A pear.", "test"),
    ("l.png", "11", "  ", "test"),
]


def manifest_table(rows=ROWS):
    columns = {
        "path": [row[0] for row in rows],
        "sha256": [f"{ord(row[0][0]):064x}" for row in rows],
        "pixel_sha256": [row[1] for row in rows],
        "caption": pl.Series([row[2] for row in rows], dtype=pl.String),
        "split": [row[3] for row in rows],
        "label": ["fruit"] * len(rows),
        "licence": ["CC0-1.0"] * len(rows),
    }
    return pl.DataFrame(columns)


class World:
    """The two tables a run starts from, each with its record."""

    def __init__(self, root):
        self.root = root
        self.manifest = root / "image_manifest" / "manifest.parquet"
        self.dataset = root / "curated_dataset" / "curated.parquet"
        self.write(manifest_table())

    def write(self, table, kept=("a", "b", "c", "d", "e", "f", "g", "i")):
        with open_stage("image_manifest", self.manifest.parent, config={}) as stage:
            stage.read_root("source", "folder", "0" * 64, {"CC0-1.0"})
            table.write_parquet(stage.path("manifest.parquet"))
        names = [f"{name}.png" for name in kept]
        with open_stage("curated_dataset", self.dataset.parent, config={}) as stage:
            rows = table.select("path", "sha256", kept=pl.col("path").is_in(names))
            rows.write_parquet(stage.path("curated.parquet"))

    def run(self, *overrides, dataset=True, pairs=None):
        make_caption_pairs(
            stage_name="caption_pairs",
            manifest=self.manifest,
            dataset=self.dataset if dataset else None,
            output=self.root / "out",
            config=load_recipe("default", overrides, phase="captions"),
            pairs=pairs,
        )
        return pl.read_parquet(self.root / "out" / "pairs.parquet")

    @property
    def summary(self):
        return json.loads((self.root / "out" / "summary.json").read_bytes())


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def named(table, split):
    return table.filter(split=split).select("path", "caption").rows()


def test_training_pairs_are_kept_and_described_test_pairs_are_held_out(world):
    table = world.run()
    assert table.schema == PAIRS_SCHEMA
    assert named(table, "train") == [
        ("a.png", "A red apple."),
        ("b.png", "A pear."),
        ("g.png", "A pear."),
    ]
    assert named(table, "test") == [("j.png", "A fig."), ("k.png", "A pear.")]


def test_everything_left_out_is_counted_by_its_reason(world):
    table = world.run()
    assert world.summary["left_out"] == {
        NO_CAPTION: 2,
        UNKNOWN: 0,
        TOO_SHORT: 1,
        TOO_LONG: 1,
        DUPLICATE: 1,
        HELD_OUT_TWIN: 1,
        NOT_KEPT: 1,
    }
    assert table.height + sum(world.summary["left_out"].values()) == len(ROWS)
    assert world.summary["train"] == {"pairs": 3, "pictures": 3, "captions": 2}
    assert world.summary["test_captions_seen_in_training"] == 1


def test_without_a_dataset_the_whole_training_half_is_paired(world):
    table = world.run(dataset=False)
    assert "h.png" in table.filter(split="train")["path"].to_list()
    assert world.summary["left_out"][NOT_KEPT] == 0


def test_a_table_of_captions_replaces_those_of_the_manifest_and_may_give_several(world, tmp_path):
    path = tmp_path / "mine.parquet"
    given = {
        "image": ["k.png", "b.png", "c.png", "a.png", "b.png", "z.png"],
        "caption": ["A lime.", "Two pears.", "A cherry.", "An apple.", "A pear.", "A zebra."],
    }
    pl.DataFrame(given).write_parquet(path)
    table = world.run(pairs=path)
    assert named(table, "train") == [
        ("a.png", "An apple."),
        ("b.png", "Two pears."),
        ("b.png", "A pear."),
        ("c.png", "A cherry."),
    ]
    assert named(table, "test") == [("k.png", "A lime.")]
    assert world.summary["left_out"][UNKNOWN] == 1
    edges = {edge.role: edge for edge in read_record(world.root / "out" / "record.json").inputs}
    assert (edges["captions"].name, edges["captions"].sha256) == (path.name, file_sha256(path))
    assert edges["captions"].record is None


def test_a_training_twin_of_a_held_out_picture_is_refused_whether_or_not_that_has_a_caption(world):
    rows = [row if row[0] != "j.png" else ("j.png", "9", None, "test") for row in ROWS]
    world.write(manifest_table(rows))
    assert "i.png" not in world.run()["path"].to_list()


def test_a_double_of_a_pair_that_is_left_out_stays(world):
    world.write(manifest_table(), kept=("a", "f"))
    assert named(world.run(), "train") == [("a.png", "A red apple."), ("f.png", "A pear.")]


def test_record_carries_edges_licences_and_counts(world):
    world.run()
    record = read_record(world.root / "out" / "record.json")
    assert [edge.role for edge in record.inputs] == ["dataset", "manifest"]
    assert record.licences["out"] == ("CC0-1.0",)
    assert record.facts == world.summary
    assert set(record.outputs) == {"pairs.parquet", "summary.json"}


def test_too_few_pairs_are_refused_with_the_reasons_and_leave_nothing(world):
    with pytest.raises(DataError, match=r"min_pairs: 4 .* got 3 \(left out: 2 without a caption"):
        world.run("min_pairs=4")
    assert not (world.root / "out").exists()


def test_a_dataset_of_other_images_is_refused(world):
    world.write(manifest_table())
    with open_stage("image_manifest", world.manifest.parent, config={}) as stage:
        manifest_table(ROWS[:-1]).write_parquet(stage.path("manifest.parquet"))
    with pytest.raises(LineageBroken, match="speaks of other images than the manifest, got 12"):
        world.run()


def test_changed_bytes_of_the_manifest_are_refused(world):
    manifest_table(ROWS[:-1]).write_parquet(world.manifest)
    with pytest.raises(LineageBroken, match="its bytes differ from the record"):
        world.run()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.png"]}, "got no column caption"),
        ({"image": [b"\x89PNG"], "caption": ["x"]}, "image is not text, got Binary"),
        ({"image": ["a.png"], "caption": [["x"]]}, "caption is not text"),
    ],
)
def test_a_caption_table_that_cannot_be_is_explained(world, tmp_path, columns, message):
    path = tmp_path / "mine.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(DataError, match=message):
        world.run(pairs=path)


def test_a_missing_caption_table_and_one_of_no_parquet_are_explained(world, tmp_path):
    with pytest.raises(DataError, match="no such table of captions"):
        world.run(pairs=tmp_path / "none.parquet")
    path = tmp_path / "text.parquet"
    path.write_text("image,caption\n")
    with pytest.raises(DataError, match="not a table of parquet"):
        world.run(pairs=path)
