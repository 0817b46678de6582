"""What a pull asks before it begins: where from, and of which stages there is anything at all."""

import subprocess

import pytest

from orchestration.stages import CHECKOUT
from tests.flow.project import DVC, environment

PIPELINE = """
stages:
  folder:
    cmd: mkdir -p data/folder && echo one > data/folder/file
    outs: [data/folder]
  arms:
    foreach: {made: 1, unmade: 2}
    do:
      cmd: mkdir -p data && echo ${key} > data/${key}
      outs: ["data/${key}"]
  never:
    cmd: exit 1
    outs: [data/never]
"""


def run(folder, *command, check=True):
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def listings(folder, *arguments):
    python, script = DVC.with_name("python"), CHECKOUT / "tools" / "listings.py"
    return run(folder, python, script, *arguments, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two of four stages were made; no remote is set."""
    folder = tmp_path_factory.mktemp("listings")
    run(folder, DVC, "init", "--no-scm", "--quiet")
    run(folder, DVC, "config", "core.analytics", "false")
    (folder / "dvc.yaml").write_text(PIPELINE)
    run(folder, DVC, "repro", "folder", "arms@made")
    return folder


def test_only_stages_with_bytes_are_there_to_pull(project):
    done = listings(project, "--made")
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["arms@made", "folder"])


def test_without_a_remote_it_is_said_what_sets_one(project):
    (cached,) = project.glob(".dvc/cache/files/md5/*/*.dir")
    hidden = cached.rename(project / "hidden")
    try:
        done = listings(project)
    finally:
        hidden.rename(cached)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tools/dvc: no remote is set. Run tools/remote PLACE.\n"
