"""The fingerprint follows content, not clocks, and asking again is cheap."""

import io
import json
import os
import sqlite3
import subprocess
import tarfile
import time
from contextlib import closing

import pytest

from dinov3.data.sources import open_source
from dinov3.data.sources.fingerprint import Fingerprint, identify, refresh
from dinov3.data.sources.verb import main
from dinov3.errors import DataError
from dinov3.stage import CHECKOUT

LONG_AGO = 1_600_000_000


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "cat").mkdir(parents=True)
    for i in range(3):
        (folder / "cat" / f"{i}.png").write_bytes(b"picture %d" % i)
    return tmp_path


@pytest.fixture
def settled(monkeypatch):
    """A clock by which all files are old."""
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)


def measure(place, kind="folder", name="pictures"):
    return refresh(f"{kind}:{place / name}", place / "f.json", place / "cache" / "c.sqlite")


def test_touching_and_renaming_nothing_changes_nothing(place):
    first = measure(place)
    before = (place / "f.json").stat()
    for path in (place / "pictures").rglob("*.png"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    (place / "pictures" / "notes.txt").write_text("passed over")
    assert measure(place) == first
    after = (place / "f.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert json.loads((place / "f.json").read_text()) == first
    assert (first["source"], first["num_files"], first["bytes"]) == ("folder", 3, 27)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "cat" / "9.png").write_bytes(b"new"),
        lambda folder: (folder / "cat" / "0.png").unlink(),
        lambda folder: (folder / "cat" / "0.png").rename(folder / "0.png"),
        lambda folder: (folder / "cat" / "0.png").write_bytes(b"pictura 0"),
        lambda folder: os.mkfifo(folder / "pipe.png"),
    ],
    ids=["added", "removed", "moved", "edited", "pipe"],
)
def test_every_change_of_the_images_is_noticed(place, change):
    first = measure(place)
    change(place / "pictures")
    assert measure(place)["sha256"] != first["sha256"]


def test_edit_of_equal_size_with_restored_time_is_noticed(place, settled):
    target = place / "pictures" / "cat" / "0.png"
    os.utime(target, (LONG_AGO, LONG_AGO))
    first = measure(place)
    before = target.stat().st_ctime_ns
    while target.stat().st_ctime_ns == before:  # until the file system's clock has moved on
        target.write_bytes(b"PICTURE 0")
        os.utime(target, (LONG_AGO, LONG_AGO))
    assert measure(place)["sha256"] != first["sha256"]


def test_labels_of_a_list_and_bytes_inside_a_shard_are_part_of_it(place):
    table = place / "pictures" / "list.txt"
    table.write_text("cat/0.png\tcat\n")
    first = measure(place, "list", "pictures/list.txt")
    table.write_text("cat/0.png\tdog\n")
    assert measure(place, "list", "pictures/list.txt")["sha256"] != first["sha256"]
    digests = set()
    for value in (b"a", b"b"):
        with tarfile.open(place / "s.tar", "w") as tar:
            info = tarfile.TarInfo("x.png")
            info.size = 1
            tar.addfile(info, io.BytesIO(value))
        digests.add(measure(place, "wds", "s.tar")["sha256"])
    assert len(digests) == 2


def test_digest_is_the_same_from_the_cache_and_from_the_bytes(place):
    measure(place)
    cached = measure(place)
    source = open_source(f"folder:{place / 'pictures'}")
    fingerprint = Fingerprint(source.kind)
    for entry in source.entries():
        identity, data = identify(source, entry)
        fingerprint.add(entry, identity, len(data or b""))
    assert fingerprint.value() == cached


def test_settled_files_are_not_read_again(place, settled, monkeypatch):
    first = measure(place)
    monkeypatch.setattr(type(open_source(f"folder:{place}")), "read", None)  # now an error to call
    assert measure(place) == first


def test_files_changed_just_now_are_read_again(place):
    measure(place)
    with closing(sqlite3.connect(place / "cache" / "c.sqlite")) as cache:
        assert cache.execute("SELECT count(*) FROM hashes").fetchone() == (0,)


def test_damaged_cache_is_made_anew(place):
    first = measure(place)
    (place / "cache" / "c.sqlite").write_bytes(b"not a database, but long enough" * 100)
    assert measure(place) == first


def test_empty_source_is_an_error_that_says_what_was_passed_over(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"empty, holds no image.*1 \.txt"):
        refresh(f"folder:{tmp_path}", tmp_path / "f.json", tmp_path / "c.sqlite")
    assert not (tmp_path / "f.json").exists()


def test_command_takes_the_source_from_params_or_from_its_option(place, capsys):
    params = place / "params.yaml"
    params.write_text(f"source: folder:{place / 'pictures'}\n")
    assert main(["--refresh", "--params", str(params)]) == 0
    written = place / "data" / "raw_images" / "fingerprint.json"
    assert written.read_text() == capsys.readouterr().out
    assert main(["--refresh", "--params", str(params), "--source", "folder:/none"]) == 2
    assert "no such folder, got folder:/none" in capsys.readouterr().err
    params.write_text("sauce: x\n")
    assert main(["--refresh", "--params", str(params)]) == 2
    assert "source is not one line of text, got None" in capsys.readouterr().err


def make_checkout(root):
    """A checkout whose two environments report what they are asked."""
    (root / "tools").mkdir(parents=True)
    wrapper = root / "tools" / "dvc"
    wrapper.write_bytes((CHECKOUT / "tools" / "dvc").read_bytes())
    wrapper.chmod(0o755)
    (root / "params.yaml").write_text("source: folder:x\n")
    for name in (".venv", ".venv-dvc"):
        program = root / name / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >&2\necho noise\nexit ${{FAIL:-0}}\n')
        program.chmod(0o755)
    (root / ".venv" / "bin" / "dvc").symlink_to("../../tools/dvc")
    return root / ".venv" / "bin" / "dvc"


@pytest.mark.parametrize(
    ("arguments", "refreshes"),
    [
        (["status"], ["source --refresh --keep"]),
        (["-v", "--wait-for-lock", "repro", "-s", "a"], ["source --refresh"]),
        (["--cd", "status", "push"], []),
        (["repro", "--help"], []),
        (["exp", "show"], []),
        (["exp", "run", "-S", "source=folder:a b"], ["source --refresh --source folder:a b"]),
        (["exp", "run", "--set-param=params.yaml:source=list:l"],
         ["source --refresh --source list:l"]),
    ],
)  # fmt: skip
def test_wrapper_refreshes_only_before_looking_at_the_workspace(tmp_path, arguments, refreshes):
    wrapper = make_checkout(tmp_path / "check out")
    done = subprocess.run([wrapper, *arguments], capture_output=True, text=True, cwd=tmp_path)
    expected = [f".venv -m dinov3 {words}" for words in refreshes]
    expected.append(f".venv-dvc -m dvc {' '.join(arguments)}")
    assert done.stderr.splitlines() == expected
    assert done.stdout == "noise\n"  # dvc's own; the refresh is quiet


@pytest.mark.parametrize(
    ("arguments", "asked", "pulled"),
    [
        (["pull"], ["", " --made"], " noise"),  # a pull of everything names what was ever made
        (["pull", "data/x"], [""], ""),
        (["fetch", "-r", "lake", "data/x"], [" lake"], ""),
        (["pull", "--remote=lake"], [" lake", " --made"], " noise"),
        (["repro", "--pull"], [""], ""),
        (["push", "-r", "lake"], [], ""),
        (["pull", "--help"], [], ""),
    ],
)
def test_wrapper_checks_listings_before_anything_is_pulled(tmp_path, arguments, asked, pulled):
    wrapper = make_checkout(tmp_path)
    done = subprocess.run([wrapper, *arguments], capture_output=True, text=True)
    checked = [line for line in done.stderr.splitlines() if "listings" in line]
    assert checked == [f".venv-dvc {tmp_path}/tools/listings.py{words}" for words in asked]
    assert done.stderr.splitlines()[-1] == f".venv-dvc -m dvc {' '.join(arguments)}{pulled}"


def test_wrapper_stops_with_the_exit_code_of_a_failed_refresh(tmp_path):
    wrapper = make_checkout(tmp_path)
    environment = {**os.environ, "FAIL": "2"}
    done = subprocess.run([wrapper, "repro"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, ".venv -m dinov3 source --refresh\n")


@pytest.mark.parametrize("name", ['pa"th', "do$HOME", "$(true)", "back`tick", "back\\slash"])
def test_source_that_the_shell_would_read_as_more_than_a_path_is_refused(place, capsys, name):
    params = place / "params.yaml"
    params.write_text("source: folder:none\n")
    assert main(["--set", f"folder:{place / name}", "--params", str(params)]) == 2
    assert "cannot stand in a command line" in capsys.readouterr().err


def test_set_changes_the_source_and_nothing_else(place):
    params = place / "params.yaml"
    params.write_text("recipe: demo # kept\nsource: stamps:data/stamps # too\nother: 1\n")
    assert main(["--set", f"folder:{place / 'pictures'}", "--params", str(params)]) == 0
    source = json.dumps(f"folder:{place / 'pictures'}")
    assert params.read_text() == f"recipe: demo # kept\nsource: {source} # too\nother: 1\n"
