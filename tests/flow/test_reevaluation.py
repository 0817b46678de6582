"""Scheduled re-evaluation: a tick, its runs, a planted regression, and what a person sees of it.

Version 0.1.0 claims what its weights do on pictures whose labels say nothing, version 0.2.0 what
the same weights do on pictures of three colours. The benchmark is of the first kind, so that the
second version is far below its claims, and the first is not.
"""

import base64
import datetime
import json
import shutil
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from assets.release_checks import intact, judge_gate
from dinov3.publish.keys import revoke
from dinov3.publish.publishing import withdraw_release
from dinov3.publish.store import open_store
from dinov3.publish.waivers import note_attempt
from orchestration.definitions import defs
from orchestration.reevaluation import CHECK, KEY, RELEASES, reevaluation_asset
from orchestration.schedules import novelty_sensor, reevaluation_job, weekly_reevaluation
from tests.reevaluated import measured_chain, paint, publish
from tests.released import make_chain, make_key, make_release, rewrite_record

MONDAY = datetime.datetime(2026, 11, 23, 5, tzinfo=datetime.UTC)
NAMES = ["vits@0.1.0", "vits@0.2.0"]
ALERT = "import pathlib, sys; pathlib.Path('alert.json').write_text(sys.stdin.read())"


class Place:
    """A checkout's own files: parameters, the log with its key, a store with two releases."""

    def __init__(self, root):
        self.root = root
        self.benchmark = root / "benchmark"
        self.key = make_key(root / "data" / "release_log" / "keys")
        claims = {
            "0.1.0": paint(self.benchmark, mixed=True),
            "0.2.0": paint(root / "colours", seed=1),
        }
        for version, pictures in claims.items():
            chain = measured_chain(root / version, pictures)
            publish(chain, f"directory:{root / '.dinov3' / 'store'}", version, self.key)
        self.recipe = root / "recipe.yaml"
        self.write_recipe()
        self.write_params()

    def write_params(self, **changes):
        """As `params.yaml` of a checkout, as far as re-evaluation reads it."""
        release = {"store": "directory:.dinov3/store", "key": "demo"}
        release |= {"benchmark": f"folder:{self.benchmark}", **changes}
        params = {"recipe": str(self.recipe), "source": "folder:absent", "release": release}
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))

    def write_recipe(self):
        """Retrieval among a few pictures is left to chance; a regression leaves a file behind."""
        tree = {
            "extends": "smoke_cpu/reevaluation",
            "protocols": {"instance retrieval": None},
            "run": {"device": "cpu", "threads": 1},
        }
        tree["run"]["alert"] = {"command": [sys.executable, "-c", ALERT]}
        self.recipe.write_text(yaml.safe_dump(tree))

    def definitions(self):
        """What a code location of this checkout would show."""
        return dg.Definitions(
            assets=[reevaluation_asset(group="release", deps=(), root=self.root)],
            jobs=[reevaluation_job],
            schedules=[weekly_reevaluation(self.root)],
            sensors=[novelty_sensor(self.root)],
            executor=dg.in_process_executor,
        )

    def tick(self, instance):
        """The run requests of the schedule, or why there are none."""
        shown = self.definitions()
        with dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=MONDAY,
            repository_def=shown.get_repository_def(),
        ) as context:
            schedule = shown.resolve_schedule_def("weekly_reevaluation")
            found = schedule.evaluate_tick(context)
        return found.run_requests or found.skip_message

    def execute(self, instance, request):
        """Runs what was requested, as a daemon would have launched it."""
        job = self.definitions().resolve_job_def("reevaluate_releases")
        return job.execute_in_process(
            instance=instance,
            partition_key=request.partition_key,
            tags=request.tags,
            raise_on_error=False,
        )

    def look(self, instance, cursor=None):
        """What the sensor asks for, and its next cursor."""
        shown = self.definitions()
        with dg.SensorEvaluationContext(
            instance_ref=instance.get_ref(),  # as the daemon hands it over
            last_tick_completion_time=None,
            last_run_key=None,
            cursor=cursor,
            repository_name=None,
            repository_def=shown.get_repository_def(),
        ) as context:
            sensor = shown.resolve_sensor_def("new_release_or_benchmark")
            found = sensor.evaluate_tick(context)
        return [request.partition_key for request in found.run_requests or ()], found.cursor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as made:
        yield made


@pytest.fixture(scope="module")
def judged(place, tmp_path_factory):
    """Both releases after a tick of the schedule: its runs by partition, and their instance."""
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as instance:
        requests = place.tick(instance)
        runs = {one.partition_key: place.execute(instance, one) for one in requests}
        yield runs, instance


def verdict(run):
    (found,) = run.get_asset_check_evaluations()
    return found


def test_tick_asks_for_every_release_in_the_store(place, instance):
    requests = place.tick(instance)
    assert [one.partition_key for one in requests] == NAMES
    assert len({one.run_key for one in requests}) == 2
    assert instance.get_dynamic_partitions("releases") == NAMES
    assert [one.run_key for one in place.tick(instance)] == [one.run_key for one in requests]


def test_runs_of_a_tick_turn_the_check_red_for_the_regression_alone(judged):
    runs, _ = judged
    assert {name: run.success for name, run in runs.items()} == dict.fromkeys(NAMES, True)
    assert {name: verdict(run).passed for name, run in runs.items()} == {
        "vits@0.1.0": True,
        "vits@0.2.0": False,
    }
    red = verdict(runs["vits@0.2.0"])
    assert (red.check_name, red.severity) == (CHECK, dg.AssetCheckSeverity.ERROR)
    assert "figures fell beyond their tolerance" in red.description
    assert "**regression**" in red.metadata["figures"].value
    assert red.metadata["page"].value.endswith(".html")
    same = verdict(runs["vits@0.1.0"]).metadata
    for shown in (same["figures"].value, Path(same["page"].value).read_text()):
        assert "+0.000" in shown
        assert "-0.000" not in shown


def test_both_releases_left_dated_reports_and_the_alert_was_called(place, judged):
    folder = place.root / "data" / "reevaluations" / "vits"
    found = {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("*/*.json")}
    assert sorted(found) == ["0.1.0", "0.2.0"]
    assert all(list((folder / version).glob("*.html")) for version in found)
    alert = json.loads((place.root / "alert.json").read_text())
    assert (alert["schema"], alert["release"]) == ("dinov3.alert/1", "vits@0.2.0")
    assert alert["regressions"] == [row for row in found["0.2.0"]["metrics"] if row["regressed"]]


def test_materialization_shows_the_history_of_each_metric_by_release(judged):
    _, instance = judged
    event = instance.get_latest_materialization_event(dg.AssetKey(KEY)).asset_materialization
    head, _, text = event.metadata["history"].value.partition("base64,")
    assert head == "![history](data:image/svg+xml;"
    picture = base64.b64decode(text.rstrip(")")).decode()
    assert "0.1.0" in picture
    assert "0.2.0" in picture
    assert "<circle" in picture
    page = event.metadata["page"].value
    assert page.endswith(".html")
    assert event.metadata["signer"].value.startswith("sha256:")


def test_partitions_are_the_releases(judged):
    _, instance = judged
    made = instance.get_materialized_partitions(dg.AssetKey(KEY))
    assert made == set(NAMES)


def test_nothing_published_is_no_failure(place, instance):
    place.write_params(store="directory:.dinov3/none")
    try:
        assert place.tick(instance) == "Nothing is published in the store yet."
        assert place.look(instance)[0] == []
    finally:
        place.write_params()


def test_withdrawn_release_is_not_asked_for(place, instance, tmp_path):
    shutil.copytree(place.root / ".dinov3" / "store", place.root / "withdrawn")
    store, log = open_store(f"directory:{place.root / 'withdrawn'}"), tmp_path / "log"
    shutil.copytree(place.root / "0.1.0" / "release_log", log)
    withdraw_release(("vits", "0.1.0"), "leaks", store, log=log, key=place.key)
    place.write_params(store="directory:withdrawn")
    try:
        assert [one.partition_key for one in place.tick(instance)] == ["vits@0.2.0"]
    finally:
        place.write_params()


def test_release_that_cannot_be_judged_fails_its_run_and_shows_no_verdict(place, instance):
    instance.add_dynamic_partitions("releases", ["vits@0.9.0"])
    run = place.execute(instance, dg.RunRequest(partition_key="vits@0.9.0"))
    assert not run.success
    assert run.get_asset_check_evaluations() == []
    assert "not in the store" in run.failure_data_for_node(KEY).error.to_string()


def test_sensor_asks_once_and_again_for_new_pictures(place, instance):
    asked, cursor = place.look(instance)
    assert asked == NAMES
    assert place.look(instance, cursor)[0] == []
    extra = place.benchmark / "blue" / "extra.png"
    shutil.copy(place.root / "colours" / "red" / "2_00.png", extra)
    try:
        assert place.look(instance, cursor)[0] == NAMES
    finally:
        extra.unlink()
    known = json.loads(cursor)
    del known["releases"]["vits@0.2.0"]
    assert place.look(instance, json.dumps(known))[0] == ["vits@0.2.0"]


def test_places_are_those_of_the_checkout_wherever_the_daemon_runs(
    place, instance, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    place.write_params(benchmark="folder:benchmark")
    try:
        assert place.look(instance)[0] == NAMES
    finally:
        place.write_params()


def use(record, name, other):
    """Changes the input of a name."""
    (edge,) = (one for one in record["inputs"] if one["name"] == name)
    edge.update(other)


def test_same_pictures_listed_by_other_code_are_nothing_new(place, instance):
    """Without a benchmark of their own, releases are judged on what the pipeline held out."""
    images, table = place.root / "data" / "image_manifest", "manifest.parquet"
    dataset = place.root / "data" / "curated_dataset"
    place.write_params(benchmark="")
    try:
        assert place.look(instance) == ([], None)  # no pictures yet
        shutil.copytree(place.root / "0.1.0" / "image_manifest", images)
        assert place.look(instance) == ([], None)  # a run would fail, and not be asked for again
        shutil.copytree(place.root / "0.1.0" / "curated_dataset", dataset)
        asked, cursor = place.look(instance)
        assert asked == NAMES
        rewrite_record(images, lambda record: record.update(code="0" * 64))
        assert place.look(instance, cursor)[0] == []
        other = {"sha256": "1" * 64}
        rewrite_record(images, lambda record: record["outputs"][table].update(other))
        assert place.look(instance, cursor) == ([], cursor)  # the dataset is of the old table
        rewrite_record(dataset, lambda record: use(record, table, other))
        assert place.look(instance, cursor)[0] == NAMES
    finally:
        shutil.rmtree(dataset, ignore_errors=True)
        shutil.rmtree(images, ignore_errors=True)
        place.write_params()


def test_schedule_and_sensor_are_off_until_somebody_wants_them():
    schedule = defs.resolve_schedule_def("weekly_reevaluation")
    sensor = defs.resolve_sensor_def("new_release_or_benchmark")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    assert schedule.execution_timezone in (None, "UTC")


def test_everything_leaves_re_evaluation_out():
    selected = defs.resolve_job_def("everything").asset_layer.selected_asset_keys
    assert dg.AssetKey(KEY) not in selected
    assert dg.AssetKey("image_manifest") in selected
    assert defs.resolve_asset_graph().get(dg.AssetKey(KEY)).partitions_def == RELEASES


GATE = {"name": "chain", "result": "all", "threshold": "all", "reason": "lost", "waiver": None}
WAIVER = {"who": "Ada", "why": "known", "until": "2027-01-01"}


@pytest.mark.parametrize(
    ("change", "passed", "said"),
    [
        ({"passed": True, "reason": None}, True, "passed"),
        ({"passed": False}, False, "lost"),
        ({"passed": False, "waiver": WAIVER}, True, "waived by Ada until 2027-01-01: known"),
    ],
)
def test_gate_is_shown_as_the_release_has_it(tmp_path, change, passed, said):
    folder = tmp_path / "data" / "releases" / "vits"
    (folder / "release").mkdir(parents=True)
    gates = {"gates": [{**GATE, **change}]}
    (folder / "release" / "checks.json").write_text(json.dumps(gates))
    judgement = judge_gate(folder, "chain")
    assert judgement.passed is passed
    assert said in judgement.description
    assert not judge_gate(folder, "licences").passed


def test_refused_release_shows_which_gates_refused_it(tmp_path):
    folder = tmp_path / "data" / "releases" / "vits"
    log = tmp_path / "data" / "release_log"
    for made in (folder, log):
        made.mkdir(parents=True)
    assert not judge_gate(folder, "chain").passed
    for model, failed in (("vits", "licences"), ("highres", "chain")):
        note_attempt(
            log, model=model, version="0.1.0", failed=[failed], judged="", day=MONDAY.date()
        )
    assert judge_gate(folder, "chain").passed
    assert "0.1.0 of 2026-11-23" in judge_gate(folder, "licences").description
    assert not judge_gate(folder, "licences").passed


def test_attempt_that_passed_and_left_no_release_is_not_called_refused(tmp_path):
    folder, log = tmp_path / "data" / "releases" / "vits", tmp_path / "data" / "release_log"
    for made in (folder, log):
        made.mkdir(parents=True)
    note_attempt(log, model="vits", version="0.1.0", failed=[], judged="", day=MONDAY.date())
    judgement = judge_gate(folder, "chain")
    assert not judgement.passed
    assert "There is no release; its attempt at vits@0.1.0" in judgement.description


def test_release_is_intact_until_a_file_changes_or_its_key_is_revoked(tmp_path):
    chain = make_chain(tmp_path / "data")
    key = make_key(chain.log / "keys")
    release = make_release(tmp_path, chain=chain, key=key)
    settings = {"store": "directory:store", "key": "demo", "benchmark": ""}
    params = {"recipe": "smoke_cpu", "source": "folder:x", "release": settings}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    whole = intact(release.parent)
    assert whole.passed
    assert key.fingerprint in whole.description
    revoke(key.fingerprint, "lost with a laptop", chain.log)
    assert "revoked on 20" in intact(release.parent).description
    assert not intact(release.parent).passed
    (chain.log / "revoked.json").write_text("{")
    assert not intact(release.parent).passed
    (chain.log / "revoked.json").unlink()
    (release / "README.md").write_bytes((release / "README.md").read_bytes() + b"\n")
    assert "README.md" in intact(release.parent).description
    (chain.log / "keys" / "demo.pub").unlink()
    assert "Copy demo.pub from the folder of keys" in intact(release.parent).description
    shutil.rmtree(release)
    assert intact(release.parent).description == "There is no release: its gates refused it."
