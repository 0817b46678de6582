"""Artifacts that were replaced after the release are found, and what is not there is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.release import artifacts
from dinov3.release.audit import Audit, Question, audit_release
from dinov3.release.checks import Node
from dinov3.release.record import RECORD_NAME
from dinov3.release.refusals import Refused
from tests.released import rewrite_record

STUDENT = "distilled_students/vits"
WEIGHTS = f"{STUDENT}/backbone.safetensors"


@pytest.fixture
def data(release: Path, tmp_path: Path) -> Path:
    """A copy of the artifacts the release was made of."""
    root = Path(shutil.copytree(release.parents[2], tmp_path / "data"))
    shutil.rmtree(root / "releases")
    return root


def _audit(release: Path, key: PrivateKey, data: Path) -> Audit:
    return audit_release(release, Question(key=key.public, artifacts=data))


def _link_out(data: Path) -> None:
    (data / WEIGHTS).rename(data.parent / "elsewhere")
    (data.parent / "elsewhere").write_bytes(b"evil")
    (data / WEIGHTS).symlink_to(data.parent / "elsewhere")


def _pipe(data: Path) -> None:
    (data / WEIGHTS).unlink()
    os.mkfifo(data / WEIGHTS)


def _folder(data: Path) -> None:
    (data / WEIGHTS).unlink()
    (data / WEIGHTS).mkdir()


def _edit_record(data: Path) -> None:
    record = json.loads((data / STUDENT / RECORD_NAME).read_bytes())
    record["facts"]["num_images"] = 10**6
    (data / STUDENT / RECORD_NAME).write_text(json.dumps(record))


def _pipe_for_record(data: Path) -> None:
    (data / STUDENT / RECORD_NAME).unlink()
    os.mkfifo(data / STUDENT / RECORD_NAME)


def _deep_record(data: Path) -> None:
    (data / STUDENT / RECORD_NAME).write_bytes(b"[" * 100_000)


def _second_copy(data: Path) -> None:
    """The genuine one is found first."""
    shutil.copytree(data / STUDENT, data / "a")
    (data / WEIGHTS).write_bytes(b"evil")


CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda data: (data / WEIGHTS).write_bytes(b"evil"),
    "a link that leaves": _link_out,
    "a pipe": _pipe,
    "a folder": _folder,
    "its record edited": _edit_record,
    "a pipe for its record": _pipe_for_record,
    "a record too deep": _deep_record,
    "a genuine copy beside it": _second_copy,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_replaced_artifact_is_refused(
    change: Callable[[Path], object], release: Path, key: PrivateKey, data: Path
) -> None:
    change(data)
    with pytest.raises(Refused, match="distilled_students_vits") as caught:
        _audit(release, key, data)
    assert caught.value.name == "artifact-changed"


def test_artifacts_with_nothing_of_the_chain_leave_it_undecided(
    release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    open_ends = _audit(release, key, tmp_path / "empty").not_checked
    assert len(open_ends) == 6
    assert any(one.startswith("distilled_students_vits-") for one in open_ends)


@pytest.mark.parametrize("is_link", [False, True])
def test_records_that_are_not_there_are_named(
    is_link: bool, release: Path, key: PrivateKey, data: Path
) -> None:
    (data / STUDENT).rename(data.parent / "moved")
    if is_link:
        (data / STUDENT).symlink_to(data.parent / "moved")
    audit = _audit(release, key, data)
    assert audit.not_checked == []
    assert any("distilled_students_vits-" in one for one in audit.not_proven)
    assert any("links" in one for one in audit.not_proven) == is_link


def test_artifact_made_again_since_is_told(release: Path, key: PrivateKey, data: Path) -> None:
    rewrite_record(data / STUDENT, lambda record: record["facts"].update(num_images=10**6))
    open_ends = _audit(release, key, data).not_proven
    assert any("distilled_students_vits-" in one and "another of its" in one for one in open_ends)


def test_evidence_swapped_after_it_was_hashed_is_not_believed(
    release: Path, key: PrivateKey, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artifacts._num_present

    def swap(node: Node) -> int:
        if node.folder == data / STUDENT:
            (node.folder / "health.json").write_bytes(b'{"passed":true,"metrics":{}}')
        return real(node)

    monkeypatch.setattr(artifacts, "_num_present", swap)
    with pytest.raises(Refused, match="changed after it was hashed") as caught:
        _audit(release, key, data)
    assert caught.value.name == "artifact-changed"
