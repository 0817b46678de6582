"""The provenance statement, field by field: what made the release is named by digest."""

import datetime
import json

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

from dinov3.release.record import canonical_json, file_sha256, read_record
from tests.released import COMMIT, make_chain, make_release


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("provenance") / "data")


@pytest.fixture(scope="module")
def release(chain):
    return make_release(
        chain.root.parent, chain=chain, overrides=["policy.max_self_threshold=0.99"]
    )


@pytest.fixture(scope="module")
def found(release):
    return json.loads((release / "provenance.intoto.json").read_bytes())


def test_it_is_a_bare_statement_with_slsas_predicate(found, release):
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert found.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert (release / "provenance.intoto.json").read_bytes() == canonical_json(found)


def test_subjects_are_weights_config_and_evaluation(found, release):
    names = ["model.safetensors", "heads.safetensors", "config.json", "evals.json"]
    assert found["subject"] == [
        {"name": name, "digest": {"sha256": file_sha256(release / name)}} for name in names
    ]


def test_build_definition_says_what_was_asked_for(found, chain):
    definition = found["predicate"]["buildDefinition"]
    source = read_record(chain.folder("image_manifest") / "record.json").inputs[0]
    assert definition["buildType"] == "urn:x-dinov3:build:release:1"
    assert definition["externalParameters"] == {
        "model": "vits",
        "version": "0.1.0",
        "recipe": "smoke_cpu",
        "overrides": ["policy.max_self_threshold=0.99"],
        "source": [{"name": "folder", "sha256": source.sha256}],
    }


def test_internal_parameters_are_those_of_the_weights(found, chain, release):
    record = read_record(chain.model() / "record.json")
    policy = json.loads((release / "release.json").read_bytes())["policy_digest"]
    assert found["predicate"]["buildDefinition"]["internalParameters"] == {
        "config_digest": record.config_digest,
        "policy_digest": policy,
        "seeds": {"seed": 0},
    }


def test_dependencies_name_images_code_lock_commit_records_and_roots(found, chain, release):
    dependencies = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    digests = [(one["name"], one["digest"]) for one in dependencies]
    record = read_record(chain.model() / "record.json")
    images = file_sha256(chain.folder("curated_dataset") / "images.bin")
    assert ("images.bin", {"sha256": images}) in digests
    assert ("code", {"sha256": record.code}) in digests
    assert ("requirements.lock", {"sha256": record.environment}) in digests
    assert ("git commit", {"gitCommit": COMMIT}) in digests
    for path in (release / "records").iterdir():
        assert (f"records/{path.name}", {"sha256": file_sha256(path)}) in digests
    source = read_record(chain.folder("image_manifest") / "record.json").inputs[0]
    assert ("source: folder", {"sha256": source.sha256}) in digests
    assert len(dependencies) == 5 + len(list((release / "records").iterdir()))


def test_run_details_name_builder_record_and_times(found, chain, release):
    details = found["predicate"]["runDetails"]
    assert details["builder"] == {
        "id": "urn:x-dinov3:builder:local",
        "version": {"dinov3": "0.1.0"},
    }
    metadata = details["metadata"]
    assert metadata["invocationId"] == file_sha256(chain.model() / "record.json")
    runs = [json.loads(path.read_bytes()) for path in (release / "runs").iterdir()]
    for name, seconds in (
        ("startedOn", min(run["started"] for run in runs)),
        ("finishedOn", max(run["finished"] for run in runs)),
    ):
        moment = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
        assert metadata[name] == moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert details["byproducts"] == [
        {"name": name, "digest": {"sha256": file_sha256(release / name)}}
        for name in ("checks.json", "release.json")
    ]


def test_every_uri_is_our_own_and_names_no_host(found):
    definition = found["predicate"]["buildDefinition"]
    uris = [definition["buildType"], found["predicate"]["runDetails"]["builder"]["id"]]
    assert all(uri.startswith("urn:x-dinov3:") for uri in uris)


def test_in_totos_own_library_takes_it(found):
    statement = Statement([], found["predicateType"], found["predicate"])
    ParseDict({"subject": found["subject"]}, statement.pb)
    statement.validate()
    predicate = ParseDict(found["predicate"], Provenance())  # refuses fields it does not know
    dependencies = predicate.build_definition.resolved_dependencies
    assert len(dependencies) > 5
    for one in dependencies:
        ResourceDescriptor.copy_from_pb(one).validate()
        assert one.digest


def test_release_without_heads_has_three_subjects(tmp_path):
    release = make_release(tmp_path, heads=False)
    found = json.loads((release / "provenance.intoto.json").read_bytes())
    assert [one["name"] for one in found["subject"]] == [
        "model.safetensors",
        "config.json",
        "evals.json",
    ]


def test_commit_of_uncommitted_code_says_so(tmp_path):
    chain = make_chain(tmp_path / "data", committed=False)
    (chain.log / "waivers.yaml").write_text(
        "- {gate: clean_code, model: vits, version: 0.1.0, who: a, why: b, until: 2099-01-01}\n"
    )
    release = make_release(tmp_path, chain=chain)
    found = json.loads((release / "provenance.intoto.json").read_bytes())
    dependencies = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    (commit,) = [one for one in dependencies if one["name"] == "git commit"]
    assert commit["annotations"] == {"uncommitted_changes": True}
    run = json.loads(next((release / "runs").glob("image_manifest-*")).read_bytes())
    assert run["diff"].startswith("diff --git")
