"""The command lines people type: Dagster's string selections beside dvc's experiments."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from orchestration.stages import CHECKOUT
from tests.flow.project import Project, environment

BIN = Path(sys.executable).parent
DEFINITIONS = """
import dagster as dg
from pathlib import Path
from orchestration.runner import StageRunner
from tests.flow.project import DVC, Project

defs = dg.Definitions(
    assets=Project(Path(__file__).parent).assets,
    resources={"runner": StageRunner(dvc=str(DVC))},
    executor=dg.in_process_executor,
)
"""
DG = """
[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "shown"
defs_module = "shown"
code_location_target_module = "shown.definitions"
"""


@pytest.fixture
def project(tmp_path):
    return Project.create(tmp_path / "project")


def run(command, project, home):
    home.mkdir()
    (home / "dagster.yaml").write_text((CHECKOUT / "orchestration" / "dagster.yaml").read_text())
    env = {**environment(), "DAGSTER_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        command, cwd=project.root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with dg.DagsterInstance.from_config(str(home)) as instance:
        return [key for key in ("first", "second") if latest(instance, key) is not None]


def latest(instance, key):
    return instance.get_latest_materialization_event(dg.AssetKey(key))


def test_dagster_asset_materialize_selects_by_name(project, tmp_path):
    (project.root / "shown.py").write_text(DEFINITIONS)
    command = [BIN / "dagster", "asset", "materialize", "--select", "first", "-f", "shown.py"]
    assert run(command, project, tmp_path / "home") == ["first"]


def test_dg_launch_selects_by_name(project, tmp_path):
    (project.root / "pyproject.toml").write_text(DG)
    (project.root / "shown").mkdir()
    (project.root / "shown" / "__init__.py").touch()
    definitions = DEFINITIONS.replace("(__file__).parent", "(__file__).parent.parent")
    (project.root / "shown" / "definitions.py").write_text(definitions)
    command = [BIN / "dg", "launch", "--assets", "first"]
    assert run(command, project, tmp_path / "home") == ["first"]


def test_checkout_loads_in_both_command_lines(tmp_path):
    env = {**environment(), "DAGSTER_HOME": str(tmp_path)}
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    for command in (["dagster", "definitions", "validate"], ["dg", "check", "defs"]):
        done = subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_dvc_experiment_takes_overrides(project):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "--quiet"], cwd=project.root, check=True)
    project.dvc("config", "core.no_scm", "false")
    ignored = ("/.dvc/tmp", "/.dvc/cache", "/data/first", "/data/second", "/data/third_left")
    (project.root / ".gitignore").write_text("\n".join(ignored) + "\n")
    project.dvc("repro")
    subprocess.run([*git, "add", "--all"], cwd=project.root, check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], cwd=project.root, check=True)

    assert "Ran experiment" in project.dvc("exp", "run", "-S", "mode.second=other")
    assert "second: other" in (project.root / "params.yaml").read_text()
