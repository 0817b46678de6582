"""The release gates: each lets a flawless chain through and names what it stops another one for."""

import json
import os
import shutil

import pytest

from dinov3.config import resolved_policy
from dinov3.errors import DataError, LineageBroken
from dinov3.gates import judge_all, stem
from dinov3.publish.chain import gather
from dinov3.recipe import load_recipe
from dinov3.release.policy import GATES, read_policy
from dinov3.release.record import file_sha256
from tests.released import change_run, make_chain, rewrite_record

STRICT = [
    "policy.evaluation=[{protocol: k-NN, metric: top-1, k: 20, at_least: 0.5,"
    " against: random init, difference_low_at_least: 0.0}]"
]


@pytest.fixture(scope="module")
def flawless(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("flawless") / "data")


@pytest.fixture
def chain(flawless, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(flawless.root, tmp_path / "data")
    return type(flawless)(tmp_path / "data")


def judge(chain, key="vits", overrides=()):
    policy = resolved_policy(load_recipe("smoke_cpu", overrides, phase="release"))
    evidence = gather(chain.model(key), chain.report(key), chain.root, licence=policy["licence"])
    return {one.name: one for one in judge_all(evidence, read_policy(policy))}


def failed(verdicts):
    return [name for name, one in verdicts.items() if not one.passed]


def test_flawless_chains_pass_every_gate_in_the_fixed_order(flawless):
    for key in ("vits", "pretrained"):
        verdicts = judge(flawless, key, STRICT)
        assert list(verdicts) == list(GATES)
        assert failed(verdicts) == []


def test_records_stand_inputs_first_and_in_one_order(flawless):
    nodes = gather(flawless.model(), flawless.report(), flawless.root).nodes
    assert [node.record.stage for node in nodes] == [
        "image_manifest",
        "image_embeddings",
        "curated_dataset",
        "pretrained_checkpoint",
        "distilled_students_vits",
        "eval_reports_vits",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "image_embeddings/embeddings.parquet",
        "image_manifest/run.json",
        "pretrained_checkpoint/heads.safetensors",
        "pretrained_checkpoint/events.jsonl",
        "pretrained_checkpoint/snapshots/step_000000002.safetensors",
        "eval_reports/vits/report.html",
    ],
)
def test_absent_artifact_of_the_chain_is_named(chain, name):
    (chain.root / name).unlink()
    verdicts = judge(chain)
    assert "chain" in failed(verdicts)
    assert f"{name}: is not there" in verdicts["chain"].reason


def test_artifact_changed_in_place_with_its_time_restored_is_named(chain):
    path = chain.model("pretrained") / "heads.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    verdicts = judge(chain)
    assert "chain" in failed(verdicts)
    assert "heads.safetensors: changed" in verdicts["chain"].reason


def test_kinder_record_over_the_same_bytes_cuts_the_chain(chain):
    def claims_another_licence(record):
        record["licences"] = {"in": ["CC0-1.0"], "out": ["CC0-1.0"]}

    rewrite_record(chain.folder("image_manifest"), claims_another_licence)
    verdicts = judge(chain)
    assert "chain" in failed(verdicts)
    assert "was made from another record" in verdicts["chain"].reason


def test_lost_record_and_unreadable_ones_that_may_be_it_are_named(chain):
    (chain.folder("image_manifest") / "record.json").write_text("{")
    reason = judge(chain)["chain"].reason
    assert "the record of its input manifest.parquet is not there" in reason
    assert "image_manifest/record.json: not readable as JSON" in reason


def test_event_log_with_other_bytes_is_named(chain):
    path = chain.model() / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss": 8.5', b'"loss": 1.5'))
    assert "events.jsonl: changed" in judge(chain)["chain"].reason


def test_what_lies_elsewhere_below_the_artifacts_is_nobodys_business(chain):
    stranger = chain.root / "stranger"
    stranger.mkdir()
    (stranger / "record.json").write_text("{}")
    assert failed(judge(chain)) == []


@pytest.mark.parametrize("facts", [{"dirty": True}, {"commit": None, "dirty": None}])
def test_code_of_no_commit_anywhere_in_the_chain_is_named(chain, facts):
    change_run(chain.folder("image_embeddings"), **facts)
    verdicts = judge(chain)
    assert failed(verdicts) == ["clean_code"]
    assert "image_embeddings-" in verdicts["clean_code"].reason


def test_training_that_ended_ill_fails(tmp_path):
    verdicts = judge(make_chain(tmp_path / "data", healthy=False))
    assert failed(verdicts) == ["training_health"]
    assert "mean_cosine is 0.999" in verdicts["training_health"].reason


def test_training_without_a_verdict_fails(chain):
    def without_health(record):
        del record["outputs"]["health.json"]

    rewrite_record(chain.model(), without_health)
    assert "training_health" in failed(judge(chain))


def without(name):
    def change(record):
        record["inputs"] = [edge for edge in record["inputs"] if edge["role"] != name]

    return change


def entering(role):
    edge = {"role": role, "name": "outside.pth", "sha256": "1" * 64, "record": None}
    return lambda record: record["inputs"].append(edge)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda record: record.update(steps={}), "wrote weights in no steps"),
        (lambda record: record["outputs"].pop("health.json"), "wrote no health.json"),
        (without("dataset"), "on images that no curated dataset lists"),
        (lambda record: record["facts"].pop("num_images"), "trained on None images"),
        (lambda record: record["facts"].update(num_images=9), "9 images, its dataset kept 8"),
        (entering("source"), "'outside.pth' enters as source"),
        (entering("embedder"), "'outside.pth' enters as embedder"),
        (entering("backgrounds"), "'outside.pth' enters as backgrounds"),
    ],
)
def test_weights_that_nothing_accounts_for_cut_the_chain(chain, change, why):
    rewrite_record(chain.model(), change)
    verdicts = judge(chain)
    assert "chain" in failed(verdicts)
    assert f"distilled_students_vits-{stem_digits(chain)}: " in verdicts["chain"].reason
    assert why in verdicts["chain"].reason


def stem_digits(chain):
    return file_sha256(chain.model() / "record.json")[:12]


def test_report_of_more_pictures_than_are_held_out_fails(chain):
    path = chain.report() / "report.json"
    report = json.loads(path.read_bytes())
    report["dataset"]["num_held_out"] = 1000
    path.write_text(json.dumps(report))
    verdicts = judge(chain)
    assert "contamination" in failed(verdicts)
    assert "says 1000 pictures are held out" in verdicts["contamination"].reason


def test_training_on_a_dataset_that_lists_no_images_fails(chain):
    rewrite_record(
        chain.folder("curated_dataset"), lambda record: record["outputs"].pop("images.bin")
    )
    verdicts = judge(chain)
    assert "contamination" in failed(verdicts)
    assert "dataset whose images are not listed" in verdicts["contamination"].reason


def test_training_that_took_fewer_steps_fails(tmp_path):
    verdicts = judge(make_chain(tmp_path / "data", performed=4))
    assert failed(verdicts) == ["training_health"]
    assert "took 4 of 5 steps" in verdicts["training_health"].reason


def test_health_limit_of_the_policy_holds_for_every_training(flawless):
    verdicts = judge(flawless, overrides=["policy.health={max_mean_cosine: 0.2}"])
    assert failed(verdicts) == ["training_health"]
    reason = verdicts["training_health"].reason
    assert "pretrained_checkpoint" in reason
    assert "distilled_students_vits" in reason


def test_image_table_that_failed_its_expectations_fails(tmp_path):
    verdicts = judge(make_chain(tmp_path / "data", sound=False))
    assert failed(verdicts) == ["manifest_verdict"]


def test_image_table_without_a_verdict_fails(chain):
    (chain.folder("image_manifest") / "verdict.json").unlink()
    verdicts = judge(chain)
    assert failed(verdicts) == ["chain", "manifest_verdict"]


def test_interval_that_reaches_below_the_threshold_fails(tmp_path):
    chain = make_chain(tmp_path / "data", accuracy=0.55)
    assert failed(judge(chain, overrides=STRICT)) == ["evaluation"]
    assert failed(judge(chain)) == []


def test_threshold_on_a_row_the_report_lacks_fails(flawless):
    asked = "policy.evaluation=[{protocol: segmentation, metric: mIoU, at_least: 0.0}]"
    verdicts = judge(flawless, overrides=[asked])
    assert failed(verdicts) == ["evaluation"]
    assert "no such row" in verdicts["evaluation"].reason


def test_report_of_other_weights_fails(flawless):
    policy = read_policy(resolved_policy(load_recipe("smoke_cpu", phase="release")))
    evidence = gather(flawless.model("vits"), flawless.report("pretrained"), flawless.root)
    verdicts = {one.name: one for one in judge_all(evidence, policy)}
    assert "evaluation" in failed(verdicts)
    assert "of other weights" in verdicts["evaluation"].reason


def test_image_that_was_trained_and_evaluated_on_fails(tmp_path):
    verdicts = judge(make_chain(tmp_path / "data", overlap=True))
    assert failed(verdicts) == ["contamination"]
    assert verdicts["contamination"].result["num_overlap"] == 1


def test_looser_deduplication_than_the_policys_fails(flawless):
    verdicts = judge(flawless, overrides=["policy.max_relative_threshold=0.9"])
    assert failed(verdicts) == ["contamination"]
    assert "relative_threshold is 0.977" in verdicts["contamination"].reason


def test_damaged_list_of_images_fails(chain):
    path = chain.folder("curated_dataset") / "images.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert {"chain", "contamination"} <= set(failed(judge(chain)))


def test_below_outside_weights_contamination_is_unknown(tmp_path):
    chain = make_chain(tmp_path / "data", outside="Apache-2.0")
    verdicts = judge(chain)
    assert failed(verdicts) == []
    assert verdicts["contamination"].result["contamination"] == "unknown"
    assert verdicts["evaluation"].result["contamination"] == "unknown"


def test_report_that_claims_to_know_better_below_outside_weights_fails(tmp_path):
    chain = make_chain(tmp_path / "data", outside="Apache-2.0")
    path = chain.report() / "report.json"
    report = json.loads(path.read_bytes())
    report["dataset"]["contamination"] = "none"
    path.write_text(json.dumps(report))
    assert "evaluation" in failed(judge(chain))


@pytest.mark.parametrize("licence", ["unknown", "CC-BY-NC-4.0", "LicenseRef-AllRightsReserved"])
def test_licence_that_is_unknown_or_does_not_suit_fails(tmp_path, licence):
    verdicts = judge(make_chain(tmp_path / "data", licence=licence))
    assert failed(verdicts) == ["licences"]
    assert licence in verdicts["licences"].reason


def test_licence_without_its_text_fails_until_a_folder_has_it(tmp_path):
    chain = make_chain(tmp_path / "data", licence="CC-BY-4.0")
    policy = resolved_policy(load_recipe("smoke_cpu", phase="release"))
    ends = (chain.model(), chain.report(), chain.root)

    def licences(texts):
        evidence = gather(*ends, licence=policy["licence"], texts=(texts,))
        return judge_all(evidence, read_policy(policy))[-1]

    assert licences(None).reason == "CC-BY-4.0: no text of this licence"
    (tmp_path / "CC-BY-4.0.txt").write_text("Attribution 4.0 International\n")
    assert licences(tmp_path).passed


def test_every_gate_says_why_it_failed(tmp_path):
    chain = make_chain(
        tmp_path / "data", committed=False, healthy=False, sound=False, overlap=True, licence="?"
    )
    verdicts = judge(chain, overrides=[STRICT[0].replace("0.5", "0.9")])
    assert failed(verdicts) == list(GATES[1:])
    assert all(one.reason for one in verdicts.values() if not one.passed)


def test_folder_without_a_record_is_refused(chain, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no record there"):
        gather(tmp_path / "empty", chain.report(), chain.root)
    with pytest.raises(DataError, match="no such folder"):
        gather(chain.model(), chain.report(), tmp_path / "nowhere")
    (chain.model() / "record.json").write_text("{")
    with pytest.raises(LineageBroken, match="not readable as JSON"):
        gather(chain.model(), chain.report(), chain.root)


def test_copy_with_the_files_is_preferred_to_a_bare_record(chain):
    bare = chain.root / "a_bare_copy"
    bare.mkdir()
    shutil.copyfile(chain.folder("image_manifest") / "record.json", bare / "record.json")
    assert failed(judge(chain)) == []


def test_names_of_records_are_stage_and_digest(flawless):
    final = gather(flawless.model(), flawless.report(), flawless.root).final
    assert stem(final) == f"distilled_students_vits-{final.digest[:12]}"
