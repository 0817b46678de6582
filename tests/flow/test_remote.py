"""dvc's remotes: set by tools/remote, always verified; a clone elsewhere restores everything."""

import configparser
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dinov3.cli_lake import main as lake_verb
from orchestration.stages import CHECKOUT
from tests.flow.conftest import draw_pictures
from tests.flow.project import DVC, Project, environment
from tests.lakefs_server import running_server

PIPELINE = """
stages:
  weights:
    cmd: python code/weights.py ${steps}
    deps: [code/weights.py]
    params: [steps]
    outs:
    - data/weights/backbone.safetensors
    - data/weights/snapshots
    - data/weights/record.json
    - data/weights/run.json
  reader:
    cmd: python code/reader.py ${again}
    deps:
    - code/reader.py
    - data/weights/backbone.safetensors
    - data/weights/snapshots
    - data/weights/record.json
    params: [again]
    outs:
    - data/reader/digest.txt
    - data/reader/record.json
    - data/reader/run.json
"""

WEIGHTS = """
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dinov3.stage import open_stage

with open_stage("weights", Path("data/weights"), config={"steps": int(sys.argv[1])}) as stage:
    values = np.arange(64, dtype=np.float32)
    save_file({"a": values}, stage.path("backbone.safetensors"))
    stage.path("snapshots").mkdir()
    for step in (1, 2):
        save_file({"a": values * step}, stage.path(f"snapshots/{step}.safetensors"))
"""

READER = """
import sys
from pathlib import Path

from dinov3.release.tensors import tensor_digest
from dinov3.stage import open_stage

folder = Path("data/weights")
with open_stage("reader", Path("data/reader"), config={"again": sys.argv[1]}) as stage:
    read = [stage.read("backbone", folder / "backbone.safetensors")]
    read.append(stage.read("snapshot", folder / "snapshots" / "2.safetensors"))
    stage.path("digest.txt").write_text("".join(tensor_digest(path) for path in read))
"""

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
BACKBONE = "data/weights/backbone.safetensors"
SNAPSHOT = "data/weights/snapshots/2.safetensors"


def git(root, *arguments):
    subprocess.run([*GIT, *arguments], cwd=root, check=True, capture_output=True)


def equip(root):
    """Gives a checkout the tool and dvc's environment, as setup would."""
    (root / "tools").mkdir(exist_ok=True)
    shutil.copy2(CHECKOUT / "tools" / "remote", root / "tools" / "remote")
    (root / ".venv-dvc").symlink_to(CHECKOUT / ".venv-dvc")


def remote(root, *arguments, cwd=None, **variables):
    """Runs the tool; HOME is the checkout's neighbour, so nothing is written elsewhere."""
    kept = {
        name: value
        for name, value in environment().items()
        if not name.startswith(("AWS_", "LAKEFS_", "DINOV3_HOME", "XDG_DATA_HOME"))
    }
    env = {**kept, "HOME": str(root.parent / "home"), **variables}
    return subprocess.run(
        [root / "tools" / "remote", *arguments],
        cwd=cwd or root, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def pull(root):
    """What tools/dvc does for `dvc pull`."""
    checked = subprocess.run(
        [DVC.with_name("python"), CHECKOUT / "tools" / "listings.py"],
        cwd=root, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if checked.returncode != 0:
        return checked
    return subprocess.run(
        [DVC, "pull"], cwd=root, env=environment(), capture_output=True, text=True, check=False
    )


def settings(root):
    """The configuration of this clone alone, as dvc would list it."""
    read = configparser.ConfigParser()
    read.read(root / ".dvc" / "config.local")
    names = {section: section.strip("'").replace(' "', ".").strip('"') for section in read}
    return {f"{names[part]}.{key}": value for part in read for key, value in read[part].items()}


def create(root):
    """A git repository with the small pipeline; nothing has run in it."""
    project = Project.create(root)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "code" / "weights.py").write_text(WEIGHTS)
    (root / "code" / "reader.py").write_text(READER)
    (root / "params.yaml").write_text("steps: 3\nagain: a\n")
    git(root, "init", "--quiet")
    project.dvc("config", "core.no_scm", "false")
    ignored = (".venv-dvc", "/tools", "/.dvc/tmp", "/.dvc/cache", "/.dvc/config.local")
    (root / ".gitignore").write_text("\n".join((*ignored, "/data/weights", "/data/reader")) + "\n")
    equip(root)
    return project


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A project whose results are committed and pushed to a directory; not to be changed."""
    project = create(tmp_path_factory.mktemp("pushed") / "project")
    project.dvc("repro")
    git(project.root, "add", "--all")
    git(project.root, "commit", "--quiet", "-m", "results")
    done = remote(project.root)
    assert done.returncode == 0, done.stderr
    project.dvc("push")
    return project


@pytest.fixture
def store(pushed, tmp_path):
    """A copy of the pushed directory, with its times."""
    original = pushed.root.parent / "home" / ".local" / "share" / "dinov3" / "dvc-remote"
    return Path(shutil.copytree(original, tmp_path / "store"))


@pytest.fixture
def clone(pushed, tmp_path):
    """A clone elsewhere; without a remote and without any bytes."""
    root = tmp_path / "elsewhere" / "clone"
    root.parent.mkdir()
    git(tmp_path, "clone", "--quiet", str(pushed.root), str(root))
    equip(root)
    return Project(root)


def object_of(project, store, name):
    """The file of a remote that holds an output, or the listing of a folder."""
    folder = project.root / Path(name).parent
    lock = yaml.safe_load((project.root / "dvc.lock").read_text())
    for out in lock["stages"]["weights"]["outs"]:
        digest = out["md5"]
        if out["path"] == name:
            return store / "files" / "md5" / digest[:2] / digest[2:]
        if folder.relative_to(project.root) == Path(out["path"]):
            listing = store / "files" / "md5" / digest[:2] / digest[2:]
            entries = json.loads(listing.read_text())
            (inner,) = [e["md5"] for e in entries if e["relpath"] == Path(name).name]
            return store / "files" / "md5" / inner[:2] / inner[2:]
    raise KeyError(name)


def change_in_place(path, edit=lambda data: data[:-1] + bytes([data[-1] ^ 1])):
    """Other bytes of the same length in the same file, with the old times."""
    before = path.stat()
    mode = before.st_mode
    path.chmod(0o644)
    data = path.read_bytes()
    changed = edit(data)
    assert len(changed) == len(data)
    assert changed != data
    with path.open("r+b") as stream:
        stream.write(changed)
    path.chmod(mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino


def outputs(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for stage in ("weights", "reader")
        for path in sorted((root / "data" / stage).rglob("*"))
        if path.is_file()
    }


def test_clone_elsewhere_restores_everything_and_is_clean(pushed, clone, store):
    assert remote(clone.root, str(store)).returncode == 0
    assert pull(clone.root).returncode == 0
    assert outputs(clone.root) == outputs(pushed.root)
    assert SNAPSHOT in outputs(clone.root)
    assert "up to date" in clone.dvc("status")
    assert "in sync" in clone.dvc("status", "--cloud")


@pytest.mark.parametrize("name", [BACKBONE, SNAPSHOT])
def test_tampered_object_of_the_remote_is_refused_on_pull(clone, store, name):
    target = object_of(clone, store, name)
    change_in_place(target)
    assert remote(clone.root, str(store)).returncode == 0
    done = pull(clone.root)
    assert done.returncode != 0, done.stdout + done.stderr
    cached = clone.root / ".dvc" / "cache" / target.relative_to(store)
    assert not cached.exists()
    assert not (clone.root / name).exists()


def swap_names(listing):
    """The listing of a folder with its two files exchanged."""
    return listing.replace(b"1.safe", b"?.safe").replace(b"2.safe", b"1.safe").replace(b"?", b"2")


def lead_out(listing):
    """The listing of a folder with a file that would land outside the checkout."""
    return listing.replace(b'"1.safetensors"', b'"../../../../x"')


@pytest.mark.parametrize("edit", [swap_names, lead_out])
def test_tampered_listing_of_a_folder_is_refused_before_dvc_reads_it(clone, store, edit):
    listing = object_of(clone, store, "data/weights/snapshots")
    listing.chmod(0o644)
    listing.write_bytes(edit(listing.read_bytes()))
    assert remote(clone.root, str(store)).returncode == 0
    done = pull(clone.root)
    assert done.returncode == 1
    assert "data/weights/snapshots: the remote's listing of this folder is not" in done.stderr
    assert not (clone.root / "data" / "weights" / "snapshots").exists()
    assert not (clone.root.parent / "x").exists()


def test_right_listing_in_the_cache_is_not_asked_for_again(clone, store):
    assert remote(clone.root, str(store)).returncode == 0
    assert pull(clone.root).returncode == 0
    shutil.rmtree(clone.root / "data" / "weights" / "snapshots")
    listing = object_of(clone, store, "data/weights/snapshots")
    change_in_place(listing, swap_names)
    assert pull(clone.root).returncode == 0
    assert "up to date" in clone.dvc("status")


@pytest.mark.parametrize("name", [BACKBONE, SNAPSHOT])
def test_weight_edited_in_place_is_caught_by_the_stage_that_reads_it(clone, store, name):
    remote(clone.root, str(store))
    clone.dvc("pull")
    change_in_place(clone.root / name)
    assert "up to date" in clone.dvc("status")  # dvc trusts size and time
    (clone.root / "params.yaml").write_text("steps: 3\nagain: b\n")
    said = clone.dvc("repro", check=False)
    assert f"{name}: its bytes differ from the record of its stage" in said
    assert "failed to reproduce 'reader'" in said
    assert not (clone.root / "data" / "reader" / "record.json").exists()


IMAGE_STAGES = ("image_manifest", "image_embeddings")


@pytest.fixture(scope="module")
def imaged(tmp_path_factory):
    """The first two stages as dvc.yaml has them, on drawn pictures, by the smallest recipe.

    Made once: what a test changes in it, it puts back.
    """
    root = tmp_path_factory.mktemp("imaged") / "project"
    draw_pictures(root / "pictures", num_per_class=4)
    (root / "data" / "raw_images").mkdir(parents=True)
    stages = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    kept = {name: stages[name] for name in IMAGE_STAGES}
    for stage in kept.values():
        stage["deps"] = [dep for dep in stage["deps"] if dep.startswith("data/")]
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    overrides = {"manifest": "", "embeddings": ""}
    params = {"recipe": "smoke_cpu", "source": f"folder:{root / 'pictures'}"}
    (root / "params.yaml").write_text(yaml.safe_dump({**params, "overrides": overrides}))
    subprocess.run(
        ["python", "-m", "dinov3", "source", "--refresh"], cwd=root, env=environment(), check=True,
        capture_output=True,
    )  # fmt: skip
    project = Project(root)
    project.dvc("init", "--no-scm", "--quiet")
    project.dvc("config", "core.analytics", "false")
    project.dvc("repro")
    return project


def test_clone_without_the_pictures_is_clean_too(imaged, tmp_path):
    origin = Project(Path(shutil.copytree(imaged.root, tmp_path / "origin")))
    git(origin.root, "init", "--quiet")
    origin.dvc("config", "core.no_scm", "false")
    ignored = [".venv-dvc", "/tools", "/.dvc/tmp", "/.dvc/cache", "/.dvc/config.local", "/.cache"]
    ignored += ["/pictures", *(f"/data/{name}" for name in IMAGE_STAGES)]
    (origin.root / ".gitignore").write_text("\n".join(ignored) + "\n")
    equip(origin.root)
    git(origin.root, "add", "--all")
    git(origin.root, "commit", "--quiet", "-m", "results")
    assert remote(origin.root, str(tmp_path / "store")).returncode == 0
    origin.dvc("push")
    git(tmp_path, "clone", "--quiet", str(origin.root), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    equip(clone.root)
    assert remote(clone.root, str(tmp_path / "store")).returncode == 0
    assert pull(clone.root).returncode == 0
    pictures = imaged.root / "pictures"
    pictures.rename(imaged.root / "away")
    try:
        looked = subprocess.run(
            ["python", "-m", "dinov3", "source", "--refresh", "--keep"],
            cwd=clone.root, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        (imaged.root / "away").rename(pictures)
    assert looked.returncode == 0
    assert "taken as it was last seen" in looked.stderr
    assert "up to date" in clone.dvc("status")


def test_image_edited_in_place_is_caught_by_the_stage_that_reads_it(imaged, tmp_path):
    project = Project(Path(shutil.copytree(imaged.root, tmp_path / "project")))
    picture = imaged.root / "pictures" / "line" / "002.png"
    before = picture.read_bytes()
    change_in_place(picture)
    try:
        assert "up to date" in project.dvc("status")
        said = project.dvc("repro", "--force", "--single-item", "image_embeddings", check=False)
    finally:
        picture.write_bytes(before)
    assert "line/002.png: its bytes differ from the image table" in said
    assert "failed to reproduce 'image_embeddings'" in said


RUNS = """
stages:
  other: {cmd: cp given data/other, deps: [given], outs: [data/other]}
  release: {cmd: cp given data/release, deps: [given], outs: [data/release]}
"""


@pytest.mark.parametrize(("stage", "made"), [("other", "planted"), ("release", "genuine")])
def test_planted_run_never_becomes_a_release(tmp_path, stage, made):
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    (root / "dvc.yaml").write_text(RUNS)
    (root / "given").write_text("genuine")
    equip(root)
    (root / ".venv").symlink_to(CHECKOUT / ".venv")
    shutil.copy2(CHECKOUT / "tools" / "dvc", root / "tools" / "dvc")
    subprocess.run([DVC, "init", "--no-scm", "--quiet"], cwd=root, check=True)
    repro = [root / "tools" / "dvc", "repro", "--single-item", stage]
    subprocess.run(repro, cwd=root, env=environment(), check=True, capture_output=True)
    (run,) = [path for path in (root / ".dvc/cache/runs").rglob("*") if path.is_file()]
    genuine, planted = (hashlib.md5(text).hexdigest() for text in (b"genuine", b"planted"))
    before, outs, after = run.read_text().partition("outs:")
    run.write_text(before + outs + after.replace(genuine, planted))
    (root / ".dvc/cache/files/md5" / planted[:2]).mkdir()
    (root / ".dvc/cache/files/md5" / planted[:2] / planted[2:]).write_bytes(b"planted")
    (root / "dvc.lock").unlink()
    (root / "data" / stage).unlink()
    subprocess.run(repro, cwd=root, env=environment(), check=True, capture_output=True)
    assert (root / "data" / stage).read_text() == made


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A folder where dvc was set up and nothing else; not to be changed."""
    root = tmp_path_factory.mktemp("empty")
    subprocess.run([DVC, "init", "--no-scm", "--quiet"], cwd=root, check=True)
    return root


@pytest.fixture
def bare(empty, tmp_path):
    """A checkout with dvc and the tool, and nothing configured."""
    root = Path(shutil.copytree(empty, tmp_path / "bare"))
    equip(root)
    return root


def test_default_is_a_verified_directory_outside_set_for_this_clone_alone(bare, tmp_path):
    shared = (bare / ".dvc" / "config").read_bytes()
    place = tmp_path / "home" / ".local" / "share" / "dinov3" / "dvc-remote"
    for _ in range(2):
        assert remote(bare).returncode == 0
        assert settings(bare) == {
            "core.remote": "dinov3",
            "remote.dinov3.url": str(place),
            "remote.dinov3.verify": "true",
        }
    assert place.is_dir()
    assert (bare / ".dvc" / "config").read_bytes() == shared
    listed = subprocess.run([DVC, "config", "--list"], cwd=bare, capture_output=True, text=True)
    assert set(listed.stdout.splitlines()) >= {f"{k}={v}" for k, v in settings(bare).items()}


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("DINOV3_HOME", "one", "one/dvc-remote"), ("XDG_DATA_HOME", "two", "two/dinov3/dvc-remote")],
)
def test_default_follows_the_variables_that_name_its_place(
    bare, tmp_path, variable, value, expected
):
    assert remote(bare, **{variable: str(tmp_path / value)}).returncode == 0
    assert settings(bare)["remote.dinov3.url"] == str(tmp_path / expected)


def test_choice_of_a_person_is_kept_until_another_is_named(bare, tmp_path):
    chosen = tmp_path / "my store"
    assert remote(bare, str(chosen)).returncode == 0
    before = settings(bare)
    assert before["remote.dinov3.url"] == str(chosen)
    assert remote(bare).returncode == 0
    assert settings(bare) == before
    assert remote(bare, "default").returncode == 0
    assert settings(bare)["remote.dinov3.url"].endswith("dvc-remote")


def test_remote_that_the_project_shares_is_kept_and_verified(bare, tmp_path):
    subprocess.run([DVC, "remote", "add", "-d", "team", str(tmp_path / "t")], cwd=bare, check=True)
    assert remote(bare).returncode == 0
    assert settings(bare) == {"remote.team.verify": "true"}


@pytest.mark.parametrize("place", ["store", "./.dvc/store", "tools/../store", "."])
def test_directory_inside_the_clone_is_refused(bare, place):
    done = remote(bare, place)
    assert done.returncode == 2
    assert "tools/remote: the directory lies inside the checkout, got" in done.stderr
    assert settings(bare) == {}


def test_directory_that_a_link_leads_into_the_clone_is_refused(bare, tmp_path):
    (tmp_path / "link").symlink_to(bare / "data")
    assert "lies inside the checkout" in remote(bare, str(tmp_path / "link" / "x")).stderr
    assert "lies inside the checkout" in remote(bare, DINOV3_HOME=str(bare / "h")).stderr
    assert settings(bare) == {}


def test_relative_url_that_the_project_shares_is_refused_too(bare):
    subprocess.run([DVC, "remote", "add", "-d", "near", "store"], cwd=bare, check=True)
    done = remote(bare)
    assert done.returncode == 2
    assert f"lies inside the checkout, got {bare}/store" in done.stderr


def test_relative_directory_is_meant_from_where_one_stands(bare, tmp_path):
    (tmp_path / "stand").mkdir()
    assert remote(bare, "here", cwd=tmp_path / "stand").returncode == 0
    assert settings(bare)["remote.dinov3.url"] == str(tmp_path / "stand" / "here")


def test_keys_of_s3_stand_in_the_local_file_alone_and_leave_with_it(bare, tmp_path):
    place, url = "s3://pictures/main/dvc", "http://127.0.0.1:9"
    keys = {"AWS_ACCESS_KEY_ID": "AKIA-test", "AWS_SECRET_ACCESS_KEY": "se/cret+="}
    done = remote(bare, place, "--endpoint", url, **keys)
    assert done.returncode == 0, done.stderr
    assert settings(bare) == {
        "core.remote": "dinov3",
        "remote.dinov3.url": place,
        "remote.dinov3.verify": "true",
        "remote.dinov3.endpointurl": url,
        "remote.dinov3.access_key_id": "AKIA-test",
        "remote.dinov3.secret_access_key": "se/cret+=",
    }
    assert (bare / ".dvc" / "config.local").stat().st_mode & 0o077 == 0
    assert b"se/cret" not in (bare / ".dvc" / "config").read_bytes()
    assert "se/cret" not in done.stdout + done.stderr
    assert remote(bare, str(tmp_path / "plain")).returncode == 0
    assert len(settings(bare)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "http://h"], "--endpoint: belongs to a url"),
        (["/tmp/x", "--endpoint", "http://h"], "--endpoint: belongs to s3 alone"),
        (["--endpoint"], "--endpoint: no value"),
        (["/tmp/a", "/tmp/b"], "more than one place"),
        (["--force"], "unknown option, got --force"),
        (["file:///tmp/x"], "a directory is written as its path"),
        (["s3://a/b", "--endpoint", "lakefs"], "the server's keys are missing"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_sentence(bare, arguments, message):
    done = remote(bare, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"tools/remote: {message}" in done.stderr
    assert settings(bare) == {}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("lakefs") / "state") as running:
        yield running


@pytest.fixture
def gateway(server, pushed, tmp_path_factory):
    """The results of the project, pushed to a repository of its own through the S3 gateway."""
    repo = server.repository()
    root = tmp_path_factory.mktemp("again") / "project"
    shutil.copytree(pushed.root, root, symlinks=True)
    reach(root, server, repo)
    Project(root).dvc("push")
    return repo


def reach(root, server, repo):
    """Names the gateway to a clone, as `make lakefs` and tools/remote would."""
    (root / ".dinov3" / "lakefs").mkdir(parents=True)
    shutil.copy(server.state / "env", root / ".dinov3" / "lakefs" / "env")
    done = remote(root, f"s3://{repo}/main/dvc", "--endpoint", "lakefs")
    assert done.returncode == 0, done.stderr


def test_push_and_pull_through_the_gateway_of_lakefs(server, gateway, pushed, clone, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    assert lake_verb(["commit", f"{gateway}/main"]) == 0
    reach(clone.root, server, gateway)
    assert pull(clone.root).returncode == 0
    assert outputs(clone.root) == outputs(pushed.root)
    assert "up to date" in clone.dvc("status")
    assert "in sync" in clone.dvc("status", "--cloud")


@pytest.mark.parametrize("name", [BACKBONE, "data/weights/snapshots"])
def test_object_tampered_behind_the_gateway_is_refused(server, gateway, store, clone, name):
    held = object_of(clone, store, name).read_bytes()
    (behind,) = [
        path
        for path in (server.state / "data").rglob("*")
        if path.is_file() and path.read_bytes() == held and gateway in path.parts
    ]
    behind.write_bytes(swap_names(held) if name.endswith("snapshots") else held[:-1] + b"\1")
    reach(clone.root, server, gateway)
    done = pull(clone.root)
    assert done.returncode != 0, done.stdout + done.stderr
    assert not (clone.root / name).exists()


def test_gateway_that_is_away_is_one_error(gateway, server, clone):
    reach(clone.root, server, gateway)
    server.stop()
    try:
        done = pull(clone.root)
        assert done.returncode == 2
        assert "the remote cannot be asked, got EndpointConnectionError" in done.stderr
        assert not (clone.root / BACKBONE).exists()
    finally:
        server.start()
