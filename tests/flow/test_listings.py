"""What a pull asks before it begins: where from, and of which stages there is anything at all."""

import shutil
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


@pytest.mark.parametrize(
    "words", [["-r", "lake"], ["-rlake"], ["--remote=lake"], ["--rem", "lake"], ["--remo=lake"]]
)
@pytest.mark.parametrize("command", ["pull", "fetch"])
def test_the_remote_that_is_asked_is_the_one_that_dvc_takes_from(tmp_path, command, words):
    (tmp_path / "tools").mkdir()
    wrapper = shutil.copy2(CHECKOUT / "tools" / "dvc", tmp_path / "tools")
    for name in (".venv", ".venv-dvc"):
        program = tmp_path / name / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\necho "$*"\n')
        program.chmod(0o755)
    asked, dvc = run(tmp_path, wrapper, command, *words, "data/x").stdout.splitlines()
    assert asked.endswith("tools/listings.py lake")
    assert dvc == f"-m dvc {command} {' '.join(words)} data/x"


def test_without_a_remote_it_is_said_what_sets_one(project):
    (cached,) = project.glob(".dvc/cache/files/md5/*/*.dir")
    hidden = cached.rename(project / "hidden")
    try:
        done = listings(project)
    finally:
        hidden.rename(cached)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tools/dvc: no remote is set. Run tools/remote PLACE.\n"
