"""Embeddings: the rows of the manifest, unit norm, alike for copies only."""

import io

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov3 import hub
from dinov3.curation.embed import make_embeddings
from dinov3.curation.embedders import PixelEmbedder, open_embedder
from dinov3.curation.manifest import make_manifest
from dinov3.errors import CheckpointError, ConfigError, LineageBroken
from dinov3.recipe import load_recipe
from dinov3.release.record import file_sha256, read_record
from tests.drawn import draw


def _config(*overrides: str):
    return load_recipe("default", [*overrides, "run.device=cpu"], phase="embeddings")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of ten pictures, one of them transparent, and its image table."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(9):
        draw(seed, seed / 9).save(folder / f"{seed}.png")
    half = draw(9)
    half.putalpha(Image.linear_gradient("L").resize(half.size))
    half.save(folder / "half.png")
    output = folder.parent / "image_manifest"
    recipe = load_recipe("default", phase="manifest")
    make_manifest(source=f"folder:{folder}", output=output, config=recipe, num_workers=1)
    return folder, output / "manifest.parquet"


def _embed(photos, output, *overrides: str) -> pl.DataFrame:
    folder, manifest = photos
    make_embeddings(
        source=f"folder:{folder}", manifest=manifest, output=output, config=_config(*overrides)
    )
    return pl.read_parquet(output / "embeddings.parquet")


def test_rows_are_those_of_the_manifest_in_its_order(photos, tmp_path):
    table = _embed(photos, tmp_path / "out")
    manifest = pl.read_parquet(photos[1])
    assert table.select("path", "sha256").equals(manifest.select("path", "sha256"))
    rows = table["embedding"].to_numpy()
    assert rows.shape == (10, 3 * 16 * 16 + 64)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_transparent_pictures_are_seen_on_white(photos, tmp_path):
    table = _embed(photos, tmp_path / "out")
    image = Image.open(photos[0] / "half.png")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    expected = PixelEmbedder(16)([on_white.convert("RGB")])[0]
    found = table.filter(pl.col("path") == "half.png")["embedding"].to_numpy()[0]
    assert float(found @ expected) > 0.9999


def test_batch_size_changes_no_byte(photos, tmp_path):
    for size in (1, 3, 64):
        _embed(photos, tmp_path / str(size), f"run.batch_size={size}")
    digests = {file_sha256(tmp_path / str(n) / "embeddings.parquet") for n in (1, 3, 64)}
    records = {file_sha256(tmp_path / str(n) / "record.json") for n in (1, 3, 64)}
    assert len(digests) == len(records) == 1


def test_the_record_names_the_manifest_and_the_embedder(photos, tmp_path):
    _embed(photos, tmp_path / "out")
    record = read_record(tmp_path / "out" / "record.json")
    assert record.stage == "image_embeddings"
    assert [(edge.role, edge.sha256) for edge in record.inputs] == [
        ("manifest", file_sha256(photos[1]))
    ]
    assert record.facts == {"rows": 10, "embedder": "pixels", "dim": 832}


def test_a_picture_that_changed_since_the_manifest_stops_the_stage(photos, tmp_path):
    folder, manifest = photos
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    draw(99).save(changed / "3.png")
    with pytest.raises(LineageBroken, match=r"3\.png: its bytes differ from the image table"):
        make_embeddings(
            source=f"folder:{changed}",
            manifest=manifest,
            output=tmp_path / "out",
            config=_config(),
        )
    assert not (tmp_path / "out").exists()


def test_backbones_of_the_hub_embed_with_a_local_file(photos, tmp_path):
    model = hub.random_init("dinov3_vits16", seed=0)
    weights = tmp_path / "backbone.safetensors"
    save_file(model.state_dict(), weights)
    overrides = ("embedder=dinov3_vits16", f"weights={weights}", "size=32", "run.batch_size=4")
    rows = _embed(photos, tmp_path / "out", *overrides)["embedding"].to_numpy()
    image = hub.transform(32)(Image.open(photos[0] / "0.png").convert("RGB"))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.eval()(image[None]), dim=-1)[0]
    assert rows.shape == (10, 384)
    assert np.allclose(rows[0], expected.numpy(), atol=1e-5)
    inputs = read_record(tmp_path / "out" / "record.json").inputs
    assert ("embedder", file_sha256(weights)) in {(edge.role, edge.sha256) for edge in inputs}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["embedder=pixel"], ConfigError, "no such embedder, got 'pixel'. Did you mean pixels"),
        (["embedder=dinov3_vits16"], ConfigError, "dinov3_vits16 needs a local file, got null"),
        (["weights=a.pth"], ConfigError, "the embedder pixels has none, got a.pth"),
        (["embedder=dinov3_vits16", "weights=gone.pth"], CheckpointError, "gone.pth: no such file"),
    ],
)
def test_embedders_that_cannot_be_are_explained(overrides, error, message):
    with pytest.raises(error, match=message):
        open_embedder(_config(*overrides))


PICTURE = draw(5, size=(200, 160))


def _cosine(one: Image.Image, two: Image.Image) -> float:
    rows = PixelEmbedder(16)([one, two])
    return float(rows[0] @ rows[1])


def test_pixels_see_copies_as_alike_and_other_pictures_as_not():
    stream = io.BytesIO()
    PICTURE.save(stream, "JPEG", quality=40)
    copies = [PICTURE.resize((67, 53)), Image.open(stream), PICTURE.crop((10, 8, 190, 152))]
    assert min(_cosine(PICTURE, copy.convert("RGB")) for copy in copies) > 0.96
    assert max(_cosine(PICTURE, draw(seed, size=(200, 160))) for seed in range(10, 20)) < 0.95


def test_pixels_find_a_drawing_wherever_it_stands_on_white():
    paper = Image.new("RGB", (400, 300), "white")
    paper.paste(PICTURE, (170, 20))
    assert _cosine(PICTURE, paper) > 0.98


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 3), (8, 8)])
@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_pixels_of_flat_and_tiny_pictures_are_unit_rows(size, colour):
    row = PixelEmbedder(16)([Image.new("RGB", size, colour)])[0]
    assert np.isfinite(row).all()
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


def test_flat_pictures_of_different_colours_differ():
    assert _cosine(Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")) < 0.5
