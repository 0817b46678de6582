"""The frame of a stage: whole outputs or none, inputs checked byte by byte."""

import json
import subprocess
import sys

import pytest

from dinov3.errors import DataError, LineageBroken
from dinov3.release.atomic import atomic_write
from dinov3.release.record import file_sha256, read_record
from dinov3.stage import open_stage


def make_upstream(root):
    with open_stage("up", root / "up", config={"n": 1}) as stage:
        stage.read_root("source", "folder", "c" * 64, {"MIT"})
        stage.path("table.parquet").write_bytes(b"rows")
    return root / "up" / "table.parquet"


def test_edge_names_role_bytes_and_upstream_record(tmp_path):
    table = make_upstream(tmp_path)
    with open_stage("down", tmp_path / "down", config={}) as stage:
        stage.read("manifest", table)
        stage.path("out.txt").write_text("x")
    (edge,) = read_record(tmp_path / "down" / "record.json").inputs
    assert (edge.role, edge.name) == ("manifest", "table.parquet")
    assert edge.sha256 == file_sha256(table)
    assert edge.record == file_sha256(table.parent / "record.json")


def test_licences_flow_from_input_to_output(tmp_path):
    table = make_upstream(tmp_path)
    with open_stage("down", tmp_path / "down", config={}) as stage:
        stage.read("manifest", table)
    assert read_record(tmp_path / "down" / "record.json").licences["out"] == ("MIT",)


def test_one_changed_byte_of_an_input_stops_the_stage(tmp_path):
    table = make_upstream(tmp_path)
    table.write_bytes(b"rowz")
    with (
        pytest.raises(LineageBroken, match="bytes differ from the record"),
        open_stage("down", tmp_path / "down", config={}) as stage,
    ):
        stage.read("manifest", table)
    assert not (tmp_path / "down").exists()


def make_nested(root):
    with open_stage("up", root / "up", config={"n": 1}) as stage:
        stage.path("parts").mkdir()
        stage.path("parts/one.bin").write_bytes(b"one")
        stage.path("one.bin").write_bytes(b"another one")
    return root / "up" / "parts" / "one.bin"


def test_input_in_a_sub_folder_is_checked_against_the_record_one_folder_up(tmp_path):
    part = make_nested(tmp_path)
    with open_stage("down", tmp_path / "down", config={}) as stage:
        stage.read("part", part)
    (edge,) = read_record(tmp_path / "down" / "record.json").inputs
    assert (edge.name, edge.sha256) == ("parts/one.bin", file_sha256(part))
    assert edge.record == file_sha256(tmp_path / "up" / "record.json")


def test_an_input_in_a_sub_folder_cannot_pass_for_its_namesake_beside_the_record(tmp_path):
    part = make_nested(tmp_path)
    part.write_bytes(b"another one")
    with (
        pytest.raises(LineageBroken, match="bytes differ from the record"),
        open_stage("down", tmp_path / "down", config={}) as stage,
    ):
        stage.read("part", part)


def test_a_record_two_folders_up_vouches_for_nothing(tmp_path):
    part = make_nested(tmp_path)
    deep = part.parent / "deep" / "one.bin"
    deep.parent.mkdir()
    deep.write_bytes(b"one")
    with (
        pytest.raises(DataError, match=r"deep/record\.json: missing"),
        open_stage("down", tmp_path / "down", config={}) as stage,
    ):
        stage.read("part", deep)


def test_missing_input_names_the_way_to_make_it(tmp_path):
    with (
        pytest.raises(DataError, match="Make it first: dvc repro up"),
        open_stage("down", tmp_path / "down", config={}) as stage,
    ):
        stage.read("manifest", tmp_path / "up" / "table.parquet")


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), open_stage("s", tmp_path / "s", config={}) as s:
        s.path("half.txt").write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


RUN = """
import sys; from pathlib import Path
from dinov3.stage import open_stage
with open_stage("s", Path(sys.argv[1]), config={}) as stage:
    stage.path("x.txt").write_text("x")
    print(flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def running(tmp_path):
    """A process within the stage of the folder `s`, its files half made."""
    arguments = [sys.executable, "-c", RUN, str(tmp_path / "s")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def make(folder):
    with open_stage("s", folder, config={}) as stage:
        stage.path("x.txt").write_text("x")


def test_what_a_killed_run_left_is_cleared_by_the_next_one(tmp_path, running):
    running.kill()
    running.wait()
    left = tmp_path / f".s.partial-{running.pid}"
    assert left.is_dir()
    make(tmp_path / "other")
    assert left.is_dir()
    make(tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "s"]


def test_a_killed_run_is_cleared_before_its_parent_has_heard_of_its_end(tmp_path, running):
    running.kill()
    assert running.stdout.read() == b""  # it is gone, and nobody has waited for it: a zombie
    make(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_living_run_keeps_its_folder_and_ends_well(tmp_path, running):
    make(tmp_path / "s")
    assert (tmp_path / f".s.partial-{running.pid}" / "x.txt").is_file()
    running.stdin.write(b"\n")
    running.stdin.close()
    assert running.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_link_or_a_file_in_the_place_of_a_left_folder_is_left_alone(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "x").touch()
    (tmp_path / ".s.partial-1").symlink_to(kept)
    (tmp_path / ".s.partial-2").touch()
    make(tmp_path / "s")
    assert (kept / "x").is_file()
    assert (tmp_path / ".s.partial-2").is_file()


def test_two_runs_of_the_same_inputs_give_the_same_record(tmp_path):
    records = []
    for name in ("one", "two"):
        with open_stage("s", tmp_path / name, config={"a": [1, 2]}) as stage:
            stage.path("x.txt").write_text("x")
            stage.run_facts = {"device": name}
        records.append((tmp_path / name / "record.json").read_bytes())
    assert records[0] == records[1]


def test_times_stay_out_of_the_record_and_are_named_by_the_run(tmp_path):
    with open_stage("s", tmp_path / "s", config={}) as stage:
        stage.path("events.jsonl").write_text('{"time": 1}\n')
        stage.path("x.txt").write_text("x")
    record = read_record(tmp_path / "s" / "record.json")
    run = json.loads((tmp_path / "s" / "run.json").read_text())
    assert set(record.outputs) == {"x.txt"}
    assert run["record"] == file_sha256(tmp_path / "s" / "record.json")
    assert run["beside"]["events.jsonl"] == file_sha256(tmp_path / "s" / "events.jsonl")


def test_record_holds_no_absolute_path(tmp_path):
    table = make_upstream(tmp_path)
    with open_stage("down", tmp_path / "down", config={}) as stage:
        stage.read("manifest", table)
    for name in ("record.json", "run.json"):
        assert str(tmp_path) not in (tmp_path / "down" / name).read_text()


def test_atomic_write_replaces_whole_files_only(tmp_path):
    path = tmp_path / "x"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_artifact_of_another_stage_is_not_written_over(tmp_path):
    output = tmp_path / "artifact"
    with open_stage("first", output, config={}) as stage:
        stage.path("a.txt").write_text("a")
    before = (output / "record.json").read_bytes()
    with (
        pytest.raises(DataError, match="holds the artifact of first, got second to write"),
        open_stage("second", output, config={}),
    ):
        raise AssertionError
    assert (output / "record.json").read_bytes() == before
