"""A release made again: the same tensors from the same records, or a difference that is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dinov3.errors import ConfigError, DataError, StoreError
from dinov3.publish.build import ReleaseRequest, build_release
from dinov3.publish.pipeline_commands import read_commands
from dinov3.publish.recorded_code import default_runs, environment_of, find_code
from dinov3.publish.remake import remake
from dinov3.publish.reproduce import (
    METRICS,
    TENSORS,
    ancestors,
    bits_may_differ,
    compare_figures,
    differing_outputs,
)
from dinov3.publish.store import open_store
from dinov3.publish.workshop import Link
from dinov3.recipe import load_recipe
from dinov3.release.record import Edge, Output, Record, file_sha256, read_record
from dinov3.stage import CHECKOUT, code_digest
from orchestration.stages import checkout_pipeline
from tests.flow.conftest import dinov3, draw_pictures
from tests.flow.forks import fork
from tests.released import change_run, make_key, rewrite_record

WAIVER = """
- gate: clean_code
  model: {model}
  version: 0.1.0
  who: Ada
  why: made by a test, in whatever checkout it runs
  until: 2099-01-01
"""
GATE = "{protocol: k-NN, metric: top-1, k: 5, against: random init, difference_low_at_least: -1}"


def run(*arguments):
    """A verb that must succeed."""
    done = fork(*arguments)
    assert done.returncode == 0, done.stderr


class Made:
    """Pictures of a known licence, all artifacts from them to a judged model, and a key."""

    def __init__(self, root):
        self.root, self.source = root, f"folder:{root / 'pictures'}"
        self.key = make_key(root / "keys")

    def build(self):
        """Runs the stages."""
        draw_pictures(self.root / "pictures", num_per_class=8)
        images, embeddings = self.manifest.parent, self.data / "image_embeddings"
        common = ("--recipe", "smoke_cpu", "--source", self.source)
        table = ("--manifest", self.manifest)
        run("manifest", *common, "--output", images, "licence=GPL-2.0-or-later")
        run("embeddings", *common, *table, "--output", embeddings)
        vectors = ("--embeddings", embeddings / "embeddings.parquet")
        run("curate", "--recipe", "smoke_cpu", *table, *vectors, "--output", self.dataset.parent)
        self.train(self.checkpoint)
        self.judge()
        return self

    def train(self, output, *overrides):
        """The model, or another one."""
        verb = ("train", "pretrained_checkpoint")
        run(*verb, *self.inputs, "--output", output, "run.device=cpu", *overrides)

    def judge(self):
        """The report of the model that is there."""
        verb = ("report", "eval_reports_pretrained", "--model", self.checkpoint)
        output = self.data / "eval_reports" / "pretrained"
        run(*verb, *self.inputs, "--output", output, "run.device=cpu")

    @property
    def inputs(self):
        given = ("--recipe", "smoke_cpu", "--source", self.source)
        return (*given, "--manifest", self.manifest, "--dataset", self.dataset)

    @property
    def manifest(self):
        return self.data / "image_manifest" / "manifest.parquet"

    @property
    def dataset(self):
        return self.data / "curated_dataset" / "curated.parquet"

    @property
    def data(self):
        return self.root / "data"

    @property
    def checkpoint(self):
        return self.data / "pretrained_checkpoint"

    def copy(self, root):
        """The same artifacts elsewhere, to be changed."""
        made = object.__new__(Made)
        made.root, made.source, made.key = root, self.source, self.key
        shutil.copytree(self.data, made.data)
        return made

    def train_the_rest(self):
        """Gram, high resolution and students, each a few steps, and the report of a student."""
        pretrained, teacher = self.checkpoint, self.data / "gram_teacher"
        gram, highres = self.data / "gram_checkpoint", self.data / "highres_model"
        students, device = self.data / "distilled_students", "run.device=cpu"
        given = ("--recipe", "smoke_cpu", "--source", self.source, "--manifest", self.manifest)
        chosen = ("--checkpoint", pretrained, "--output", teacher)
        run("gram-teacher", "gram_teacher", *given, *chosen, device)
        for stage, phase, before, output in (
            ("gram_checkpoint", "gram", pretrained, gram),
            ("highres_model", "highres", gram, highres),
        ):
            init = ("--init-from", before, "--gram-teacher", teacher, "--output", output)
            run("train", stage, "--phase", phase, *self.inputs, *init, device)
        taught = ("--teacher", highres, "--output", students)
        run("distill", "distilled_students", *self.inputs, *taught, device)
        output = ("--model", students / "vits", "--output", self.data / "eval_reports" / "vits")
        run("report", "eval_reports_vits", *self.inputs, *output, device)

    def release(self, model="pretrained", weights="pretrained_checkpoint"):
        """A signed release of a model."""
        log = self.data / "release_log"
        log.mkdir(exist_ok=True)
        (log / "waivers.yaml").write_text(WAIVER.format(model=model))
        return build_release(
            ReleaseRequest(
                stage=f"release_{model}",
                model=model,
                version="0.1.0",
                weights=self.data / weights,
                report=self.data / "eval_reports" / model,
                artifacts=self.data,
                log=log,
                output=self.root / "releases" / model,
                config=load_recipe("smoke_cpu", [f"policy.evaluation=[{GATE}]"], phase="release"),
                key=self.key,
                recipe="smoke_cpu",
            )
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made")).build()


@pytest.fixture(scope="module")
def release(made):
    return made.release()


def reproduce(made, release, tmp_path, *options):
    return dinov3(
        *("reproduce", release, "--source", made.source, "--scratch", tmp_path / "scratch"),
        *("--key", made.root / "keys" / "demo.pub", *options),
    )


def test_release_is_made_again_with_the_same_tensors(made, release, tmp_path):
    done = reproduce(made, release, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = read_record(made.checkpoint / "record.json").outputs
    for name in ("backbone.safetensors", "heads.safetensors"):
        digest = weights[name].tensors
        assert f"same      {name}: released {digest}, made {digest}" in done.stdout
    assert "made again the same, compared by tensor digests" in done.stdout
    stages = ("image_manifest", "image_embeddings", "curated_dataset", "pretrained_checkpoint")
    assert all(f"{stage}: same" in done.stderr for stage in stages)
    again = tmp_path / "scratch" / "workspace" / "data" / "pretrained_checkpoint"
    assert file_sha256(again / "record.json") == file_sha256(made.checkpoint / "record.json")


def test_weights_that_the_records_do_not_lead_to_are_different(made, tmp_path):
    """The record says what the training run says; the weights are those of another seed."""
    forged, other = made.copy(tmp_path / "forged"), tmp_path / "other"
    forged.train(other, "seed=7")
    weights = "backbone.safetensors"
    shutil.copy(other / weights, forged.checkpoint / weights)
    own = json.loads((other / "record.json").read_bytes())["outputs"][weights]
    rewrite_record(forged.checkpoint, lambda record: record["outputs"].update({weights: own}))
    shutil.rmtree(forged.data / "eval_reports")
    forged.judge()

    done = reproduce(made, forged.release(), tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"DIFFERENT {weights}: released {own['tensors']}" in done.stdout
    assert "same      heads.safetensors" in done.stdout
    assert "made again it is different, compared by tensor digests" in done.stderr
    assert "the first stage that differs is pretrained_checkpoint" in done.stderr


@pytest.mark.slow
def test_student_is_made_again_through_every_phase_before_it(made, tmp_path):
    whole = made.copy(tmp_path / "whole")
    whole.train_the_rest()
    release = whole.release("vits", "distilled_students/vits")
    done = reproduce(made, release, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vits" in done.stdout
    stages = ("gram_teacher", "gram_checkpoint", "highres_model", "distilled_students_vits")
    assert all(f"{stage}: same" in done.stderr for stage in stages)
    assert "made again the same, compared by tensor digests" in done.stdout


@pytest.mark.slow
def test_training_on_another_device_is_compared_by_figures(made, tmp_path):
    elsewhere = made.copy(tmp_path / "elsewhere")
    change_run(elsewhere.checkpoint, device="cuda")
    done = reproduce(made, elsewhere.release(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: pretrained_checkpoint was trained on cuda" in done.stdout
    assert "same      k-NN top-1, k = 5: released" in done.stdout
    assert "made again the same, compared by metrics" in done.stdout


def test_other_pictures_are_refused_before_anything_is_made(made, release, tmp_path):
    store = f"directory:{tmp_path / 'store'}"
    open_store(store).publish(release, log=made.data / "release_log", key=made.key)
    other = tmp_path / "pictures"
    shutil.copytree(Path(made.source.removeprefix("folder:")), other)
    Image.new("RGB", (20, 20), "orange").save(other / "line" / "extra.png")
    place = ("--store", store, "--source", f"folder:{other}")
    done = dinov3("reproduce", "pretrained@0.1.0", *place)
    assert done.returncode == 2
    assert "source: other pictures than the release was made of" in done.stderr


def test_changed_release_is_not_made_again(made, release, tmp_path):
    changed = tmp_path / "release"
    shutil.copytree(release, changed)
    data = (changed / "config.json").read_bytes()
    (changed / "config.json").write_bytes(data + b" ")
    done = dinov3("reproduce", changed, "--source", made.source)
    assert done.returncode == 2
    assert "refused, file-changed" in done.stderr


def test_name_without_a_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="store: needed for what is no folder"):
        remake("vits@0.1.0", store=None, key=None, source="x:y", scratch=None, say=print)


def test_with_a_store_a_folder_of_that_name_is_not_looked_at(tmp_path, monkeypatch):
    (tmp_path / "vits@0.1.0").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="store"):
        remake(
            "vits@0.1.0",
            store=f"directory:{tmp_path / 'none'}",
            key=None,
            source="x:y",
            scratch=None,
            say=print,
        )


def test_key_that_comes_with_the_release_vouches_for_nothing(made, release, tmp_path):
    inside = tmp_path / "release"
    shutil.copytree(release, inside)
    (inside / "demo.pub").write_bytes(made.key.public)
    done = dinov3("reproduce", inside, "--source", made.source, "--key", inside / "demo.pub")
    assert done.returncode == 2
    assert "key: lies in the release itself" in done.stderr


def test_scratch_that_is_a_file_is_no_verdict(tmp_path):
    (tmp_path / "file").touch()
    done = dinov3("reproduce", "x", "--source", "x:y", "--scratch", tmp_path / "file")
    assert done.returncode == 2
    assert "File exists" in done.stderr


def test_scratch_folder_must_be_empty(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="scratch: not empty"):
        remake("x", store=None, key=None, source="x:y", scratch=tmp_path, say=print)


def test_commands_are_those_of_the_pipeline():
    """Read by the core alone, they are what Dagster and dvc run, but for recipe and source."""
    pipeline = checkout_pipeline()
    given = {"recipe": "demo", "source": "stamps:data/stamps"}
    commands = read_commands(CHECKOUT)
    assert commands.keys() == pipeline.artifacts.keys()
    for key, artifact in pipeline.artifacts.items():
        if key.startswith("release_"):
            continue
        stage = next(one for one in pipeline.stages.values() if one.name == artifact.stage)
        assert commands[key].line(given).split() == stage.command.split()
        assert str(commands[key].folder) == artifact.folder


def test_pipeline_of_another_kind_is_refused(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: [a, b]")
    with pytest.raises(ConfigError, match="not a readable pipeline"):
        read_commands(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: 'x ${b}', outs: [d/record.json]}}")
    with pytest.raises(ConfigError, match=r"dvc\.yaml: a: unknown name, got \$\{b\}"):
        read_commands(tmp_path)["a"].line({})


def test_settings_that_change_no_result_are_those_of_the_code():
    runs = default_runs(CHECKOUT)
    assert runs["pretrain"] == load_recipe("default").run.model_dump(mode="json")
    assert "manifest" not in runs


def test_code_of_this_checkout_is_used_as_it_is(tmp_path):
    assert find_code(code_digest(), {}, tmp_path, is_trusted=False) == CHECKOUT


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def changed_code(tmp_path):
    """What a run in a changed checkout records: commit, difference and the digest of the code."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--shared", str(CHECKOUT), str(clone))
    changed = clone / "dinov3" / "__init__.py"
    changed.write_text(changed.read_text() + "# changed\n")
    say = "from dinov3.stage import code_digest; print(code_digest())"
    digest = subprocess.run(
        [sys.executable, "-c", say],
        env=environment_of(clone),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    run = {"commit": git(clone, "rev-parse", "HEAD").strip(), "diff": git(clone, "diff", "HEAD")}
    return digest, run


def test_code_of_another_checkout_is_restored_from_commit_and_difference(changed_code, tmp_path):
    digest, run = changed_code
    found = find_code(digest, run, tmp_path / "code", is_trusted=True)
    assert found != CHECKOUT
    assert (found / "dinov3" / "__init__.py").read_text().endswith("# changed\n")
    assert find_code(digest, run, tmp_path / "code", is_trusted=True) == found
    assert str(tmp_path) not in git(CHECKOUT, "worktree", "list")


def test_commit_of_other_code_is_refused(changed_code, tmp_path):
    digest, run = changed_code
    with pytest.raises(DataError, match="has other code, got"):
        find_code(digest, {"commit": run["commit"]}, tmp_path / "code", is_trusted=False)


def test_difference_that_nobody_vouches_for_is_not_run(changed_code, tmp_path):
    digest, run = changed_code
    with pytest.raises(DataError, match=r"no key that vouches for it\. Give --key"):
        find_code(digest, run, tmp_path / "code", is_trusted=False)
    assert not (tmp_path / "code").exists()


def test_code_that_a_release_carries_is_not_run_without_its_signers_key(made, tmp_path):
    """Its records name code of their own, and the difference that makes it."""
    elsewhere, mark = made.copy(tmp_path / "elsewhere"), tmp_path / "ran"
    diff = (
        "diff --git a/dinov3/__init__.py b/dinov3/__init__.py\n"
        "--- a/dinov3/__init__.py\n+++ b/dinov3/__init__.py\n@@ -0,0 +1 @@\n"
        f"+open({str(mark)!r}, 'w')\n"
    )
    rewrite_record(elsewhere.checkpoint, lambda record: record.update(code="0" * 64))
    commit = git(CHECKOUT, "rev-parse", "HEAD").strip()
    change_run(elsewhere.checkpoint, commit=commit, dirty=True, diff=diff)
    shutil.rmtree(elsewhere.data / "eval_reports")
    elsewhere.judge()
    release = elsewhere.release()
    done = dinov3("reproduce", release, "--source", made.source)
    assert done.returncode == 2, done.stderr
    assert "no key that vouches for it. Give --key." in done.stderr
    assert "image_manifest: " not in done.stderr
    assert not mark.exists()


def test_code_without_a_commit_cannot_be_restored(tmp_path):
    for commit in (None, "", "--help", "HEAD"):
        with pytest.raises(DataError, match="its run names no commit"):
            find_code("0" * 64, {"commit": commit}, tmp_path, is_trusted=False)


def test_lost_commit_is_named(tmp_path):
    with pytest.raises(DataError, match="the recorded code cannot be restored"):
        find_code("0" * 64, {"commit": "0" * 40}, tmp_path, is_trusted=False)


OUTPUTS = {"a.safetensors": Output("1" * 64, 9, "2" * 64), "b.json": Output("3" * 64, 9)}


def record(stage="train", inputs=(), outputs=None):
    digest = "0" * 64
    return Record(stage, tuple(inputs), {}, digest, digest, digest, outputs or OUTPUTS)


def test_container_of_the_same_tensors_does_not_matter():
    made = {**OUTPUTS, "a.safetensors": Output("9" * 64, 10, "2" * 64)}
    assert differing_outputs(record(), record(outputs=made)) == []
    made = {"a.safetensors": Output("1" * 64, 9, "8" * 64), "c.json": OUTPUTS["b.json"]}
    found = differing_outputs(record(), record(outputs=made))
    assert found == ["a.safetensors", "b.json", "c.json"]


def test_only_what_led_to_the_end_is_made():
    first, second = record("first"), record("second", [Edge("r", "n", "0" * 64, "d1")])
    links = {"d1": Link(first, {}), "d2": Link(second, {}), "d3": Link(second, {})}
    assert ancestors(links, "d2") == ["d1", "d2"]
    assert ancestors(links, "d2", "d3") == ["d1", "d2", "d3"]
    assert ancestors(links, "d1") == ["d1"]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"device": "cpu", "world_size": 1}, None),
        ({"device": "cuda"}, "train was trained on cuda"),
        ({"world_size": 2}, "train was trained by 2 processes"),
        ({"host_class": "darwin-arm64-8cpu"}, "train was made on darwin-arm64, this is"),
    ],
)
def test_bits_are_asked_for_only_where_they_must_come_out(run, said):
    found = bits_may_differ([Link(record(), run)])
    assert found is None if said is None else said in found


def test_figure_agrees_when_it_lies_in_the_released_interval():
    def row(value, protocol="k-NN", subject="model"):
        figures = {"value": value, "low": 0.4, "high": 0.6}
        return {"protocol": protocol, "metric": "top-1", "subject": subject, **figures}

    released = [row(0.5), row(0.5, "linear probe"), row(0.5, "retrieval"), row(0.5, "x", "raw")]
    made = [row(0.6), row(0.61, "linear probe")]
    found = {one.name: one.agrees for one in compare_figures(released, made)}
    assert found == {"k-NN top-1": True, "linear probe top-1": False, "retrieval top-1": False}
    assert {TENSORS, METRICS} == {"tensor digests", "metrics"}
