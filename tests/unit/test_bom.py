"""The bill of materials: strictly valid, equal to evals.json, equal bytes for equal releases."""

import json
import uuid
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from dinov3.release.record import canonical_json, file_sha256
from tests.released import LICENCE, make_chain, make_release

HOSTILE = '"}<script>alert(1)</script>\u202e\n- [x](http://evil.example)'


def read(release):
    return json.loads((release / "mlbom.cdx.json").read_bytes())


def parts(bom):
    return {one["bom-ref"]: one for one in bom["components"]}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("bom") / "data")


@pytest.fixture(scope="module")
def release(chain):
    return make_release(chain.root.parent, chain=chain)


@pytest.fixture(scope="module")
def bom(release):
    return read(release)


def test_strict_validator_of_cyclonedx_takes_it(release):
    text = (release / "mlbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_strict_validator_would_refuse_a_field_it_does_not_know(bom):
    bom = {**bom, "metadata": {**bom["metadata"], "unknown": 1}}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is not None


def test_component_is_the_model_with_licence_and_hash(bom, release):
    component = bom["metadata"]["component"]
    assert component["type"] == "machine-learning-model"
    assert (component["name"], component["version"]) == ("vits", "0.1.0")
    assert component["licenses"] == [{"expression": LICENCE}]
    weights = file_sha256(release / "model.safetensors")
    assert component["hashes"] == [{"alg": "SHA-256", "content": weights}]


def test_metrics_are_those_of_the_evaluation_row_by_row(bom, release):
    rows = json.loads((release / "evals.json").read_bytes(), parse_float=Decimal)["rows"]
    card = bom["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert len(metrics) == len(rows) > 8
    for row, metric in zip(rows, metrics, strict=True):
        interval = metric["confidenceInterval"]
        found = [metric["value"], interval["lowerBound"], interval["upperBound"]]
        assert [Decimal(one) for one in found] == [row["value"], row["low"], row["high"]]
        assert metric["type"] == f"{row['protocol']} {row['metric']}"
        assert f"subject: {row['subject']}" in metric["slice"]
        assert ("k" in row) == (f"k: {row.get('k')}" in metric["slice"])


def test_training_data_is_named_by_digest_and_licence(bom, chain):
    images = parts(bom)["data:images"]
    digest = file_sha256(chain.folder("curated_dataset") / "images.bin")
    assert images["type"] == "data"
    assert images["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert images["licenses"] == [{"expression": LICENCE}]
    parameters = bom["metadata"]["component"]["modelCard"]["modelParameters"]
    assert parameters["datasets"] == [{"ref": "data:images"}]
    assert parts(bom)["data:source:0"]["name"] == "folder"


def test_libraries_are_those_of_the_lock(bom):
    torch = next(one for one in bom["components"] if one["name"] == "torch")
    assert torch["type"] == "library"
    assert torch["bom-ref"] == f"pypi:torch@{torch['version']}"


def test_considerations_are_the_cards(bom):
    considerations = bom["metadata"]["component"]["modelCard"]["considerations"]
    assert considerations == {
        "useCases": ["Testing."],
        "technicalLimitations": ["It learned nothing."],
    }


def test_equal_releases_have_equal_bytes_and_others_another_serial(release, tmp_path):
    data = (release / "mlbom.cdx.json").read_bytes()
    assert data == canonical_json(read(release))
    again = make_release(tmp_path / "again")
    assert (again / "mlbom.cdx.json").read_bytes() == data
    other = make_release(tmp_path / "other", version="0.1.1")
    assert read_serial((other / "mlbom.cdx.json").read_bytes()) != read_serial(data)
    assert uuid.UUID(read_serial(data)).version == 5


def read_serial(data):
    return json.loads(data)["serialNumber"]


def test_time_is_that_of_the_chain_not_of_the_build(bom, release):
    runs = [json.loads(path.read_bytes()) for path in (release / "runs").iterdir()]
    seconds = int(max(run["finished"] for run in runs))
    assert bom["metadata"]["timestamp"] == datetime.fromtimestamp(seconds, UTC).isoformat()


def test_references_stand_once_and_lead_somewhere(bom):
    references = [*parts(bom), bom["metadata"]["component"]["bom-ref"]]
    assert len(set(references)) == len(references) == len(bom["components"]) + 1
    for one in bom["dependencies"]:
        assert {one["ref"], *one.get("dependsOn", [])} <= set(references)


def test_outside_weights_are_a_component_of_unknown_training_data(tmp_path):
    bom = read(make_release(tmp_path, outside="Apache-2.0"))
    outside = parts(bom)["weights:init:0"]
    assert outside["type"] == "machine-learning-model"
    assert outside["licenses"] == [{"expression": "Apache-2.0"}]
    considerations = bom["metadata"]["component"]["modelCard"]["considerations"]
    assert "Training data of outside.pth: unknown." in considerations["technicalLimitations"]


def test_hostile_words_stay_text_and_the_bill_valid(tmp_path):
    summary = json.dumps(HOSTILE)
    release = make_release(tmp_path, word=HOSTILE, overrides=[f"card.summary={summary}"])
    text = (release / "mlbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert read(release)["metadata"]["component"]["description"] == HOSTILE
