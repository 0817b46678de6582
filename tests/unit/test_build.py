"""Building a release: whole and verified, or nothing at all, whichever gate fails."""

import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinov3 import hub
from dinov3.cli import run
from dinov3.errors import ConfigError, DataError, LineageBroken, ReleaseRefused, StoreError
from dinov3.publish.build import build_release, read_salt
from dinov3.publish.keys import revoke
from dinov3.publish.signed_log import append_receipt
from dinov3.release.audit import Question, audit_release
from dinov3.release.files import check_sums, release_digest
from dinov3.release.images import read_images
from dinov3.release.receipts import Receipt
from dinov3.release.record import file_sha256, read_record
from dinov3.stage import CHECKOUT
from tests.released import Chain, a_request, change_run, make_chain, make_key, make_release

SALT = b"sixteen bytes or more"


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def flawless(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("flawless") / "data")


@pytest.fixture
def chain(flawless, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(flawless.root, tmp_path / "data")
    return Chain(tmp_path / "data")


@pytest.fixture(scope="module")
def release(flawless, key, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(flawless.root, folder / "data")
    return make_release(folder, chain=Chain(folder / "data"), key=key)


def command(chain, key, version="0.1.0", overrides=()):
    return [
        *("release", "release_vits", "--recipe", "smoke_cpu"),
        *("--model", str(chain.model()), "--report", str(chain.report())),
        *("--artifacts", str(chain.root), "--log", str(chain.log)),
        *("--version", version, "--key", str(key.path)),
        *("--output", str(chain.root / "releases" / "vits")),
        *overrides,
    ]


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def attempts(chain):
    lines = (chain.log / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_release_holds_the_files_of_its_schema(release):
    stems = {path.stem for path in (release / "records").iterdir()}
    assert len(stems) == 6
    trained = {stem for stem in stems if stem.startswith(("pretrained_", "distilled_"))}
    assert set(tree(release)) == {
        *("model.safetensors", "heads.safetensors", "config.json", "release.json", "evals.json"),
        *("checks.json", "images.bin", "provenance.intoto.json", "mlbom.cdx.json", "README.md"),
        *("SHA256SUMS", "model.sig", "licences/GPL-2.0-or-later.txt"),
        *(f"records/{stem}.json" for stem in stems),
        *(f"runs/{stem}.json" for stem in stems),
        *(f"events/{stem}.jsonl" for stem in trained),
    }


def test_weights_records_and_report_are_the_chains_own_bytes(release, flawless):
    pairs = {
        "model.safetensors": flawless.model() / "backbone.safetensors",
        "heads.safetensors": flawless.model() / "heads.safetensors",
        "config.json": flawless.model() / "config.json",
        "evals.json": flawless.report() / "report.json",
        "images.bin": flawless.folder("curated_dataset") / "images.bin",
    }
    assert {name: file_sha256(release / name) for name in pairs} == {
        name: file_sha256(path) for name, path in pairs.items()
    }
    digests = {file_sha256(path) for path in (release / "records").iterdir()}
    folders = ["image_manifest", "image_embeddings", "curated_dataset", "pretrained_checkpoint"]
    paths = [flawless.folder(name) for name in folders] + [flawless.model(), flawless.report()]
    assert digests == {file_sha256(path / "record.json") for path in paths}


def test_verifier_takes_it_by_key_and_name(release, key, flawless):
    question = Question(key=key.public, expect="vits@0.1.0", artifacts=flawless.root)
    audit = audit_release(release, question)
    assert audit.signer.fingerprint == key.fingerprint
    assert audit.not_checked == []
    assert audit.digest == release_digest(check_sums(release))


def test_stage_has_an_edge_to_every_file_of_the_chain(release, flawless):
    record = read_record(release.parent / "record.json")
    edges = {(edge.name, edge.sha256, edge.record) for edge in record.inputs}
    expected = set()
    for path in (release / "records").iterdir():
        made = read_record(path)
        for name, output in made.outputs.items():
            expected.add((name, output.sha256, file_sha256(path)))
    assert edges == expected
    assert record.outputs.keys() == {f"release/{name}" for name in tree(release)}
    assert record.facts["release"] == release_digest(check_sums(release))
    assert record.licences["out"] == ("GPL-2.0-or-later",)


def test_nothing_in_it_tells_where_it_was_made(release, flawless):
    name = re.compile(rb"\b(" + socket.gethostname().encode() + rb")\b")
    needles = {str(CHECKOUT), str(Path.home()), str(flawless.root.parent)}
    for path in [*release.rglob("*"), release.parent / "record.json"]:
        if path.is_file() and path.parent.name != "licences":
            data = path.read_bytes()
            assert not [one for one in needles if f"{one}/".encode() in data], path.name
            assert not name.search(data), path.name


def test_record_made_from_an_absolute_path_is_refused(tmp_path, key):
    chain = make_chain(tmp_path / "data", word="x")
    change_run(chain.folder("image_embeddings"), weights=f"{tmp_path}/data/secret.pth")
    with pytest.raises(ReleaseRefused, match="names a folder of this machine"):
        build_release(a_request(chain, key=key))
    assert not (chain.root / "releases" / "vits").exists()


SPOILED = {
    "clean_code": {"committed": False},
    "training_health": {"healthy": False},
    "manifest_verdict": {"sound": False},
    "contamination": {"overlap": True},
    "licences": {"licence": "found on the street"},
}


@pytest.mark.parametrize("gate", SPOILED)
def test_failing_gate_publishes_nothing_and_is_named(tmp_path, key, gate, capsys):
    chain = make_chain(tmp_path / "data", **SPOILED[gate])
    assert run(command(chain, key)) == 3
    told = capsys.readouterr().err
    assert f"{gate}: " in told
    assert not (chain.root / "releases").exists()
    assert [one["failed"] for one in attempts(chain)] == [[gate]]


def test_failing_evaluation_publishes_nothing(chain, key, capsys):
    asked = "policy.evaluation=[{protocol: k-NN, metric: top-1, at_least: 0.99}]"
    assert run(command(chain, key, overrides=[asked])) == 3
    assert "evaluation: k-NN top-1 k=5: interval starts at 0.65" in capsys.readouterr().err
    assert not (chain.root / "releases").exists()


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("image_manifest/verdict.json", ["chain", "manifest_verdict"]),
        ("distilled_students/vits/health.json", ["chain", "training_health"]),
        ("curated_dataset/images.bin", ["chain", "contamination"]),
        ("eval_reports/vits/report.json", ["chain", "evaluation"]),
        ("image_embeddings/run.json", ["chain", "clean_code"]),
        ("pretrained_checkpoint/record.json", ["chain"]),
    ],
)
def test_missing_evidence_publishes_nothing(chain, key, name, gates, capsys):
    (chain.root / name).unlink()
    assert run(command(chain, key)) == 3
    assert set(gates) <= set(attempts(chain)[0]["failed"])
    assert not (chain.root / "releases").exists()
    assert "nothing was signed" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["curated_dataset", ".", "release_log/vits"])
def test_output_over_what_the_release_is_made_of_changes_nothing(chain, key, output):
    before = tree(chain.root)
    with pytest.raises(ConfigError, match=r"output: .*Choose a folder of its own"):
        build_release(replace(a_request(chain, key=key), output=chain.root / output))
    assert tree(chain.root) == before


def test_release_that_a_killed_run_left_without_its_record_is_made_again(chain, key):
    release = make_release(chain.root.parent, chain=chain, key=key)
    (release.parent / "record.json").unlink()
    assert make_release(chain.root.parent, chain=chain, key=key) == release
    assert (release.parent / "record.json").is_file()


def test_command_of_the_pipeline_builds_by_shell_and_is_refused_by_shell(chain, key):
    arguments = [sys.executable, "-m", "dinov3", *command(chain, key)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    folder = chain.root / "releases" / "vits" / "release"
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder)
    before = tree(folder.parent)
    (chain.model() / "health.json").unlink()
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    assert done.returncode == 3
    assert "health.json" in done.stderr
    assert tree(folder.parent) == before


def test_waiver_lets_a_gate_through_and_stands_in_the_release(tmp_path, key):
    chain = make_chain(tmp_path / "data", committed=False)
    (chain.log / "waivers.yaml").write_text(
        "- {gate: clean_code, model: vits, version: 0.1.0, who: author, why: trial,"
        " until: 2026-11-21}\n"
    )
    release = make_release(tmp_path, chain=chain, key=key)
    checks = json.loads((release / "checks.json").read_bytes())
    gate = next(one for one in checks["gates"] if one["name"] == "clean_code")
    assert not gate["passed"]
    assert gate["waiver"] == {"who": "author", "why": "trial", "until": "2026-11-21"}
    audit = audit_release(release, Question(key=key.public))
    assert len(audit.waivers) == 1


@pytest.mark.parametrize(
    ("gate", "wishes"),
    [("contamination", {"overlap": True}), ("licences", {"licence": "who knows"})],
)
def test_what_can_never_be_waived_is_refused_in_spite_of_a_waiver(tmp_path, key, gate, wishes):
    chain = make_chain(tmp_path / "data", **wishes)
    (chain.log / "waivers.yaml").write_text(
        f"- {{gate: {gate}, model: vits, version: 0.1.0, who: a, why: b, until: 2099-01-01}}\n"
    )
    with pytest.raises(ReleaseRefused, match=f"{gate}: "):
        build_release(a_request(chain, key=key, overrides=["policy.waivable=[licences]"]))


def test_expired_waiver_is_named_in_the_refusal(tmp_path, key):
    chain = make_chain(tmp_path / "data", committed=False)
    (chain.log / "waivers.yaml").write_text(
        "- {gate: clean_code, model: vits, version: 0.1.0, who: a, why: b, until: 2020-01-01}\n"
    )
    with pytest.raises(ReleaseRefused, match="expired on 2020-01-01"):
        build_release(a_request(chain, key=key))


def test_attempts_that_were_refused_stay_in_the_count(chain, key):
    asked = ["policy.max_relative_threshold=0.5"]
    for _ in range(2):
        with pytest.raises(ReleaseRefused, match="contamination: "):
            build_release(a_request(chain, key=key, overrides=asked))
    release = build_release(a_request(chain, key=key))
    checks = json.loads((release / "checks.json").read_bytes())
    assert checks["attempts"]["count"] == 3
    assert [one["verdict"] for one in attempts(chain)] == ["refused", "refused", "passed"]


def test_equal_chain_log_and_key_give_equal_bytes(flawless, key, tmp_path):
    digests = []
    for name in ("one", "two"):
        shutil.copytree(flawless.root, tmp_path / name)
        folder = make_release(tmp_path, chain=Chain(tmp_path / name), key=key)
        digests.append(tree(folder))
    assert digests[0] == digests[1]


def test_newer_version_leaves_no_file_of_the_older(chain, key):
    older = make_release(chain.root.parent, chain=chain, key=key)
    stray = older / "stray.txt"
    stray.write_text("left over")
    newer = make_release(chain.root.parent, chain=chain, key=key, version="0.2.0")
    assert newer == older
    assert not stray.exists()
    assert audit_release(newer, Question(key=key.public)).name == "vits@0.2.0"


def test_refused_version_leaves_the_older_release_whole(chain, key):
    folder = make_release(chain.root.parent, chain=chain, key=key)
    before = tree(folder.parent)
    with pytest.raises(ReleaseRefused, match="contamination: "):
        build_release(
            a_request(chain, version="0.2.0", key=key, overrides=["policy.max_self_threshold=0.5"])
        )
    assert tree(folder.parent) == before


def test_older_published_release_is_named_as_the_previous(chain, key):
    for version, digest in (("0.1.0", "1"), ("0.10.0", "2"), ("0.9.0", "3"), ("2.0.0", "4")):
        receipt = Receipt("publish", "vits", version, digest * 64, "a", "b")
        append_receipt(chain.log, receipt, key)
    release = make_release(chain.root.parent, chain=chain, key=key, version="1.0.0")
    assert json.loads((release / "release.json").read_bytes())["previous"] == "2" * 64


def test_released_weights_open_as_the_network_they_are(tmp_path, key):
    release = make_release(tmp_path, loadable=True, key=key)
    public = key.path.with_suffix(".pub")
    backbone = hub.load(release, key=public, expect="vits@0.1.0")
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_artifact_without_heads_is_released(tmp_path, key):
    release = make_release(tmp_path, heads=False, key=key)
    assert not (release / "heads.safetensors").exists()
    tensors = json.loads((release / "release.json").read_bytes())["tensors"]
    assert list(tensors) == ["model.safetensors"]
    assert audit_release(release, Question(key=key.public)).not_checked == []


def test_outside_weights_are_declared_and_the_release_verifies(tmp_path, key):
    release = make_release(tmp_path, outside="Apache-2.0", key=key)
    roots = json.loads((release / "release.json").read_bytes())["roots"]
    assert [(root["role"], root["training_data"]) for root in roots] == [
        ("init", "unknown"),
        ("source", "listed"),
    ]
    assert (release / "licences" / "Apache-2.0.txt").is_file()
    audit = audit_release(release, Question(key=key.public))
    assert any("training data unknown" in one for one in audit.not_proven)


def test_digest_mode_keeps_the_list_of_images_back(chain, key):
    release = make_release(chain.root.parent, chain=chain, key=key, overrides=["images=digest"])
    images = chain.folder("curated_dataset") / "images.bin"
    assert not (release / "images.bin").exists()
    said = json.loads((release / "release.json").read_bytes())["images"]
    assert said == {
        "mode": "digest",
        "sha256": file_sha256(images),
        "num_trained": 8,
        "num_evaluated": 4,
    }
    assert audit_release(release, Question(key=key.public, images=images)).not_checked == []


def test_keyed_mode_reveals_no_digest_and_keeps_the_counts(chain, key):
    request = a_request(chain, key=key, overrides=["images=keyed"])
    release = build_release(replace(request, salt=SALT))
    with (
        read_images(release / "images.bin") as keyed,
        read_images(chain.folder("curated_dataset") / "images.bin") as plain,
    ):
        assert keyed.counts() == plain.counts()
        assert not {digest for digest, _ in keyed} & {digest for digest, _ in plain}
    assert SALT not in (release / "images.bin").read_bytes()
    audit_release(release, Question(key=key.public))


def test_salt_and_keyed_mode_go_together(chain, key, tmp_path):
    with pytest.raises(ConfigError, match="Give it: --images-salt FILE"):
        build_release(a_request(chain, key=key, overrides=["images=keyed"]))
    with pytest.raises(ConfigError, match="Leave --images-salt out"):
        build_release(replace(a_request(chain, key=key), salt=SALT))
    (tmp_path / "salt").write_bytes(b"short")
    with pytest.raises(ConfigError, match="shorter than 16 bytes, got 5"):
        read_salt(tmp_path / "salt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_salt(tmp_path / "nowhere")


@pytest.mark.parametrize("version", ["1", "1.0", "v1.0.0", "01.0.0", "1.0.0-rc1", "../x"])
def test_version_is_three_numbers(chain, key, version):
    with pytest.raises(StoreError, match="not MAJOR"):
        build_release(a_request(chain, version=version, key=key))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("distilled_students/vits/backbone.safetensors", "plain"),
        ("curated_dataset/images.bin", "plain"),
        ("curated_dataset/images.bin", "keyed"),
    ],
)
def test_what_changes_after_the_gates_does_not_get_in(name, mode, chain, key, monkeypatch):
    from dinov3.publish import build

    def tamper(folder, draft):
        path = chain.root / name
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        write(folder, draft)

    write = build.write_contents
    monkeypatch.setattr(build, "write_contents", tamper)
    request = a_request(chain, key=key, overrides=[f"images={mode}"])
    with pytest.raises(LineageBroken, match="changed while the release was built"):
        build_release(replace(request, salt=SALT if mode == "keyed" else None))
    assert not (chain.root / "releases" / "vits" / "release").exists()


def test_rewritten_log_of_attempts_stops_the_build(chain, key):
    build_release(a_request(chain, key=key))
    path = chain.log / "attempts.jsonl"
    path.write_text(path.read_text().replace("passed", "refused") + "{}\n")
    with pytest.raises(LineageBroken, match="Restore the log from git"):
        build_release(a_request(chain, key=key))


def test_revoked_key_signs_nothing(chain, key):
    revoke(key.fingerprint, "lost with a laptop", chain.log)
    with pytest.raises(ReleaseRefused, match=r"\(key-revoked\).*lost with a laptop"):
        build_release(a_request(chain, key=key))
    assert not (chain.root / "releases" / "vits").exists()


def test_signer_stands_beside_the_record(release, key):
    run = json.loads((release.parent / "run.json").read_bytes())
    assert run["signer"] == key.fingerprint


def test_damaged_log_of_receipts_stops_the_build(chain, key):
    (chain.log / "receipts.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="Restore the log from git"):
        build_release(a_request(chain, key=key))
