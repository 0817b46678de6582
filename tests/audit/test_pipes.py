"""Pipes and full disks: no command waits for ever, and none tells half an answer as a whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3.errors import KeyUnusable
from dinov3.publish.private_key import PrivateKey, load_key
from dinov3.release.lineage import main as lineage


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.pem"
    os.mkfifo(path, 0o600)
    return path


@pytest.mark.parametrize("options", [[], ["--reverse"]])
def test_lineage_of_a_pipe_is_not_waited_for(
    options: list[str], pipe: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lineage([str(pipe), "--root", str(project / "data"), *options]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_lineage_of_a_link_to_a_pipe_is_not_waited_for(
    pipe: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = pipe.with_name("link.safetensors")
    link.symlink_to(pipe)
    assert lineage([str(link), "--root", str(project / "data")]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_private_key_that_is_a_pipe_is_not_waited_for(pipe: Path) -> None:
    with pytest.raises(KeyUnusable, match="not a regular file"):
        load_key(str(pipe))


@pytest.mark.parametrize("verb", ["lineage", "verify"])
def test_answer_that_cannot_be_written_is_none(
    verb: str, release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    public = tmp_path / "publisher.pub"
    public.write_bytes(key.public)
    options = {"lineage": ["--root", str(release.parents[2])], "verify": ["--key", str(public)]}
    command = [sys.executable, "-P", "-m", "dinov3", verb, str(release), *options[verb]]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
