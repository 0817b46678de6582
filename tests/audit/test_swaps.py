"""Files that are swapped while they are judged: what is believed is what was hashed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.release import binding
from dinov3.release.audit import Question, audit_release
from dinov3.release.images import ROLE_EVALUATED, ROLE_TRAINED, read_images, write_images
from dinov3.release.refusals import Refused
from tests.audit.changes import in_images
from tests.audit.insider import forge


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "release"))


def _refusal(folder: Path, key: PrivateKey) -> tuple[str, str]:
    with pytest.raises(Refused, match=r".") as caught:
        audit_release(folder, Question(key=key.public))
    return caught.value.name, caught.value.where


def _before(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, act: Callable[..., None]
) -> None:
    """Runs the attacker the moment a function is entered."""
    real = getattr(place, name)

    def hooked(*arguments: Any, **options: Any) -> Any:
        act(*arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, hooked)


def _after(monkeypatch: pytest.MonkeyPatch, name: str, wanted: Callable[[Path], bool]) -> None:
    """Puts a pipe in the place of a file the moment `Path` has told that it is one."""
    real = getattr(Path, name)

    def hooked(path: Path, *arguments: Any, **options: Any) -> Any:
        answer = real(path, *arguments, **options)
        if wanted(path) and path.suffix and not path.is_fifo():
            path.unlink()
            os.mkfifo(path)
        return answer

    monkeypatch.setattr(Path, name, hooked)


def test_list_of_images_swapped_after_it_was_hashed_is_not_counted(
    copy: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(path: Path) -> None:
        with read_images(path) as images:
            rows, roles = list(images), images.roles
        other = [(bytes([one[0] ^ 1]) + one[1:], role) for one, role in rows]
        path.unlink()
        write_images(path, other, roles)

    _before(monkeypatch, binding, "read_images", swap)
    assert _refusal(copy, key) == ("file-changed", "images.bin")


def test_cleaned_list_of_images_does_not_hide_the_signed_one(
    release: Path, key: PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was signed has a picture of both kinds; for the count a clean list is put there."""

    def overlap(rows: list[tuple[bytes, int]]) -> None:
        rows.append((next(one for one, role in rows if role == ROLE_TRAINED), ROLE_EVALUATED))

    forged = forge(release, tmp_path / "release", in_images(overlap), key, settled=True)

    def clean(path: Path) -> None:
        shutil.copyfile(release / "images.bin", path)

    _before(monkeypatch, binding, "read_images", clean)
    assert _refusal(forged, key) == ("file-changed", "images.bin")


def test_signature_swapped_for_a_pipe_is_not_waited_for(
    copy: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    _after(monkeypatch, "lstat", lambda path: path == copy / "model.sig")
    assert audit_release(copy, Question(key=key.public)).not_checked == []


def test_record_swapped_for_a_pipe_is_not_waited_for(
    copy: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    _after(monkeypatch, "is_file", lambda path: path.parent == copy / "records")
    assert audit_release(copy, Question(key=key.public)).not_checked == []


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors", "images.bin"])
@pytest.mark.parametrize("has_key", [False, True])
def test_file_larger_than_any_record_speaks_of_is_refused_unread(
    name: str, has_key: bool, copy: Path, key: PrivateKey
) -> None:
    os.truncate(copy / name, 1 << 42)
    with pytest.raises(Refused, match="larger than anything the records speak of") as caught:
        audit_release(copy, Question(key=key.public if has_key else None))
    assert (caught.value.name, caught.value.where) == ("file-changed", name)


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("release.json", "file-changed"),
        ("README.md", "file-changed"),
        ("SHA256SUMS", "file-changed"),
        ("model.sig", "signature-invalid"),
    ],
)
def test_document_larger_than_any_is_refused_unread(
    name: str, refusal: str, copy: Path, key: PrivateKey
) -> None:
    os.truncate(copy / name, 1 << 42)
    assert _refusal(copy, key) == (refusal, name)


def test_log_larger_than_any_is_refused_unread(copy: Path, key: PrivateKey) -> None:
    path = next((copy / "events").iterdir())
    os.truncate(path, 1 << 42)
    assert _refusal(copy, key) == ("file-changed", f"events/{path.name}")


def test_documents_that_are_too_much_together_are_refused_unread(
    copy: Path, key: PrivateKey
) -> None:
    for path in (*(copy / "records").iterdir(), *(copy / "runs").iterdir()):
        os.truncate(path, 15 << 20)
    with pytest.raises(Refused, match="bytes in all") as caught:
        audit_release(copy, Question(key=key.public))
    assert caught.value.name == "file-changed"
