"""The image table: every hostile file is a right row or has its reason; the split holds still."""

import hashlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import polars as pl
import psutil
import pytest
from PIL import Image

from dinov3.curation.imagefacts import CHUNK_SIZE, difference_hash
from dinov3.curation.manifest import MANIFEST_SCHEMA, make_manifest, split_expression
from dinov3.data.sources.fingerprint import refresh
from dinov3.errors import DataError, JudgementFailed
from dinov3.recipe import load_recipe
from dinov3.release.record import read_record

LENIENT = ["expect.max_unreadable_fraction=1", "expect.max_small_fraction=1", "expect.min_images=1"]


def config(*overrides):
    return load_recipe("default/manifest", [*LENIENT, *overrides])


def run(tmp_path, spec, *overrides, **options):
    output = tmp_path / "out" / "image_manifest"
    make_manifest(source=spec, output=output, config=config(*overrides), num_workers=1, **options)
    return output


def gradient(mode="RGB", size=(12, 9)):
    grey = Image.linear_gradient("L").resize(size)
    return grey.convert(mode)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def oriented():
    image = gradient(size=(12, 9))
    exif = image.getexif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GOOD = {
    b"1x1.png": (encode(gradient(size=(1, 1)), "PNG"), 1, 1, "RGB"),
    b"16bit.png": (encode(gradient().convert("I;16"), "PNG"), 12, 9, "RGB"),
    b"grey.jpg": (encode(gradient("L"), "JPEG"), 12, 9, "RGB"),
    b"palette.png": (encode(gradient("P"), "PNG"), 12, 9, "RGB"),
    b"cmyk.jpg": (encode(gradient("CMYK"), "JPEG"), 12, 9, "RGB"),
    b"rotated.jpg": (oriented(), 9, 12, "RGB"),
    b"animated.gif": (
        encode(gradient(), "GIF", save_all=True, append_images=[gradient("L")]), 12, 9, "RGB",
    ),
    b"photo.webp": (encode(gradient(), "WEBP"), 12, 9, "RGB"),
    b"alpha.png": (encode(Image.new("RGBA", (12, 9), (9, 9, 9, 0)), "PNG"), 12, 9, "RGBA"),
    b"with space.png": (encode(gradient(), "PNG"), 12, 9, "RGB"),
    b"new\nline.png": (encode(gradient(), "PNG"), 12, 9, "RGB"),
    b"not utf8 \xff.png": (encode(gradient(), "PNG"), 12, 9, "RGB"),
}  # fmt: skip
BAD = {
    b"empty.png": b"",
    b"cut.jpg": encode(gradient(size=(64, 64)), "JPEG")[:400],
    b"cut.png": encode(gradient(size=(64, 64)), "PNG")[:-40],
    b"text.jpg": b"this is no picture",
    b"bomb.png": bomb(40_000, 40_000),
    b"huge.png": bomb(60, 60),
}


@pytest.fixture
def hostile(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, (data, *_) in GOOD.items():
        (folder / os.fsdecode(name)).write_bytes(data)
    for name, data in BAD.items():
        (folder / os.fsdecode(name)).write_bytes(data)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "sock.png"))
    return folder


def test_every_hostile_file_is_a_right_row_or_listed_with_its_reason(tmp_path, hostile):
    output = run(tmp_path, f"folder:{hostile}", "max_pixels=3000")
    images = pl.read_parquet(output / "manifest.parquet")
    assert images.schema == MANIFEST_SCHEMA
    assert images["path"].is_sorted()
    found = {
        row["path"]: (row["width"], row["height"], row["mode"])
        for row in images.iter_rows(named=True)
    }
    names = {b"new\nline.png": "new\\x0aline.png", b"not utf8 \xff.png": "not utf8 \\xff.png"}
    expected = {
        names.get(name, os.fsdecode(name)): (w, h, m) for name, (_, w, h, m) in GOOD.items()
    }
    assert found == expected
    listed = pl.read_parquet(output / "unreadable.parquet")
    reasons = dict(listed.select("path", "reason").iter_rows())
    special = {"loop/": "symlink loop", "dangling.png": "missing",
               "pipe.png": "not a regular file", "sock.png": "not a regular file"}  # fmt: skip
    assert special.items() <= reasons.items()
    assert reasons.keys() == special.keys() | {os.fsdecode(name) for name in BAD}
    assert all(reasons.values())
    assert reasons["bomb.png"] == reasons["huge.png"] != reasons["text.jpg"]
    facts = read_record(output / "record.json").facts
    assert facts["rows"] + sum(facts["unreadable"].values()) == facts["source"]["num_files"] == 22


def test_unreadable_files_and_folders_are_listed(tmp_path, hostile):
    (hostile / "photo.webp").chmod(0)
    (hostile / "locked").mkdir(mode=0)
    if os.access(hostile / "locked", os.R_OK):
        pytest.skip("this user may read everything")
    output = run(tmp_path, f"folder:{hostile}")
    listed = pl.read_parquet(output / "unreadable.parquet")
    reasons = dict(listed.select("path", "reason").iter_rows())
    assert reasons["photo.webp"] == reasons["locked/"] == "permission denied"


def make_pictures(folder, num, label="cat"):
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i in range(num):
        image = Image.new("RGB", (16, 16), (i % 256, i // 256, len(label)))
        image.save(folder / label / f"{i:04d}.png")


def test_rows_name_bytes_pixels_and_origin(tmp_path):
    make_pictures(tmp_path / "in", 3)
    spec = f"folder:{tmp_path / 'in'}"
    refresh(spec, tmp_path / "f.json", tmp_path / "c.sqlite")
    output = run(tmp_path, spec, "licence=CC0-1.0", fingerprint=tmp_path / "f.json")
    row = pl.read_parquet(output / "manifest.parquet").row(1, named=True)
    data = (tmp_path / "in" / "cat" / "0001.png").read_bytes()
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert (row["path"], row["bytes"], row["label"]) == ("cat/0001.png", len(data), "cat")
    assert (row["licence"], row["source"], row["caption"]) == ("CC0-1.0", "folder", None)
    record = read_record(output / "record.json")
    (edge,) = record.inputs
    assert edge.sha256 == json.loads((tmp_path / "f.json").read_text())["sha256"]
    assert record.licences["out"] == ("CC0-1.0",)
    assert record.facts["labels"] == {"cat": 3}
    assert json.loads((output / "verdict.json").read_text())["passed"] is True
    assert str(tmp_path) not in (output / "record.json").read_text()


def test_same_source_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    make_pictures(tmp_path / "in", 3 * CHUNK_SIZE + 1)
    spec = f"folder:{tmp_path / 'in'}"
    files = ("manifest.parquet", "unreadable.parquet", "verdict.json", "record.json")
    results = []
    for workers in (1, 2):
        output = tmp_path / "out" / "image_manifest"
        make_manifest(source=spec, output=output, config=config(), num_workers=workers)
        results.append([(output / name).read_bytes() for name in files])
    assert results[0] == results[1]


def test_a_new_image_never_moves_an_old_one_across(tmp_path):
    make_pictures(tmp_path / "in", 40)
    spec = f"folder:{tmp_path / 'in'}"
    split = "split.test_fraction=0.5"
    before = pl.read_parquet(run(tmp_path, spec, split) / "manifest.parquet")
    make_pictures(tmp_path / "in", 60, "a new label")
    after = pl.read_parquet(run(tmp_path, spec, split) / "manifest.parquet")
    assert after.join(before, on="path").height == 40
    assert after.filter(pl.col("label") == "cat").equals(before)
    assert set(before["split"]) == {"train", "test"}


@pytest.mark.parametrize(
    ("head", "label", "fraction", "expected"),
    [
        ("7fffffffffffffff", "cat", 0.5, "test"),
        ("8000000000000000", "cat", 0.5, "train"),
        ("0000000000000000", "cat", 0.0, "train"),
        ("ffffffffffffffff", "cat", 1.0, "test"),
        ("0000000000000000", "sign", 1.0, "train"),
        ("0000000000000000", None, 1.0, "train"),
    ],
)
def test_split_is_exact_at_its_edges(head, label, fraction, expected):
    split = config(
        f"split.test_fraction={fraction}", "split.unlabelled_test_fraction=0.0",
        "split.never_test=[sign]",
    ).split  # fmt: skip
    frame = pl.DataFrame(
        {"pixel_sha256": [head + "f" * 48], "label": [label]}, schema_overrides={"label": pl.String}
    )
    assert frame.select(split_expression(split)).item() == expected


def test_changed_source_is_refused(tmp_path):
    make_pictures(tmp_path / "in", 3)
    spec = f"folder:{tmp_path / 'in'}"
    refresh(spec, tmp_path / "f.json", tmp_path / "c.sqlite")
    make_pictures(tmp_path / "in", 4)
    with pytest.raises(DataError, match="the source is not what it was"):
        run(tmp_path, spec, fingerprint=tmp_path / "f.json")
    assert not list((tmp_path / "out").iterdir())


def test_source_without_images_or_without_readable_ones_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"empty, holds no image, got folder:.*1 \.txt"):
        run(tmp_path, f"folder:{tmp_path / 'in'}")
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        run(tmp_path, f"folder:{tmp_path / 'in'}")


def test_failed_verdict_leaves_itself_and_nothing_else(tmp_path):
    make_pictures(tmp_path / "in", 3)
    spec = f"folder:{tmp_path / 'in'}"
    output = run(tmp_path, spec)
    assert (output / "manifest.parquet").is_file()
    with pytest.raises(JudgementFailed, match="small_fraction"):
        run(tmp_path, spec, "expect.min_short_side=17", "expect.max_small_fraction=0.5")
    assert [path.name for path in output.iterdir()] == ["verdict.json"]
    assert json.loads((output / "verdict.json").read_text())["passed"] is False


def test_difference_hash_holds_under_resizing_and_tells_pictures_apart():
    image = Image.linear_gradient("L").convert("RGB")  # from top to bottom
    image.paste((255, 0, 0), (20, 30, 90, 200))
    first = int(difference_hash(image), 16)
    small = int(difference_hash(image.resize((100, 80))), 16)
    other = int(difference_hash(image.transpose(Image.Transpose.ROTATE_90)), 16)
    assert (first ^ small).bit_count() <= 6
    assert (first ^ other).bit_count() >= 12


def start_long_manifest(tmp_path):
    """A manifest of large pictures in a process of its own, and its workers."""
    folder = tmp_path / "in"
    folder.mkdir()
    data = encode(Image.effect_noise((1500, 1500), 50), "PNG")
    for i in range(400):
        (folder / f"{i}.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "one.png").write_bytes(data)
    code = (
        "import sys; from pathlib import Path; from dinov3.recipe import load_recipe; "
        "from dinov3.curation.manifest import make_manifest; "
        "make_manifest(source=sys.argv[1], output=Path(sys.argv[2]), "
        "config=load_recipe('default/manifest'), num_workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"folder:{folder}", str(tmp_path / "out" / "m")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    parent = psutil.Process(process.pid)
    while not (workers := [c for c in parent.children() if is_decoding(c)]):
        assert process.poll() is None
        time.sleep(0.02)
    return process, workers


def is_decoding(process):
    try:
        return "spawn_main" in " ".join(process.cmdline()) and process.cpu_times().user > 0.3
    except psutil.NoSuchProcess:
        return False


def test_killed_worker_is_an_error_that_names_the_images(tmp_path):
    process, workers = start_long_manifest(tmp_path)
    workers[0].kill()
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "DataError: image_manifest: a worker process died" in errors
    assert "got images from '0.png' to " in errors


def test_workers_die_with_the_process_that_started_them(tmp_path):
    process, workers = start_long_manifest(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []
    assert len(gone) + len(alive) == len(workers)
