"""Seeded tampering over every file of a release: always a refusal with a listed name."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.release.audit import Question, audit_release
from dinov3.release.refusals import REFUSALS, Refused

FLIPS = 12  # per file
SEED = 20261121


@pytest.fixture(scope="module")
def files(release: Path) -> list[str]:
    """Every file of a release, list and signature too."""
    paths = [path for path in sorted(release.rglob("*")) if path.is_file()]
    return [path.relative_to(release).as_posix() for path in paths]


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A release that may be changed."""
    return Path(shutil.copytree(release, tmp_path / "release"))


def _tampered(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Flipped bits, and other lengths."""
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        yield (
            f"bit {bit} of byte {place}",
            (data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]),
        )
    yield "cut by one", data[:-1]
    yield "cut to a half", data[: len(data) // 2]
    yield "emptied", b""
    yield "one byte more", data + b"\0"
    yield "one line more", data + b"\n"
    yield "doubled", data + data


def _refusal(folder: Path, key: PrivateKey, what: str) -> str:
    try:
        audit_release(folder, Question(key=key.public))
    except Refused as refused:
        return refused.name
    pytest.fail(f"{what}: verified")


def test_every_change_of_every_file_is_refused_by_a_listed_name(
    copy: Path, files: list[str], key: PrivateKey
) -> None:
    rng = random.Random(SEED)
    count = 0
    for name in files:
        data = (copy / name).read_bytes()
        for what, tampered in _tampered(data, rng):
            (copy / name).write_bytes(tampered)
            assert _refusal(copy, key, f"{name}: {what}") in REFUSALS
            count += 1
        (copy / name).write_bytes(data)
    assert count == len(files) * (FLIPS + 6)
    assert audit_release(copy, Question(key=key.public)).not_checked == []


def test_every_renamed_removed_or_doubled_file_is_refused(
    copy: Path, files: list[str], key: PrivateKey
) -> None:
    for name in files:
        path = copy / name
        other = path.with_name(f"{path.name}.bak")
        path.rename(other)
        assert _refusal(copy, key, f"{name} renamed") in {"file-missing", "file-unlisted"}
        shutil.copyfile(other, path)
        assert _refusal(copy, key, f"{name} doubled") == "file-unlisted"
        other.unlink()


def test_every_two_files_swapped_are_refused(copy: Path, files: list[str], key: PrivateKey) -> None:
    rng = random.Random(SEED)
    others = files[:]
    rng.shuffle(others)
    for first, second in zip(files, others, strict=True):
        one, two = (copy / first).read_bytes(), (copy / second).read_bytes()
        if one == two:
            continue
        (copy / first).write_bytes(two)
        (copy / second).write_bytes(one)
        assert _refusal(copy, key, f"{first} and {second} swapped") in REFUSALS
        (copy / first).write_bytes(one)
        (copy / second).write_bytes(two)
