"""Two front doors, one pipeline: what one makes, the other knows."""

import asyncio
import json
import subprocess

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from dinov3.release.record import file_sha256
from orchestration.lock import code_version, read_lock, version_tags
from orchestration.runner import StageRunner
from orchestration.versions import dvc_lock_sensor, report_lock
from tests.flow.project import CHECKS, Project

KEYS = ["first", "second", "pair_one", "pair_two", "third_left"]
PAIR = ["pair_one", "pair_two"]  # the artifacts of one stage
VERSION = "dagster/data_version"


@pytest.fixture
def project(tmp_path):
    return Project.create(tmp_path / "project")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def latest(instance, key):
    event = instance.get_latest_materialization_event(dg.AssetKey(key))
    return None if event is None else event.asset_materialization


def stale(project, instance):
    """Keys that Dagster shows as not up to date."""
    shown = dg.Definitions(assets=project.assets, resources={"runner": StageRunner()})
    graph = shown.get_repository_def().asset_graph
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return [key for key in KEYS if resolver.get_status(dg.AssetKey(key)) != StaleStatus.FRESH]


def test_materialized_artifacts_are_up_to_date_for_dvc(project, instance):
    assert project.materialize(instance).success
    assert "up to date" in project.dvc("status")
    assert "Running stage" not in project.dvc("repro")
    assert stale(project, instance) == []


def test_shell_run_is_fresh_in_dagster_with_the_same_versions(project, instance):
    project.dvc("repro")
    assert report_lock(instance, project.pipeline) == ["raw_images", *KEYS]
    from_shell = {key: latest(instance, key).tags for key in KEYS}
    assert stale(project, instance) == []

    assert project.materialize(instance).success
    assert {key: latest(instance, key).tags for key in KEYS} == from_shell
    assert all(latest(instance, key).metadata["dvc"].value == "up to date" for key in KEYS)


def shown_checks(project, instance):
    """What the UI shows of each check: passed, and whether of the latest materialization."""
    shown = dg.Definitions(assets=project.assets, resources={"runner": StageRunner()})
    keys = list(shown.get_repository_def().asset_graph.asset_check_keys)
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)

    def is_of_latest(record):
        context = LoadingContextForTest(instance)  # one per event loop
        return asyncio.run(record.targets_latest_materialization(context))

    return {
        key.asset_key.to_user_string(): (
            record.event.asset_check_evaluation.passed,
            is_of_latest(record),
        )
        for key, record in records.items()
    }


def test_shell_run_shows_its_checks_as_a_run_of_dagster_does(project, instance):
    project.dvc("repro")
    sensor = dvc_lock_sensor(project.pipeline, CHECKS)
    with dg.build_sensor_context(instance=instance) as context:
        sensor(context)
    from_shell = shown_checks(project, instance)
    assert from_shell == dict.fromkeys(("first", "pair_one", "pair_two"), (True, True))

    assert project.materialize(instance).success
    assert shown_checks(project, instance) == from_shell


def test_verdict_that_refuses_is_red_from_a_shell_too(project, instance):
    project.dvc("repro")
    path = project.root / "data" / "first" / "verdict.json"
    verdict = {**json.loads(path.read_text()), "passed": False}
    path.chmod(0o644)
    path.write_text(json.dumps(verdict))
    report_lock(instance, project.pipeline, CHECKS)
    assert shown_checks(project, instance)["first"] == (False, True)


def test_new_bytes_of_a_shell_are_judged_anew_and_absent_ones_are_no_longer_green(
    project, instance
):
    project.dvc("repro")
    report_lock(instance, project.pipeline, CHECKS)
    project.set_modes(pair="other")
    project.dvc("repro")
    record = project.root / "data" / "pair" / "one" / "record.json"
    record.chmod(0o644)
    record.write_text(record.read_text() + " ")
    assert report_lock(instance, project.pipeline, CHECKS)[0] == "pair_one"
    passed = {key: passed for key, (passed, _) in shown_checks(project, instance).items()}
    assert passed == {"first": True, "pair_one": False, "pair_two": True}
    key = dg.AssetCheckKey(dg.AssetKey("pair_one"), "verdict")
    (record,) = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
    said = record.event.asset_check_evaluation
    assert said.description.startswith("Not judged: the files that dvc.lock names are not here.")
    assert said.severity is dg.AssetCheckSeverity.WARN


@pytest.mark.parametrize(
    ("name", "shown"), [("events.jsonl", "curves"), ("manifest.parquet", "samples")]
)
def test_damaged_file_of_one_artifact_leaves_the_others_reported(project, instance, name, shown):
    project.dvc("repro", "second")
    path = project.root / "data" / "second" / name
    path.unlink(missing_ok=True)
    path.write_bytes(b"PAR1")
    assert report_lock(instance, project.pipeline) == ["raw_images", "first", "second"]
    assert "cannot be read: " in latest(instance, "second").metadata[shown].value


def test_sensor_reports_an_artifact_once(project, instance):
    project.dvc("repro")
    sensor = dvc_lock_sensor(project.pipeline)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    with dg.build_sensor_context(instance=instance) as context:
        assert "first, second, pair_one, pair_two, third_left" in sensor(context).skip_message
        assert sensor(context).skip_message == "dvc.lock is as it was."
    assert report_lock(instance, project.pipeline) == []


def test_changed_source_is_stale_until_remade(project, instance):
    project.materialize(instance)
    project.set_source("two")
    project.dvc("repro", "-s", "first")
    assert report_lock(instance, project.pipeline) == ["raw_images", "first"]
    assert stale(project, instance) == ["second"]
    assert project.materialize(instance).success
    assert stale(project, instance) == []


def test_changed_code_is_stale_until_remade(project, instance):
    project.materialize(instance)
    script = project.root / "code" / "stage.py"
    script.write_text(script.read_text() + "# changed\n")
    assert stale(project, instance) == KEYS
    project.dvc("repro")
    report_lock(instance, project.pipeline)
    assert stale(project, instance) == []


def test_code_version_is_the_one_dvc_hashed(project):
    project.dvc("repro")
    lock = read_lock(project.root)
    for stage in project.pipeline.stages.values():
        for artifact in stage.artifacts:
            tags = version_tags(project.pipeline, stage, artifact, lock)
            assert code_version(project.pipeline, stage) == tags["dagster/code_version"]


def test_materialization_tells_what_was_made(project, instance):
    project.materialize(instance)
    first, second = (latest(instance, key).metadata for key in KEYS[:2])
    record = project.root / "data" / "first" / "record.json"
    assert first["dvc"].value == "ran"
    assert first["dagster/row_count"].value == json.loads(record.read_text())["facts"]["rows"]
    assert "manifest.txt" in first["digests"].value
    assert "data:image/svg+xml;base64," in second["curves"].value

    (project.root / "data" / "second" / "manifest.txt").unlink()
    project.materialize(instance, "second")
    assert latest(instance, "second").metadata["dvc"].value == "restored"


def test_refused_artifact_shows_its_verdict_and_blocks(project, instance):
    project.set_modes(first="refuse")
    result = project.materialize(instance)
    assert not result.success
    assert [latest(instance, key) for key in KEYS] == [None] * len(KEYS)
    (verdict,) = result.get_asset_check_evaluations()
    assert not verdict.passed
    assert "rows of path: observed 0, wanted 1" in verdict.description
    assert not (project.root / "data" / "second").exists()
    error = result.failure_data_for_node("first").error.to_string()
    assert "Its own checks refuse the result" in error
    assert "refused by its own checks" in error  # the last lines of the stage


def test_failed_stage_makes_no_materialization(project, instance):
    project.materialize(instance)
    before = latest(instance, "second")
    project.set_modes(second="broken")
    result = project.materialize(instance, "second", "pair_one", "pair_two")
    assert not result.success
    assert latest(instance, "second") == before
    assert result.get_asset_check_evaluations() == []
    assert "cannot be done: second" in result.failure_data_for_node("second").error.to_string()


def test_one_run_makes_both_artifacts_of_a_stage_each_with_its_own_version(project, instance):
    result = project.materialize(instance)
    assert [e.step_key for e in result.get_step_success_events()].count("pair") == 1
    one, two = (latest(instance, key) for key in PAIR)
    assert [made.metadata["dvc"].value for made in (one, two)] == ["ran", "ran"]
    assert one.tags[VERSION] != two.tags[VERSION]
    assert one.metadata["curves"] != two.metadata["curves"]
    for made, folder in ((one, "data/pair/one"), (two, "data/pair/two")):
        record = project.root / folder / "record.json"
        assert made.metadata["record_sha256"].value == file_sha256(record)
        assert made.metadata["folder"].value == str(record.parent)
    consumed = latest(instance, "third_left").tags
    assert consumed["dagster/input_data_version/pair_two"] == two.tags[VERSION]
    assert "dagster/input_data_version/pair_one" not in consumed
    checked = [e.asset_key.to_user_string() for e in result.get_asset_check_evaluations()]
    assert checked == ["first", *PAIR]


def test_change_of_one_artifact_leaves_what_reads_the_other_fresh(project, instance):
    project.materialize(instance)
    before = [latest(instance, key).tags[VERSION] for key in PAIR]
    project.set_modes(pair="other")
    project.dvc("repro", "-s", "pair")
    assert report_lock(instance, project.pipeline) == PAIR
    after = [latest(instance, key).tags[VERSION] for key in PAIR]
    assert (after[0] != before[0], after[1]) == (True, before[1])
    assert stale(project, instance) == []
    assert "Running stage" not in project.dvc("repro")


def test_refusal_shows_the_verdict_on_each_artifact(project, instance):
    project.set_modes(pair="refuse")
    result = project.materialize(instance)
    verdicts = {
        e.asset_key.to_user_string(): e.passed for e in result.get_asset_check_evaluations()
    }
    assert verdicts == {"first": True, "pair_one": True, "pair_two": False}
    assert [latest(instance, key) for key in KEYS[2:]] == [None, None, None]


def test_artifacts_of_one_stage_are_selected_together(project, instance):
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="Failed to resolve") as raised:
        project.materialize(instance, "pair_one")
    assert isinstance(raised.value.__cause__, dg.DagsterInvalidSubsetError)
    assert project.materialize(instance, "first", "second", *PAIR).success
    assert latest(instance, "third_left") is None


def test_artifact_that_the_lock_does_not_hold_yet_is_not_reported(project, instance):
    project.dvc("repro")
    path = project.root / "dvc.yaml"
    outs = "    - data/pair/three/record.json\n    - data/pair/two/run.json\n"
    path.write_text(path.read_text().replace("    - data/pair/two/run.json\n", outs))
    assert "pair_three" in project.pipeline.artifacts
    assert report_lock(instance, project.pipeline) == ["raw_images", *KEYS]


def test_input_that_a_stage_did_not_read_yet_is_stale(project, instance):
    project.materialize(instance)
    path = project.root / "dvc.yaml"
    deps = '"data/pair/one/manifest.txt", "data/${item.model}/record.json"'
    path.write_text(path.read_text().replace('"data/${item.model}/record.json"', deps))
    assert report_lock(instance, project.pipeline) == []
    assert stale(project, instance) == ["third_left"]
    project.dvc("repro")
    assert report_lock(instance, project.pipeline) == ["third_left"]
    assert stale(project, instance) == []


def test_missing_input_is_named(project, instance):
    result = project.materialize(instance, "second")
    error = result.failure_data_for_node("second").error.to_string()
    assert "data/first/manifest.txt is missing; materialize what makes it first" in error


def test_held_path_is_tried_again(project, instance):
    """An entry of a living dvc blocks; one whose number went to another process does not."""
    lock = project.root / ".dvc" / "tmp" / "rwlock"
    project.dvc("repro", "-s", "first")
    other = subprocess.Popen(["sleep", "600"])
    dvc = subprocess.Popen(["bash", "-c", "exec -a dvc sleep 600"], stdout=subprocess.PIPE)
    try:
        for holder, holds in ((other, False), (dvc, True)):
            path = str(project.root / "data" / "second" / "manifest.txt")
            entry = {path: {"pid": holder.pid, "cmd": "dvc repro"}}
            lock.write_text(json.dumps({"write": entry, "read": {}}))
            result = project.materialize(instance, "second", max_retries=1, retry_seconds=0)
            retried = [e for e in result.all_events if e.is_step_up_for_retry]
            assert (result.success, len(retried)) == (not holds, int(holds))
    finally:
        for process in (other, dvc):
            process.kill()
            process.communicate()


def test_damaged_lock_of_a_killed_dvc_is_mended(project, instance):
    project.dvc("repro", "-s", "first")
    (project.root / ".dvc" / "tmp" / "rwlock").write_text("")
    assert "corrupted" in project.dvc("repro", check=False)
    assert project.materialize(instance).success
    project.dvc("repro")
