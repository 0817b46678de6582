"""The curated set: smaller, more even, and a reason for everything left out."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dinov3.config import CurationConfig
from dinov3.curation.calibrate import COPIES
from dinov3.curation.curate import REASONS, class_entropy, curate, make_curated
from dinov3.curation.embed import make_embeddings
from dinov3.curation.manifest import make_manifest
from dinov3.errors import ConfigError, DataError, LineageBroken
from dinov3.recipe import load_recipe
from dinov3.release.record import file_sha256, read_record
from tests.drawn import draw


def _config(*overrides: str) -> CurationConfig:
    config = load_recipe("default", overrides, phase="curation")
    assert isinstance(config, CurationConfig)
    return config


def _pipeline(folder: Path, output: Path, *overrides: str, test_fraction: float = 0.3) -> Path:
    """Runs the three stages on a folder of pictures; returns the folder of the last."""
    source = f"folder:{folder}"
    split = f"split.test_fraction={test_fraction}"
    unlabelled = f"split.unlabelled_test_fraction={test_fraction}"
    recipe = load_recipe("default", [split, unlabelled, "expect.min_images=1"], phase="manifest")
    manifest = output / "image_manifest" / "manifest.parquet"
    make_manifest(source=source, output=manifest.parent, config=recipe, num_workers=1)
    embeddings = output / "image_embeddings" / "embeddings.parquet"
    make_embeddings(
        source=source,
        manifest=manifest,
        output=embeddings.parent,
        config=load_recipe("default", phase="embeddings"),
    )
    _curate(output, *overrides)
    return output / "curated_dataset"


def _curate(output: Path, *overrides: str) -> None:
    make_curated(
        manifest=output / "image_manifest" / "manifest.parquet",
        embeddings=output / "image_embeddings" / "embeddings.parquet",
        output=output / "curated_dataset",
        config=_config(*overrides),
    )


HUES = {"sea": 0.6, "meadow": 0.33, "rust": 0.0, "violet": 0.8}
SIZES = {"sea": 60, "meadow": 12, "rust": 12, "violet": 12}
SMALL_TREE = ("clustering.num_clusters=[16,4]", "clustering.num_resampled=[3,2]")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """96 pictures of four uneven classes with 32 planted copies and 2 exact ones, curated."""
    folder, output = tmp_path_factory.mktemp("pool"), tmp_path_factory.mktemp("out")
    names = []
    for label, count in SIZES.items():
        (folder / label).mkdir()
        for number in range(count):
            name = f"{label}/{number:02}.png"
            draw(len(names), HUES[label]).save(folder / name)
            names.append(name)
    copies = {}
    for number, index in enumerate(range(0, len(names), 3)):
        kind = list(COPIES)[number % 3]
        name = names[index].replace(".png", f" {kind}.png")  # sorts behind its original
        rng = np.random.default_rng([7, number])
        COPIES[kind](draw(index, HUES[name.split("/")[0]]), rng).save(folder / name)
        copies[name] = names[index]
    exact = {"sea/01 again.png": "sea/01.png", "rust/02 again.png": "rust/02.png"}
    for copy, name in exact.items():
        (folder / copy).write_bytes((folder / name).read_bytes())
    curated = _pipeline(folder, output, *SMALL_TREE, "keep_fraction=0.7")
    return pl.read_parquet(curated / "curated.parquet"), copies, exact, output


def test_every_row_of_the_manifest_stands_there_in_order(planted):
    table, _, _, output = planted
    manifest = pl.read_parquet(output / "image_manifest" / "manifest.parquet")
    assert table.select("path", "sha256", "split").equals(
        manifest.select("path", "sha256", "split")
    )


def test_every_left_out_row_has_a_reason_and_no_kept_one(planted):
    table = planted[0]
    assert (table["reason"].is_null() == table["kept"]).all()
    assert set(table["reason"].drop_nulls()) <= set(REASONS)
    assert (table["kept"] & (table["split"] == "test")).sum() == 0
    held_out = table.filter(pl.col("split") == "test")["reason"]
    assert set(held_out) == {"held out for evaluation"}


def test_planted_copies_are_found_and_named(planted):
    table, copies, _, _ = planted
    rows = {row["path"]: row for row in table.to_dicts()}
    in_training = {
        copy: name
        for copy, name in copies.items()
        if "train" in (rows[copy]["split"], rows[name]["split"])
    }
    named = [
        copy
        for copy, name in in_training.items()
        if rows[copy]["duplicate_of"] == name or rows[name]["duplicate_of"] == copy
    ]
    assert len(in_training) >= 25
    assert len(named) >= 0.85 * len(in_training)


def test_no_other_pair_is_taken_for_copies(planted):
    table, copies, exact, _ = planted
    known = {**copies, **exact}
    pairs = table.filter(pl.col("duplicate_of").is_not_null())
    families = [
        known.get(one, one) == known.get(two, two)
        for one, two in pairs.select("path", "duplicate_of").iter_rows()
    ]
    assert np.mean(families) >= 0.9


def test_copies_of_held_out_pictures_are_not_trained_on(planted):
    table, copies, _, _ = planted
    rows = {row["path"]: row for row in table.to_dicts()}
    straddling = [
        (name, copy) if rows[name]["split"] == "test" else (copy, name)
        for copy, name in copies.items()
        if rows[copy]["split"] != rows[name]["split"]
    ]
    out = [
        rows[train]["reason"] == "near-duplicate of a held-out image" and not rows[train]["kept"]
        for _, train in straddling
    ]
    assert len(straddling) >= 5
    assert np.mean(out) >= 0.8


def test_exact_duplicates_are_named_before_near_ones(planted):
    table, _, exact, _ = planted
    rows = {row["path"]: row for row in table.to_dicts()}
    for copy, name in exact.items():
        pair = {row["reason"] for row in (rows[copy], rows[name]) if not row["kept"]}
        assert pair & {"exact duplicate", "held out for evaluation"}


def test_similarity_of_near_duplicates_lies_above_the_threshold(planted):
    table, config = planted[0], _config()
    near = table.filter(pl.col("reason") == "near-duplicate")["similarity"]
    held = table.filter(pl.col("reason") == "near-duplicate of a held-out image")["similarity"]
    assert near.min() > config.dedup.self_threshold
    assert held.min() > config.dedup.relative_threshold
    assert table.filter(pl.col("duplicate_of").is_null())["similarity"].null_count() > 0
    assert (table["similarity"].is_null() == table["duplicate_of"].is_null()).all()


def test_the_curated_set_is_smaller_and_its_class_entropy_rises(planted):
    table, _, _, output = planted
    summary = json.loads((output / "curated_dataset" / "summary.json").read_text())
    manifest = pl.read_parquet(output / "image_manifest" / "manifest.parquet")
    labels = manifest["label"].to_numpy()
    kept, training = table["kept"].to_numpy(), (table["split"] == "train").to_numpy()
    before, after = class_entropy(labels[training]), class_entropy(labels[kept])
    assert summary["class_entropy_bits"] == {"before": before, "after": after}
    assert after > before + 0.05
    assert summary["kept"] == kept.sum() < training.sum()
    assert sum(summary["left_out"].values()) + summary["kept"] == summary["rows"] == len(table)
    for reason, count in summary["left_out"].items():
        assert count == (table["reason"] == reason).sum()


def test_balanced_sampling_keeps_the_fraction_of_what_was_clustered(planted):
    table = planted[0]
    clustered = table.filter(pl.col("cluster").is_not_null())
    assert table["kept"].sum() == round(0.7 * len(clustered))
    assert set(clustered["reason"]) == {None, "not drawn by balanced sampling"}


def test_cluster_paths_form_a_tree_from_the_top(planted):
    paths = planted[0]["cluster"].drop_nulls().to_list()
    assert all(len(path) == 2 and path[0] < 4 and path[1] < 16 for path in paths)
    parents = {}
    assert all(parents.setdefault(low, top) == top for top, low in paths)


def test_summary_counts_the_clusters_from_the_top(planted):
    summary = json.loads((planted[3] / "curated_dataset" / "summary.json").read_text())
    top, low = summary["cluster_sizes"]
    assert sum(top) == sum(low) == planted[0]["cluster"].is_not_null().sum()
    assert max(top) >= max(low)


def test_same_inputs_give_the_same_bytes_and_another_seed_does_not(planted, tmp_path):
    output = planted[3]
    made = output / "curated_dataset"
    names = ("curated.parquet", "summary.json", "record.json")
    before = [file_sha256(made / name) for name in names]
    _curate(output, *SMALL_TREE, "keep_fraction=0.7")
    assert [file_sha256(made / name) for name in names] == before
    other = tmp_path / "other"
    make_curated(
        manifest=output / "image_manifest" / "manifest.parquet",
        embeddings=output / "image_embeddings" / "embeddings.parquet",
        output=other,
        config=_config(*SMALL_TREE, "keep_fraction=0.7", "seed=1"),
    )
    assert file_sha256(other / "curated.parquet") != before[0]
    roles = [edge.role for edge in read_record(made / "record.json").inputs]
    assert roles == ["embeddings", "manifest"]


def _small(tmp_path: Path, count: int) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(count):
        draw(seed, seed / count).save(folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize("count", [1, 2, 10])
def test_pools_of_few_pictures_without_labels_work(tmp_path, count):
    curated = _pipeline(_small(tmp_path, count), tmp_path / "out", test_fraction=0)
    table = pl.read_parquet(curated / "curated.parquet")
    assert len(table) == count
    assert table["kept"].sum() == max(1, round(0.9 * count))
    summary = json.loads((curated / "summary.json").read_text())
    assert summary["class_entropy_bits"] == {"before": None, "after": None}


def test_everything_held_out_is_an_error_that_says_what_to_change(tmp_path):
    folder = _small(tmp_path, 3)
    with pytest.raises(DataError, match=r"every image is held out, got 3.*Lower split"):
        _pipeline(folder, tmp_path / "out", test_fraction=1)
    assert not (tmp_path / "out" / "curated_dataset").exists()


def test_thresholds_that_leave_nothing_are_an_error_that_says_what_to_change():
    rows = np.ones((4, 2), np.float32) / np.sqrt(2)
    held_out = np.array([True, False, False, False])
    with pytest.raises(DataError, match="relative_threshold: every image is too close"):
        curate(rows, held_out=held_out, digests=list("abcd"), config=_config())


def test_thresholds_of_another_embedder_are_refused(planted):
    with pytest.raises(ConfigError, match="thresholds are of pixels at size 24, got embeddings of"):
        _curate(planted[3], "dedup.calibration.size=24")


def test_embeddings_of_another_table_are_refused(planted, tmp_path):
    other = _pipeline(_small(tmp_path, 4), tmp_path / "out").parent
    with pytest.raises(LineageBroken, match="speaks of other images than the manifest"):
        make_curated(
            manifest=planted[3] / "image_manifest" / "manifest.parquet",
            embeddings=other / "image_embeddings" / "embeddings.parquet",
            output=tmp_path / "mixed",
            config=_config(),
        )


@pytest.mark.parametrize(
    ("manifest", "embeddings", "message"),
    [
        ("manifest", "manifest", "not a table of embeddings, got no column embedding"),
        ("embeddings", "embeddings", "not an image table, got no column split, pixel_sha256"),
    ],
)
def test_a_table_in_the_place_of_another_is_refused(
    planted, tmp_path, manifest, embeddings, message
):
    tables = {
        name: planted[3] / f"image_{name}" / f"{name}.parquet"
        for name in ("manifest", "embeddings")
    }
    with pytest.raises(DataError, match=message):
        make_curated(
            manifest=tables[manifest],
            embeddings=tables[embeddings],
            output=tmp_path / "out",
            config=_config(),
        )
    assert not (tmp_path / "out").exists()


def test_one_changed_byte_of_an_input_is_refused(tmp_path):
    output = _pipeline(_small(tmp_path, 3), tmp_path / "out").parent
    embeddings = output / "image_embeddings" / "embeddings.parquet"
    data = bytearray(embeddings.read_bytes())
    data[100] ^= 1
    embeddings.write_bytes(bytes(data))
    with pytest.raises(LineageBroken, match="its bytes differ from the record"):
        _curate(output)


def test_class_entropy_of_known_shares():
    assert class_entropy(["a", "b", None, "a", "b"]) == 1
    assert class_entropy(["a", "a"]) == 0
    assert class_entropy([None]) is None
