"""What README shows really runs, and the tree keeps its own rules."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```(python|sh)\n(.*?)```", README, re.DOTALL)
CODE = sorted(
    path for top in ("dinov3", "assets", "orchestration") for path in (CHECKOUT / top).rglob("*.py")
)


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_block_of_the_readme_runs_and_prints_what_it_shows(language, block, tmp_path):
    if language == "python":
        command = [sys.executable, "-W", "ignore", "-c", block]
    else:
        command = ["sh", "-ec", block.replace("python ", f"{sys.executable} ")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"^# -> (.*)$", block, re.MULTILINE)
    assert promised == (done.stdout.splitlines() if promised else [])


def test_readme_has_blocks_that_run():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


def test_every_path_the_readme_names_exists():
    named = re.findall(r"`((?:dinov3|tests|docs|assets|orchestration)/[\w/.]+)`", README)
    named += re.findall(r"\]\((docs/[\w.]+)\)", README)
    assert named
    assert [name for name in named if not (CHECKOUT / name).exists()] == []


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ +|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_file_is_short_and_opens_with_what_it_is_for(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 500


def test_every_stage_depends_on_files_that_exist():
    params = yaml.safe_load((CHECKOUT / "params.yaml").read_text())
    pipeline = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    deps = [dep for stage in pipeline.values() for dep in stage.get("do", stage)["deps"]]
    code = [dep.replace("${recipe}", params["recipe"]) for dep in deps if dep.startswith("dinov3")]
    assert code
    assert [dep for dep in code if not (CHECKOUT / dep).exists()] == []
