"""Released weights judged again: against what they claim, on pictures they have not seen."""

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image

from dinov3 import cli
from dinov3.errors import ConfigError, DataError, LineageBroken, StoreError
from dinov3.evals.candidate import open_candidate
from dinov3.evals.folder import source_table
from dinov3.evals.study import Scope, run_study
from dinov3.publish.benchmark import Benchmark, contamination, open_benchmark
from dinov3.publish.comparison import METRICS, compare
from dinov3.publish.publishing import withdraw_release
from dinov3.publish.reevaluate import reevaluate
from dinov3.publish.signed_log import locked
from dinov3.publish.store import open_store
from dinov3.recipe import load_recipe
from dinov3.release.images import ROLE_TRAINED, read_images
from dinov3.release.record import canonical_json, file_sha256
from dinov3.release.tensors import tensor_digest
from dinov3.stage import open_stage
from tests.reevaluated import measured_chain, paint, publish
from tests.released import make_key

RETRIEVAL = "protocols.instance retrieval={top-1: 0.5, mAP: 0.5}"  # of a few pictures: noise
TOLERANCES = {("k-NN", "top-1"): 0.1, ("k-NN", "mean per class"): 0.1}


class Published:
    """One release in a directory store, its claims measured on pictures of three colours."""

    def __init__(self, root):
        self.root = root
        self.store = f"directory:{root / 'store'}"
        self.key = make_key(root / "keys")
        self.pictures = paint(root / "colours")
        self.others = paint(root / "others", mixed=True, seed=1)
        self.chain = measured_chain(root / "data", self.pictures)
        self.release = publish(self.chain, self.store, "0.1.0", self.key)

    def judge(self, output, *overrides, source=None, name="vits@0.1.0", key=None, store=None):
        given = ["run.device=cpu", "run.threads=1", RETRIEVAL, *overrides]
        return reevaluate(
            name,
            store=store or self.store,
            key=key or self.root / "keys" / "demo.pub",
            benchmark=Benchmark(source or self.pictures),
            output=output,
            config=load_recipe("smoke_cpu", given, phase="reevaluation"),
        )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def unchanged(published, tmp_path_factory):
    return published.judge(tmp_path_factory.mktemp("unchanged"))


def row(value, protocol="k-NN", metric="top-1", subject="model", **names):
    figures = {"value": value, "low": value - 0.1, "high": value + 0.1, "num_samples": 9}
    return {"protocol": protocol, "metric": metric, "subject": subject, **names, **figures}


@pytest.mark.parametrize(
    ("now", "regressed"), [(0.9, False), (0.8, False), (0.7, False), (0.699999, True), (0.1, True)]
)
def test_only_a_fall_beyond_the_tolerance_is_a_regression(now, regressed):
    (found,), _ = compare([row(0.8, k=5)], [row(now, k=5)], TOLERANCES)
    assert found["regressed"] is regressed
    assert found["fall"] == pytest.approx(0.8 - now)
    assert (found["released"], found["value"], found["k"]) == (0.8, now, 5)


@pytest.mark.parametrize("now", [float("nan"), float("inf"), float("-inf")])
def test_figure_that_is_no_number_does_not_hold(now):
    with pytest.raises(DataError, match="k-NN top-1: no number, got"):
        compare([row(0.8, k=5)], [row(now, k=5)], TOLERANCES)


def test_only_the_models_figures_with_a_tolerance_are_compared():
    rows = [row(0.8, k=5), row(0.8, subject="random init", k=5), row(0.5, "linear probe")]
    metrics, uncompared = compare(rows, rows, TOLERANCES)
    assert [(one["protocol"], one["k"]) for one in metrics] == [("k-NN", 5)]
    assert uncompared == []


def test_figures_of_one_side_only_are_told_apart():
    before = [row(0.8, k=5), row(0.8, k=20)]
    now = [row(0.8, k=5), row(0.7, metric="mean per class")]
    _, uncompared = compare(before, now, TOLERANCES)
    assert uncompared == [
        {"protocol": "k-NN", "metric": "top-1", "k": 20, "released": 0.8, "value": None},
        {"protocol": "k-NN", "metric": "mean per class", "released": None, "value": 0.7},
    ]


def test_same_weights_on_the_same_pictures_give_the_released_figures(unchanged):
    assert unchanged.content["metrics"]
    assert all(one["fall"] == 0 for one in unchanged.content["metrics"])
    assert unchanged.regressions == []
    protocols = {one["protocol"] for one in unchanged.content["metrics"]}
    assert protocols == {"k-NN", "instance retrieval"}


def test_protocols_that_the_recipe_leaves_out_are_not_run(published):
    """What they cost is why they are left out."""
    config = load_recipe("smoke_cpu", ["run.threads=1"], phase="evals")
    opened, device = open_benchmark(Benchmark(published.pictures), config), torch.device("cpu")
    candidate = open_candidate(published.chain.model("vits"), None, device)
    given = (candidate, opened.table, opened.pictures, opened.halves, config, device)
    study = run_study(*given, scope=Scope({"instance retrieval"}, baselines={}))
    assert {one["protocol"] for one in study.rows} == {"instance retrieval"}
    assert (study.choices, study.missing, study.dense) == ([], [], None)
    study = run_study(*given, scope=Scope({"logistic regression", "segmentation"}, baselines={}))
    assert {one["protocol"] for one in study.rows} == {"logistic regression"}
    assert {one["protocol"] for one in study.choices} == {"logistic regression"}
    assert [one["protocol"] for one in study.missing] == ["segmentation"]


def test_report_names_release_signer_weights_and_pictures(published, unchanged):
    said = unchanged.content
    weights = published.release / "model.safetensors"
    assert said["release"]["model"] == "vits"
    assert said["release"]["version"] == "0.1.0"
    assert said["release"]["tensors"] == tensor_digest(weights)
    assert said["release"]["signer"] == published.key.fingerprint
    assert said["benchmark"]["contamination"] == "none"
    assert json.loads(unchanged.report.read_bytes()) == said
    assert unchanged.report.read_bytes() == canonical_json(said)
    date, benchmark = said["date"], said["benchmark"]["sha256"]
    assert unchanged.report.name == f"{date}-{benchmark[:12]}.json"
    assert unchanged.report.parent.parts[-2:] == ("vits", "0.1.0")


def test_page_shows_figures_history_and_digests(unchanged):
    page = unchanged.page.read_text()
    assert "Re-evaluation: vits@0.1.0" in page
    assert "hold within their tolerance" in page
    assert "<circle" in page
    for digest in (unchanged.content["release"]["digest"], unchanged.content["code"]):
        assert digest in page


def test_nothing_but_the_report_is_left(unchanged):
    output = unchanged.report.parents[2]
    files = {path for path in output.rglob("*") if path.is_file()}
    assert files == {unchanged.report, unchanged.page}


def test_fall_on_other_pictures_is_a_regression(published, tmp_path):
    found = published.judge(tmp_path, source=published.others)
    assert {one["protocol"] for one in found.regressions} == {"k-NN"}
    assert "fell\nbelow the released value" in found.page.read_text()
    assert not found.content["benchmark"]["as_released"]


def test_a_wider_tolerance_lets_it_pass(published, tmp_path):
    wide = "{top-1: 1.0, top-5: 1.0, mean per class: 1.0}"
    found = published.judge(tmp_path, f"protocols.k-NN={wide}", source=published.others)
    assert found.regressions == []


def test_reports_are_never_overwritten(published, tmp_path):
    found = [published.judge(tmp_path) for _ in range(2)]
    before = [(one.report, file_sha256(one.report)) for one in found]
    found.append(published.judge(tmp_path, source=published.others))
    assert len({one.report for one in found}) == 3
    assert before == [(path, file_sha256(path)) for path, _ in before]
    assert found[-1].page.read_text().count("<circle") == 3 * len(found[0].content["metrics"])


def test_weights_that_a_killed_run_left_are_removed_and_those_of_a_live_one_are_not(
    published, tmp_path
):
    dead, live = tmp_path / ".fetched-1-dead", tmp_path / ".fetched-2-live"
    for folder in (dead, live):
        (folder / "release").mkdir(parents=True)
    with locked(live):  # by a run on whatever machine
        published.judge(tmp_path)
    assert not dead.exists()
    assert live.exists()


def test_report_that_cannot_be_read_is_named_before_anything_is_fetched(published, tmp_path):
    broken = tmp_path / "vits" / "0.1.0" / "old.json"
    broken.parent.mkdir(parents=True)
    broken.touch()
    with pytest.raises(DataError, match=r"old\.json: not a report of a re-evaluation"):
        published.judge(tmp_path, name="vits@0.3.0")


def test_report_that_cannot_be_written_is_an_error_in_words(published, tmp_path):
    (tmp_path / "vits").touch()
    with pytest.raises(DataError, match=r"cannot be written: .*Free the disk or choose another"):
        published.judge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vits"]


def test_release_signed_by_another_key_is_not_judged(published, tmp_path):
    other = make_key(tmp_path / "keys", "other")
    with pytest.raises(LineageBroken, match=r"vits@0\.1\.0: refused, signature-invalid"):
        published.judge(tmp_path / "out", key=other.path.with_suffix(".pub"))
    assert not list((tmp_path / "out").rglob("*.json"))


def test_damaged_store_is_not_judged(published, tmp_path):
    shutil.copytree(published.root / "store", tmp_path / "store")
    (weights,) = (tmp_path / "store").glob("objects/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    with pytest.raises(LineageBroken, match="the store's copy is damaged"):
        published.judge(tmp_path / "out", store=f"directory:{tmp_path / 'store'}")
    assert list((tmp_path / "out").iterdir()) == []


def test_withdrawn_release_is_not_judged(published, tmp_path):
    shutil.copytree(published.root / "store", tmp_path / "store")
    shutil.copytree(published.chain.log, tmp_path / "log")
    store = f"directory:{tmp_path / 'store'}"
    name, log = ("vits", "0.1.0"), tmp_path / "log"
    withdraw_release(name, "leaks", open_store(store), log=log, key=published.key)
    with pytest.raises(StoreError, match=r"vits@0\.1\.0: withdrawn, because: leaks"):
        published.judge(tmp_path / "out", store=store)


def test_absent_release_is_named(published, tmp_path):
    with pytest.raises(StoreError, match=r"vits@0\.3\.0: not in the store"):
        published.judge(tmp_path, name="vits@0.3.0")


def test_figure_that_these_pictures_cannot_give_is_no_figure_that_holds(published, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in (published.root / "colours").rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / f"{path.parent.name}_{path.name}")
    with pytest.raises(DataError, match=r"k-NN top-1 was released and cannot be judged .* labels"):
        published.judge(tmp_path / "out", source=f"folder:{tmp_path / 'flat'}")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_recipe_must_name_protocols_that_were_released(published, tmp_path):
    only = "protocols={k-NN: null, instance retrieval: null, segmentation: {mIoU: 0.1}}"
    with pytest.raises(DataError, match="none of these was released"):
        published.judge(tmp_path, only)


def test_unknown_protocol_is_named(published, tmp_path):
    with pytest.raises(DataError, match="protocols: unknown, got 'k-nn'"):
        published.judge(tmp_path, "protocols={k-nn: {top-1: 0.1}}")


def test_metric_that_the_protocol_does_not_have_is_named(published, tmp_path):
    with pytest.raises(DataError, match=r"k-NN: unknown metric, got 'top1'\. Use one of top-1"):
        published.judge(tmp_path, "protocols={k-NN: {top-1: 0.1, top1: 0.1}}")


def test_metrics_that_a_recipe_may_name_are_those_that_reports_have(published, tmp_path):
    """Six classes give a top-5, pictures with a shape of their own give scenes."""
    for label in range(6):
        for number in range(8):
            picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
            picture.paste((40 * label, 9 * number, 90, 255), (4, 4, 16, 16))
            path = tmp_path / "shapes" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    source = f"folder:{tmp_path / 'shapes'}"
    config = load_recipe("smoke_cpu", ["run.device=cpu", "run.threads=1"], phase="evals")
    opened, device = open_benchmark(Benchmark(source), config), torch.device("cpu")
    candidate = open_candidate(published.chain.model("vits"), None, device)
    scope = Scope(set(METRICS), baselines={})
    given = (candidate, opened.table, opened.pictures, opened.halves, config, device)
    rows = run_study(*given, scope=scope).rows
    found = {name: {one["metric"] for one in rows if one["protocol"] == name} for name in METRICS}
    assert found == {name: set(metrics) for name, metrics in METRICS.items()}


def test_recipe_without_any_tolerance_is_refused():
    with pytest.raises(ConfigError, match="protocols: no metric has a tolerance"):
        load_recipe(
            "smoke_cpu",
            ["protocols={k-NN: null, instance retrieval: null}"],
            phase="reevaluation",
        )


def held_out(digest):
    """A table of one picture that is judged."""
    return pl.DataFrame({"path": ["a.png"], "sha256": [digest.hex()], "split": ["test"]})


def head_of(release, **changes):
    return {**json.loads((release / "release.json").read_bytes()), **changes}


def test_picture_that_was_trained_on_is_no_benchmark(published):
    release = published.release
    with read_images(release / "images.bin") as images:
        trained = next(digest for digest, role in images if role == ROLE_TRAINED)
    with pytest.raises(DataError, match=r"1 held-out pictures were trained on, got 'a\.png'"):
        contamination(release, head_of(release), held_out(trained))
    looked_at = held_out(trained).with_columns(split=pl.lit("train"))
    assert contamination(release, head_of(release), looked_at) == "none"


def test_training_data_that_is_not_known_leaves_contamination_open(published):
    release, table = published.release, held_out(b"x" * 32)
    images = head_of(release)["images"]
    roots = [{"training_data": "unknown"}]
    assert contamination(release, head_of(release), table) == "none"
    for changes in ({"images": None}, {"images": {**images, "mode": "keyed"}}, {"roots": roots}):
        assert contamination(release, head_of(release, **changes), table) == "unknown"


def test_table_with_splits_is_taken_as_it_is(published, tmp_path):
    config = load_recipe("smoke_cpu", phase="evals")
    table = source_table(published.pictures, None, Counter())
    with open_stage("image_manifest", tmp_path / "tables", config={}) as stage:
        table.write_parquet(stage.path("manifest.parquet"))
    manifest = tmp_path / "tables" / "manifest.parquet"
    found = open_benchmark(Benchmark(published.pictures, manifest), config)
    assert found.sha256 == file_sha256(manifest)
    assert found.table.equals(table)
    with open_stage("curated_dataset", tmp_path / "curated", config={}) as stage:
        rows = table.select("path", "sha256", kept=pl.lit(True))
        rows.write_parquet(stage.path("curated.parquet"))
    trained = Benchmark(published.pictures, manifest, tmp_path / "curated" / "curated.parquet")
    with pytest.raises(DataError, match="held-out images are also in the training data"):
        open_benchmark(trained, config)
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(LineageBroken, match="its bytes differ from the record"):
        open_benchmark(Benchmark(published.pictures, manifest), config)


def test_curated_dataset_needs_its_manifest(tmp_path):
    config = load_recipe("smoke_cpu", phase="evals")
    with pytest.raises(DataError, match="dataset: needs the manifest of its pictures"):
        open_benchmark(Benchmark("folder:x", None, tmp_path), config)


def run_verb(published, output, *overrides, source=None):
    given = ("--store", published.store, "--key", str(published.root / "keys" / "demo.pub"))
    place = ("--source", source or published.pictures, "--output", str(output))
    verb = ("reevaluate", "vits@0.1.0", "--recipe", "smoke_cpu", *given, *place)
    return cli.run([*verb, "run.device=cpu", RETRIEVAL, *overrides])


def test_verb_says_what_holds_and_where_the_report_is(published, tmp_path, capsys):
    assert run_verb(published, tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    (report,) = tmp_path.rglob("*.json")
    assert said[-1] == f"report {report}"
    assert all(line.startswith("holds") for line in said[:-1])


def test_regression_exits_with_three_after_the_report_and_a_failing_alert(
    published, tmp_path, capsys
):
    alert = "run.alert.command=[/no/such/program]"
    assert run_verb(published, tmp_path, alert, source=published.others) == 3
    said = capsys.readouterr()
    (report,) = tmp_path.rglob("*.json")
    assert f"report {report}" in said.out
    assert "REGRESSION  k-NN top-1, k = 5: " in said.out
    assert "alert command /no/such/program: cannot be run" in said.err
    assert "figures fell beyond their tolerance" in said.err


def test_alert_goes_out_although_the_output_cannot_be_written(published, tmp_path, monkeypatch):
    told = tmp_path / "told"
    alert = f"run.alert.command=[touch, {told}]"
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(OSError, match="No space left"):
            run_verb(published, tmp_path / "out", alert, source=published.others)
    assert told.exists()


def test_nobody_is_alerted_while_all_holds(published, tmp_path, capsys):
    assert run_verb(published, tmp_path, "run.alert.command=[/no/such/program]") == 0
    assert "alert" not in capsys.readouterr().err
