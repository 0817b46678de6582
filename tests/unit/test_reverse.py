"""From the roots down: who used a teacher, a dataset, a picture, a licence, a version."""

import json
import shutil
from dataclasses import replace

import pytest

from dinov3.publish.build import build_release
from dinov3.release.record import canonical_json, file_sha256
from tests import traced
from tests.released import a_request, change_run, make_chain, rewrite_record
from tests.traced import (
    EVALUATED,
    EXCLUDED,
    TRAINED,
    WHOLE_CHAIN,
    WHY,
    facts,
    used_by,
)

written, base, ask = traced.written, traced.base, traced.ask  # fixtures


def test_teacher_leads_to_its_students_and_their_releases(base, ask):
    code, found = ask(base / "data" / "pretrained_checkpoint", "--reverse", store=True)
    assert code == 0
    assert {
        "distilled_students_vits",
        "eval_reports_vits",
        "eval_reports_pretrained",
        "release pretrained@0.1.0",
        "release vits@0.1.0",
    } <= used_by(found)
    assert "curated_dataset" not in used_by(found)
    assert facts(found, "used by release vits@0.1.0")["withdrawn"] == WHY
    assert facts(found, "used by release pretrained@0.1.0")["withdrawn"] is None
    assert facts(found, "used by eval_reports_vits")["how"] == "through distilled_students_vits"


@pytest.mark.parametrize("store", [False, True])
def test_released_weights_lead_to_their_release(base, ask, store):
    path = base / "data" / "releases" / "vits" / "release" / "model.safetensors"
    _, found = ask(path, "--reverse", root="nowhere" if store else "data", store=store)
    assert facts(found, "used by release vits@0.1.0")["how"] == "same bytes as model.safetensors"
    assert "release pretrained@0.1.0" not in used_by(found)


@pytest.mark.parametrize("form", ["file", "digest", "name"])
def test_dataset_leads_to_all_that_was_made_of_it(base, ask, form):
    record = json.loads((base / "data" / "image_manifest" / "record.json").read_bytes())
    (root,) = record["inputs"]
    target = {
        "file": base / "data" / "image_manifest" / "manifest.parquet",
        "digest": root["sha256"],
        "name": root["name"],
    }[form]
    code, found = ask(target, "--reverse")
    assert code == 0
    assert (WHOLE_CHAIN - {"image_manifest"}) | {"release vits@0.1.0"} <= used_by(found)


@pytest.mark.parametrize(
    ("digest", "users", "others"),
    [
        (
            TRAINED,
            {"pretrained_checkpoint", "eval_reports_vits", "release vits@0.1.0"},
            {"image_manifest"},
        ),
        (
            EVALUATED,
            {"eval_reports_vits", "release vits@0.1.0"},
            {"pretrained_checkpoint", "distilled_students_vits"},
        ),
        (EXCLUDED, {"release vits@0.1.0"}, {"pretrained_checkpoint", "eval_reports_vits"}),
    ],
)
def test_picture_leads_to_who_trained_or_evaluated_on_it(ask, digest, users, others):
    code, found = ask(digest, "--reverse", store=True)
    assert code == 0
    assert users <= used_by(found)
    assert not others & used_by(found)


def test_release_says_in_which_role_it_used_a_picture(ask):
    _, found = ask(EXCLUDED, "--reverse", root="nowhere", store=True)
    assert facts(found, "used by release vits@0.1.0")["how"] == "excluded: exact duplicate"


@pytest.mark.parametrize("mode", ["digest", "keyed"])
def test_release_that_does_not_publish_its_pictures_says_so(base, ask, mode):
    chain = make_chain(base / "private")
    request = a_request(chain, "vits", "0.2.0", None, [f"images={mode}"])
    build_release(replace(request, salt=b"s" * 32 if mode == "keyed" else None))
    shutil.rmtree(base / "private" / "curated_dataset")
    code, found = ask(TRAINED, "--reverse", root="private")
    assert code == 2
    assert any("list of pictures is" in said for said in found["unchecked"])


def test_licence_leads_to_all_that_carry_it(ask):
    code, found = ask("GPL-2.0-or-later", "--reverse", store=True)
    assert code == 0
    assert WHOLE_CHAIN | {"release vits@0.1.0", "release pretrained@0.1.0"} <= used_by(found)


@pytest.mark.parametrize("asked", ["GPL-2.0-or-later", "gpl-2.0+"])
def test_licence_is_found_in_every_spelling(base, ask, asked):
    make_chain(base / "other", licence="GPL-2.0+")
    code, found = ask(asked, "--reverse", root="other")
    assert code == 0
    assert used_by(found) >= WHOLE_CHAIN


def test_licence_of_a_release_leads_to_it_though_its_inputs_have_another(base, ask):
    chain = make_chain(base / "other")
    build_release(a_request(chain, "vits", "0.2.0", None, ["policy.licence=GPL-3.0-only"]))
    code, found = ask("GPL-3.0-only", "--reverse", root="other")
    assert code == 0
    assert used_by(found) == {"unsigned release vits@0.2.0"}


def test_release_has_the_same_users_by_its_digest_as_by_its_name(ask):
    _, by_name = ask("pretrained@0.1.0", "--reverse", store=True)
    release = facts(by_name, "used by release pretrained@0.1.0")["release digest"]
    _, by_digest = ask(release, "--reverse", store=True)
    assert "distilled_students_vits" in used_by(by_digest)
    assert used_by(by_digest) == used_by(by_name)


@pytest.mark.parametrize("target", ["MIT", "GPL", "f" * 64, "vits@9.9.9", "no/such/path"])
def test_what_nothing_names_exits_with_2(ask, target):
    code, found = ask(target, "--reverse")
    assert code == 2
    assert "no record below" in found["unchecked"][0]


def test_version_is_told_by_run_or_by_the_lock_at_hand(base, ask):
    """Of the others it is said that they do not tell."""
    change_run(base / "data" / "pretrained_checkpoint", versions={"thing": "2.15.0+cpu"})
    change_run(base / "data" / "image_manifest", versions={"thing": "2.14"})
    code, found = ask("thing==2.15.0", "--reverse")
    assert code == 2
    assert "pretrained_checkpoint" in used_by(found)
    assert "image_manifest" not in used_by(found)
    assert facts(found, "versions of thing") == {"2.14": "1 records", "2.15.0+cpu": "1 records"}
    assert any("neither run.json nor" in said for said in found["unchecked"])
    record = json.loads((base / "data" / "image_manifest" / "record.json").read_bytes())
    lock = base / "requirements.lock"
    lock.write_text("thing==2.15.0 \\\n    --hash=sha256:00\n")
    for path in (base / "data").rglob("record.json"):
        value = json.loads(path.read_bytes())
        value["environment"] = file_sha256(lock)
        path.write_bytes(canonical_json(value))
    assert record["environment"] != file_sha256(lock)
    _, found = ask("thing==2.15", "--reverse")
    assert "curated_dataset" in used_by(found)


def test_environment_digest_leads_to_its_records(base, ask):
    record = json.loads((base / "data" / "image_manifest" / "record.json").read_bytes())
    code, found = ask(record["environment"], "--reverse")
    assert code == 0
    assert used_by(found) >= WHOLE_CHAIN


@pytest.mark.parametrize("form", ["record_alone", "copy_without_files"])
def test_picture_is_told_though_its_list_lies_elsewhere_than_its_first_record(base, ask, form):
    """A record without its files hides neither those beside its copy nor those of a release."""
    curated = base / "data" / "curated_dataset"
    if form == "record_alone":
        for name in ("images.bin", "curated.parquet"):
            (curated / name).unlink()
    else:
        (base / "data" / "a_copy").mkdir()
        shutil.copy(curated / "record.json", base / "data" / "a_copy")
    code, found = ask(TRAINED, "--reverse")
    assert (code, found["wrong"]) == (0, [])
    assert facts(found, "used by release vits@0.1.0")["how"] == "trained"
    assert "distilled_students_vits" in used_by(found)


def test_picture_leads_through_every_record_of_the_same_list(base, ask):
    """Curated again by other code, to the same bytes."""
    shutil.rmtree(base / "data" / "releases")
    for stage in ("curated_dataset", "pretrained_checkpoint"):
        shutil.copytree(base / "data" / stage, base / "data" / f"second_{stage}")
    curated, pretrained = (
        base / "data" / f"second_{stage}" for stage in ("curated_dataset", "pretrained_checkpoint")
    )
    rewrite_record(curated, lambda record: record.update(code="1" * 64))

    def read_the_second(record):
        record["stage"] = "second_pretrained"
        for edge in record["inputs"]:
            if edge["role"] == "dataset":
                edge["record"] = file_sha256(curated / "record.json")

    rewrite_record(pretrained, read_the_second)
    _, found = ask(TRAINED, "--reverse")
    assert {"pretrained_checkpoint", "second_pretrained"} <= used_by(found)


def test_damaged_run_in_a_store_is_named_and_hides_no_other_version(base, ask):
    for path in (base / "store").rglob("runs/image_manifest-*.json"):
        path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    code, found = ask("python==3.11", "--reverse", root="nowhere", store=True)
    assert code == 1
    assert all("runs/image_manifest-" in said for said in found["wrong"])
    assert "release vits@0.1.0" in used_by(found)
