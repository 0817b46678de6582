"""Pictures in a real lakeFS server: loaded, pinned, read by stages and by loader workers."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import polars as pl
import pytest
import torch

from dinov3.cli_lake import main as lake_verb
from dinov3.cli_lake import pin, put
from dinov3.data.augment import Augmentation, CropRecipe
from dinov3.data.loader import TrainingLoader
from dinov3.data.sources import lakefs, open_source
from dinov3.data.sources.images import SourceImages
from dinov3.data.sources.verb import main as source_verb
from dinov3.errors import DataError, LineageBroken, StoreError
from tests.flow.conftest import draw_pictures
from tests.flow.forks import fork
from tests.lakefs_server import running_server

AUGMENTATION = Augmentation(
    (CropRecipe(16, (0.4, 1.0)),) * 2,
    (CropRecipe(8, (0.1, 0.4)),) * 2,
    backgrounds=((255, 255, 255),),
    cache_size=24,
)
PARAMS = "recipe: demo # kept\nsource: stamps:data/stamps # this too\nother: 1\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("lakefs") / "state") as running:
        yield running


@pytest.fixture
def reached(server, monkeypatch):
    """The server, named to this process and to those it starts."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def pictures(tmp_path):
    draw_pictures(tmp_path / "pictures", num_per_class=4)
    (tmp_path / "pictures" / "notes.txt").write_text("passed over")
    return tmp_path / "pictures"


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


def listed(spec):
    source = open_source(spec)
    return {entry.path: (entry.label, source.read(entry.path)) for entry in source.entries()}


def test_branch_is_pinned_and_what_is_put_there_later_changes_nothing(reached, pictures, params):
    repo = reached.repository()
    put(pictures, f"{repo}/main/set a")
    spec = pin(f"{repo}/main/set a", params)
    commit = reached.lake().resolve(repo, "main")
    assert spec == f"lakefs://{repo}/{commit}/set a"
    assert params.read_text() == PARAMS.replace("stamps:data/stamps", json.dumps(spec))
    before = listed(spec)
    assert before == listed(f"folder:{pictures}")
    (pictures / "line" / "000.png").write_bytes(b"another picture")
    (pictures / "line" / "001.png").unlink()
    later = put(pictures, f"{repo}/main/set a")
    assert later != spec
    assert listed(spec) == before
    assert listed(later)["line/000.png"] == ("line", b"another picture")


def test_names_of_any_kind_come_back_in_path_order(reached, tmp_path):
    names = [
        "a b/ü 日本.png",
        "a-b/1.PNG",
        "a/2.webp",
        "back\\slash.png",
        "line\nfeed.png",
        "z.png",
    ]
    for name in names:
        path = tmp_path / "names" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    repo = reached.repository()
    spec = put(tmp_path / "names", f"{repo}/main")
    for name in ("set/.hidden.png", "set/.cache/x.png", "set/notes.txt", "settle/x.png"):
        reached.lake().put(repo, "main", name, b"x")
    reached.lake().commit(repo, "main", "more")
    assert listed(spec) == listed(f"folder:{tmp_path / 'names'}")
    paths = [entry.path for entry in open_source(spec).entries()]
    assert paths == sorted(paths)
    commit = reached.lake().resolve(repo, "main")
    beside = open_source(f"lakefs://{repo}/{commit}/set")
    assert list(beside.entries()) == []
    assert beside.ignored == {"hidden": 2, ".txt": 1}


def test_branch_named_like_a_commit_is_refused(reached, pictures):
    repo = reached.repository()
    put(pictures, f"{repo}/main")
    name = "ab" * 32
    reached.lake().create_branch(repo, name, reached.lake().resolve(repo, "main"))
    with pytest.raises(DataError, match="a branch or tag is named like a commit"):
        next(open_source(f"lakefs://{repo}/{name}").entries())


def test_missing_branch_repository_and_empty_prefix_are_clear(reached, pictures, params, capsys):
    repo = reached.repository()
    cases = {
        f"{repo}/nosuch": "not there",
        "nosuchrepo/main": "not there",
        f"{repo}/main/empty": "source: empty, holds no image",
    }
    for place, words in cases.items():
        assert lake_verb(["pin", place, "--params", str(params)]) == 2
        assert words in capsys.readouterr().err
    assert params.read_text() == PARAMS
    assert lake_verb(["put", str(pictures), "nosuchrepo/main"]) == 2
    assert "python -m dinov3 lake create nosuchrepo" in capsys.readouterr().err


def test_stopped_load_goes_on_where_it_stopped(reached, pictures, capsys):
    repo = reached.repository()
    os.mkfifo(pictures / "rectangle" / "pipe.png")  # sorts behind eleven of twelve pictures
    assert lake_verb(["put", str(pictures), f"{repo}/work/cats"]) == 2
    assert "rectangle/pipe.png: cannot be loaded" in capsys.readouterr().err
    (pictures / "rectangle" / "pipe.png").unlink()
    (pictures / "zebra.png").write_bytes(b"new")
    assert lake_verb(["put", str(pictures), f"{repo}/work/cats"]) == 0
    said = capsys.readouterr()
    assert "13 pictures, 1 of them sent" in said.err
    assert listed(said.out.strip()) == listed(f"folder:{pictures}")
    assert lake_verb(["put", str(pictures), f"{repo}/work/cats"]) == 0
    assert capsys.readouterr().out == said.out  # nothing new: the commit it had


HOOK = b"""\
name: closed
on:
  pre-commit:
hooks:
  - id: closed
    type: lua
    properties:
      script: error("no changes on a Sunday")
"""


def test_commit_that_a_hook_refuses_is_no_success_whatever_it_says(reached, pictures, capsys):
    repo = reached.repository()
    reached.lake().put(repo, "main", "_lakefs_actions/closed.yaml", HOOK)
    assert lake_verb(["put", str(pictures), f"{repo}/main"]) == 2
    assert "no changes on a Sunday" in capsys.readouterr().err


def test_load_killed_in_the_middle_is_finished_by_the_same_command(reached, tmp_path):
    repo = reached.repository()
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03d}.png").write_bytes(b"picture %d" % number)
    command = [sys.executable, "-m", "dinov3", "lake", "put", folder, f"{repo}/main/many"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as loading:
        assert "100 pictures" in loading.stderr.readline()
        loading.send_signal(signal.SIGKILL)
    spec = put(folder, f"{repo}/main/many")
    assert listed(spec) == listed(f"folder:{folder}")


def test_stages_read_a_commit_as_they_read_a_folder(reached, pictures, params, tmp_path):
    repo = reached.repository()
    spec = put(pictures, f"{repo}/main/set")
    tables = {}
    for name, source in (("lake", spec), ("folder", f"folder:{pictures}")):
        root = tmp_path / name
        (root / "data" / "raw_images").mkdir(parents=True)
        (root / "params.yaml").write_text(f"source: {source}\n")
        assert source_verb(["--refresh", "--params", str(root / "params.yaml")]) == 0
        fingerprint = root / "data" / "raw_images" / "fingerprint.json"
        manifest = root / "data" / "image_manifest"
        embeddings = root / "data" / "image_embeddings"
        common = ("--recipe", "smoke_cpu", "--source", source)
        for arguments in (
            ("manifest", *common, "--fingerprint", fingerprint, "--output", manifest),
            (
                *("embeddings", *common, "--manifest", manifest / "manifest.parquet"),
                *("--output", embeddings),
            ),
        ):
            done = fork(*arguments, environment=reached.environment)
            assert done.returncode == 0, done.stderr
        table = pl.read_parquet(manifest / "manifest.parquet")
        vectors = pl.read_parquet(embeddings / "embeddings.parquet")
        tables[name] = (table.drop("source"), vectors)
        assert table["source"].unique().to_list() == [open_source(source).kind]
        record = json.loads((manifest / "record.json").read_text())
        (root_edge,) = record["inputs"]
        assert root_edge["sha256"] == json.loads(fingerprint.read_text())["sha256"]
        assert root_edge["name"] == open_source(source).kind
    assert tables["lake"][0].equals(tables["folder"][0])
    assert tables["lake"][1].equals(tables["folder"][1])


def stored_file(server, data):
    """Where the server keeps these bytes."""
    (found,) = [
        path
        for path in (server.state / "data").rglob("*")
        if path.is_file() and path.read_bytes() == data
    ]
    return found


def test_picture_that_cannot_be_fetched_stops_a_stage_and_is_not_listed(
    reached, pictures, tmp_path
):
    (pictures / "lost.png").write_bytes(os.urandom(999))
    spec = put(pictures, f"{reached.repository()}/main")
    stored_file(reached, (pictures / "lost.png").read_bytes()).unlink()
    output = tmp_path / "image_manifest"
    done = fork(
        *("manifest", "--recipe", "smoke_cpu", "--source", spec, "--output", output),
        environment=reached.environment,
    )
    assert done.returncode == 2
    assert "lost.png" in done.stderr
    assert not output.exists()


def read_back(reached, pictures):
    """A commit's pictures, checked against a table made from the folder."""
    spec = put(pictures, f"{reached.repository()}/main")
    folder = open_source(f"folder:{pictures}")
    paths = [entry.path for entry in folder.entries()]
    digests = [hashlib.sha256(folder.read(path)).hexdigest() for path in paths]
    return SourceImages(open_source(spec), paths, digests)


def batches(images, num_workers):
    loader = TrainingLoader(
        images, augmentation=AUGMENTATION, batch_size=4, seed=1, start_step=0, num_steps=3,
        num_workers=num_workers,
    )  # fmt: skip
    return list(loader)


def test_loader_workers_each_open_their_own_connection(reached, pictures):
    images = read_back(reached, pictures)
    images.read(0)  # this process has one already
    alone, together = batches(images, 0), batches(images, 2)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.global_crops, other.global_crops)
        assert np.array_equal(one.indices, other.indices)


def test_restart_of_the_server_is_outlived_by_a_read(reached, pictures, monkeypatch):
    images = read_back(reached, pictures)
    expected = [images.read(index) for index in range(3)]
    monkeypatch.setattr(lakefs, "_PAUSES", (0.5,) * 100)  # a busy machine starts it slowly
    reached.kill()
    starting = threading.Thread(target=reached.start)
    starting.start()
    assert [images.read(index) for index in range(3)] == expected
    starting.join()


def test_absence_and_silence_of_the_server_end_a_read(reached, pictures, monkeypatch):
    images = read_back(reached, pictures)
    monkeypatch.setattr(lakefs, "_PAUSES", (0.0,))
    monkeypatch.setenv("LAKEFS_TIMEOUT", "0.5")
    with reached.hung(), pytest.raises(StoreError, match=r"is silent, got no byte for 0\.5 s"):
        images.read(0)
    reached.kill()
    try:
        with pytest.raises(StoreError, match="no lakeFS server answers"):
            images.read(1)
    finally:
        reached.start()


def test_pinned_source_needs_no_server_to_be_unchanged(reached, pictures, tmp_path, capsys):
    spec = put(pictures, f"{reached.repository()}/main")
    params = tmp_path / "params.yaml"
    params.write_text(f"source: {spec}\n")
    arguments = ["--refresh", "--params", str(params)]
    assert source_verb(arguments) == 0
    first = capsys.readouterr().out
    reached.stop()
    try:
        assert source_verb(arguments) == 0
        assert capsys.readouterr().out == first
    finally:
        reached.start()


def test_bytes_that_were_not_committed_are_refused(reached, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    data = os.urandom(4096)
    (folder / "a.png").write_bytes(data)
    spec = put(folder, f"{reached.repository()}/main")
    stored = stored_file(reached, data)
    stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(LineageBroken, match="its bytes are not those that were committed"):
        open_source(spec).read("a.png")
