"""One graph: what dvc.yaml states, what dvc reads in it, what Dagster shows."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from dinov3.errors import ConfigError, DataError
from orchestration.definitions import defs
from orchestration.lock import read_lock
from orchestration.stages import CHECKOUT, checkout_pipeline, read_pipeline
from tests.flow.project import DVC

SNAPSHOT = Path(__file__).parent.parent / "golden" / "asset_graph.json"


def dvc(*arguments):
    done = subprocess.run(
        [DVC, *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def asset_edges():
    """Upstream keys by asset key, as Dagster has them."""
    graph = defs.resolve_asset_graph()
    return {
        key.to_user_string(): sorted(up.to_user_string() for up in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
    }


def write(folder, pipeline, params="{}"):
    (folder / "dvc.yaml").write_text(pipeline)
    (folder / "params.yaml").write_text(params)
    return folder


def test_stages_are_those_of_dvc():
    listed = dvc("stage", "list", "--all", "--name-only").split()
    assert sorted(stage.name for stage in checkout_pipeline().stages.values()) == sorted(listed)


def test_edges_are_those_of_dvc():
    pipeline = checkout_pipeline()
    drawn = set(re.findall(r'"([^"]+)" -> "([^"]+)"', dvc("dag", "--full", "--dot")))
    made_by = {key: artifact.stage for key, artifact in pipeline.artifacts.items()}
    stages = pipeline.stages.values()
    read = {(made_by[up], one.name) for one in stages for up in one.upstream}
    assert read == drawn


def test_assets_are_the_artifacts_and_their_sources():
    pipeline = checkout_pipeline()
    expected = {
        artifact.key: sorted((*stage.upstream, *stage.roots))
        for stage in pipeline.stages.values()
        for artifact in stage.artifacts
    }
    outside = {"reevaluations": sorted(one for one in expected if one.startswith("release_"))}
    assert asset_edges() == {**expected, **outside, **{root: [] for root in pipeline.sources}}


def test_asset_graph_is_the_committed_one(request):
    graph = dict(sorted(asset_edges().items()))
    if request.config.getoption("--update-goldens"):
        SNAPSHOT.write_text(json.dumps(graph, indent=2) + "\n")
    assert graph == json.loads(SNAPSHOT.read_text())


def test_commands_are_those_of_dvc(tmp_path):
    """Interpolated as dvc does it, by what it says it would run."""
    write(
        tmp_path,
        """
stages:
  one:
    foreach: [x, y]
    do:
      cmd: echo ${item} ${a.b} ${flag} "${number}"
  two:
    foreach: {u: {model: m1}, v: {model: m2}}
    do:
      cmd: echo ${key} ${item.model}
""",
        "a: {b: text}\nflag: true\nnumber: 0.5\n",
    )
    for arguments in (("init", "--no-scm", "-q"), ("repro", "--dry")):
        done = subprocess.run(
            [DVC, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    said = re.findall(r"Running stage '(.+)':\n> (.+)", done.stdout)
    stages = read_pipeline(tmp_path).stages.values()
    assert sorted((stage.name, stage.command) for stage in stages) == sorted(said)
    assert sorted(stage.key for stage in stages) == ["one_x", "one_y", "two_u", "two_v"]


def test_folder_with_a_record_is_an_artifact(tmp_path):
    stages = """
stages:
  students:
    cmd: distil
    outs: [data/s/small/record.json, data/s/small/board, data/s/x-l/record.json]
  reports:
    foreach: {small: {model: s/small}}
    do:
      cmd: report
      deps: ["data/${item.model}/record.json", "data/${item.model}/board"]
      outs: ["data/reports/${key}/pages/p.html", "data/reports/${key}/record.json"]
"""
    pipeline = read_pipeline(write(tmp_path, stages))
    folders = {key: artifact.folder for key, artifact in pipeline.artifacts.items()}
    assert folders == {
        "students_small": "data/s/small",
        "students_x_l": "data/s/x-l",
        "reports_small": "data/reports/small",
    }
    assert list(pipeline.stages) == ["students", "reports_small"]
    assert pipeline.artifacts["students_small"].outs == (
        "data/s/small/record.json",
        "data/s/small/board",
    )
    assert pipeline.stages["reports_small"].upstream == ("students_small",)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{a_b: {cmd: x}, a: {foreach: [b], do: {cmd: x}}}", "one asset key 'a_b' for a@b, a_b"),
        (
            "{a_b: {cmd: x}, a: {cmd: x, outs: [a/b/record.json, a/c/record.json]}}",
            "one asset key 'a_b' for a, a_b",
        ),
        (
            "{a: {cmd: x, outs: [a/b/c/record.json, a/d/c/record.json]}}",
            "one asset key 'a_c' for a, a",
        ),
    ],
)
def test_shared_keys_are_named(tmp_path, stages, said):
    with pytest.raises(ConfigError, match=said):
        read_pipeline(write(tmp_path, f"stages: {stages}"))


@pytest.mark.parametrize("key", ["c", "a@b"])
def test_unknown_stage_is_named(tmp_path, key):
    pipeline = read_pipeline(write(tmp_path, "stages: {a: {foreach: [b], do: {cmd: x}}}"))
    with pytest.raises(ConfigError, match=f"no stage of that key, got '{key}'"):
        pipeline.stage(key)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("stages: {a: {cmd: 'echo ${b}'}}", r"dvc.yaml: a: unknown name, got \${b}"),
        ("stages: {a: {cmd: 'echo ${b[0]}'}}", r"dvc.yaml: a: unknown name, got \${b\[0\]}"),
        ("stages: {a: {cmd: echo, wdir: x}}", "a: not read here, got wdir"),
        ("vars: []", "only stages are read here, got vars"),
        (
            "stages: {a: {cmd: x, outs: [o/d]}, b: {cmd: y, deps: [o/d/f]}}",
            "b: part of an output, got o/d/f",
        ),
        (
            "stages: {a: {cmd: x, outs: [o], deps: [p]}, b: {cmd: y, outs: [p], deps: [o]}}",
            "stages in a circle, got a, b",
        ),
        (
            "stages: {a: {cmd: x, outs: [o/b/record.json, o/c/record.json, o/log]}}",
            r"a: each output belongs to one folder .*\(o/b, o/c\), got o/log",
        ),
        (
            "stages: {a: {cmd: x, outs: [o/record.json, o/c/record.json]}}",
            r"a: each output belongs to one folder .*\(o, o/c\), got o/c/record.json",
        ),
        ("stages: [", "cannot be read"),
    ],
)
def test_what_dvc_would_read_otherwise_is_refused(tmp_path, stages, said):
    with pytest.raises(ConfigError, match=said):
        read_pipeline(write(tmp_path, stages))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<<<<<<< HEAD\nstages:\n=======\n", "mapping values are not allowed here"),
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
        (b"", "'NoneType' object is not subscriptable"),
    ],
)
def test_lock_that_dvc_cannot_read_either_is_named_with_what_helps(tmp_path, content, said):
    (tmp_path / "dvc.lock").write_bytes(content)
    with pytest.raises(DataError, match=r"or remove it and run dvc repro\.") as raised:
        read_lock(tmp_path)
    assert said in str(raised.value)
    assert "object at 0x" not in str(raised.value)
