"""Who signed, over what, and what was said of it since: each lie has its own name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov3.publish.keys import revoke
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.signed_log import sign_envelope
from dinov3.release.audit import Question, audit_release
from dinov3.release.files import check_sums, release_digest
from dinov3.release.record import canonical_json
from dinov3.release.refusals import Refused
from dinov3.release.revoked import REVOKED_NAME
from tests.audit.insider import sign_again, sign_payload

MODEL = "model.safetensors"


def _leave_out(statement: Any) -> None:
    resources = statement["predicate"]["resources"]
    statement["predicate"]["resources"] = [one for one in resources if one["name"] != MODEL]


def _ignore_weights(statement: Any) -> None:
    _leave_out(statement)
    statement["predicate"]["serialization"]["ignore_paths"] = [MODEL]


def _ignore_nothing(statement: Any) -> None:
    statement["predicate"]["serialization"]["ignore_paths"] = []


def _no_subject(statement: Any) -> None:
    statement["subject"] = []


def _no_resources(statement: Any) -> None:
    statement["predicate"]["resources"] = []


def _other_predicate(statement: Any) -> None:
    statement["predicateType"] = "https://slsa.dev/provenance/v1"


STATEMENTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "made with ignore_paths over the weights": (_ignore_weights, "signature-scope"),
    "made with an empty ignore list": (_ignore_nothing, "signature-scope"),
    "weights left out": (_leave_out, "signature-scope"),
    "empty subject list": (_no_subject, "signature-scope"),
    "empty list of files": (_no_resources, "signature-scope"),
    "other predicate type": (_other_predicate, "signature-type"),
}


def _refusal(folder: Path, question: Question) -> str:
    with pytest.raises(Refused, match=r".") as caught:
        audit_release(folder, question)
    return caught.value.name


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A release that may be changed."""
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.mark.parametrize(("change", "name"), STATEMENTS.values(), ids=STATEMENTS)
def test_genuine_key_over_another_statement_is_refused(
    change: Callable[[Any], None], name: str, copy: Path, key: PrivateKey
) -> None:
    sign_again(copy, key, change)
    assert _refusal(copy, Question(key=key.public)) == name


def test_other_payload_type_is_refused(copy: Path, key: PrivateKey) -> None:
    sign_payload(copy, key, canonical_json({}), "application/vnd.dinov3.publish.v1+json")
    assert _refusal(copy, Question(key=key.public)) == "signature-type"


def test_receipt_in_place_of_a_signature_is_refused(copy: Path, key: PrivateKey) -> None:
    receipt = {"kind": "publish", "model": "vits", "version": "0.1.0", "release": "0" * 64}
    (copy / "model.sig").write_bytes(sign_envelope(receipt, key))
    assert _refusal(copy, Question(key=key.public)) == "signature-invalid"


def test_signature_of_somebody_else_is_refused(copy: Path, keys: dict[str, PrivateKey]) -> None:
    sign_again(copy, keys["attacker"])
    assert _refusal(copy, Question(key=keys["publisher"].public)) == "signature-invalid"


def test_signature_replayed_from_another_release_is_refused(
    copy: Path, teacher_release: Path, key: PrivateKey
) -> None:
    shutil.copyfile(teacher_release / "model.sig", copy / "model.sig")
    assert _refusal(copy, Question(key=key.public)) == "signature-invalid"


def test_stripped_signature_is_refused_with_a_key(copy: Path, key: PrivateKey) -> None:
    (copy / "model.sig").unlink()
    assert _refusal(copy, Question(key=key.public)) == "signature-missing"


def test_revoked_key_is_refused(release: Path, key: PrivateKey, tmp_path: Path) -> None:
    revoke(key.fingerprint, "its laptop was stolen", tmp_path)
    question = Question(key=key.public, revoked=tmp_path / REVOKED_NAME)
    assert _refusal(release, question) == "key-revoked"


def test_key_that_is_not_among_the_revoked_passes(
    release: Path, keys: dict[str, PrivateKey], tmp_path: Path
) -> None:
    revoke(keys["attacker"].fingerprint, "never ours", tmp_path)
    question = Question(key=keys["publisher"].public, revoked=tmp_path / REVOKED_NAME)
    assert audit_release(release, question).not_checked == []


@pytest.mark.parametrize("expected", ["pretrained@0.1.0", "vits@0.2.0", "vits@0.1.0 "])
def test_genuine_release_under_another_name_is_refused(
    expected: str, release: Path, key: PrivateKey
) -> None:
    assert _refusal(release, Question(key=key.public, expect=expected)) == "wrong-release"


def test_release_that_its_signer_withdrew_is_refused(release: Path, key: PrivateKey) -> None:
    withdrawal = sign_envelope(_withdrawal(release), key)
    question = Question(key=key.public, withdrawals=[withdrawal])
    assert _refusal(release, question) == "withdrawn"


def test_withdrawal_by_somebody_else_is_told_and_not_believed(
    release: Path, keys: dict[str, PrivateKey]
) -> None:
    withdrawal = sign_envelope(_withdrawal(release), keys["attacker"])
    question = Question(key=keys["publisher"].public, withdrawals=[withdrawal])
    audit = audit_release(release, question)
    assert any("wrong labels" in one for one in audit.not_checked)


def test_withdrawal_of_another_release_does_not_count(release: Path, key: PrivateKey) -> None:
    other = sign_envelope({**_withdrawal(release), "version": "0.0.9"}, key)
    assert audit_release(release, Question(key=key.public, withdrawals=[other])).not_checked == []


def test_release_that_a_store_holds_with_other_bytes_is_refused(
    release: Path, key: PrivateKey
) -> None:
    question = Question(key=key.public, published={"vits@0.1.0": "0" * 64})
    assert _refusal(release, question) == "wrong-release"


def _withdrawal(release: Path) -> dict[str, str]:
    digest = release_digest(check_sums(release))
    name = json.loads((release / "release.json").read_bytes())
    said = {"kind": "withdraw", "release": digest, "reason": "wrong labels"}
    return {**said, "model": name["model"], "version": name["version"]}
