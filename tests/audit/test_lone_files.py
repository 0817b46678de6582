"""A lone file is judged by the releases that hold it, whatever lies beside them."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.publish.publishing import audit_store
from dinov3.publish.releases import listing
from dinov3.publish.signed_log import sign_envelope
from dinov3.publish.store import Store, open_store
from dinov3.release import verification
from dinov3.release.audit import Question, audit_release
from dinov3.release.files import SUMS_NAME
from dinov3.release.lone_file import find_releases
from dinov3.release.verify import main
from tests.audit.changes import all_of, in_json
from tests.audit.insider import forge
from tests.released import make_chain, make_release

DIGEST_ONLY = all_of(
    lambda folder: (folder / "images.bin").unlink(),
    in_json("release.json", lambda content: content["images"].update(mode="digest")),
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey) -> Path:
    """A folder with two genuine releases of the same weights, 0.1.0 and 0.2.0."""
    base = tmp_path_factory.mktemp("two")
    chain = make_chain(base / "data")
    found = base / "found"
    for version in ("0.1.0", "0.2.0"):
        made = make_release(base, version=version, key=key, chain=chain)
        shutil.copytree(made, found / version)
    return found


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    """Both, to be tampered with."""
    return Path(shutil.copytree(two, tmp_path / "found"))


@pytest.fixture
def lone(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(two / "0.1.0" / "model.safetensors", tmp_path / "w.safetensors"))


@pytest.fixture
def ask(key: PrivateKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on a file; answers with what it found."""
    public = tmp_path / "publisher.pub"
    public.write_bytes(key.public)

    def run(path: Path, *options: str | Path, store: Store | None = None) -> dict[str, Any]:
        more = [] if store is None else ["--store", "any"]
        arguments = [str(one) for one in (path, "--key", public, "--format", "json", *options)]
        opener = None if store is None else lambda _: store
        code = main([*arguments, *more], open_store=opener)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["exit"] == code
        return found

    return run


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_weights_of_two_releases_are_of_either(
    version: str, folder: Path, lone: Path, ask: Any
) -> None:
    found = ask(lone, "--artifacts", folder, "--expect", f"vits@{version}")
    assert (found["verdict"], found["file"]["releases"]) == ("verified", [f"vits@{version}"])


def test_weights_of_other_releases_than_expected_are_refused(
    folder: Path, lone: Path, ask: Any
) -> None:
    refusal = ask(lone, "--artifacts", folder, "--expect", "vits@0.3.0")["refusal"]
    assert refusal["name"] == "wrong-release"
    assert "vits@0.1.0, vits@0.2.0" in refusal["why"]


@pytest.mark.parametrize("damaged", ["0.1.0", "0.2.0"])
@pytest.mark.parametrize("name", ["README.md", SUMS_NAME])
def test_damaged_neighbour_does_not_refuse_a_genuine_file(
    damaged: str, name: str, folder: Path, lone: Path, ask: Any
) -> None:
    (folder / damaged / name).write_text("x")
    found = ask(lone, "--artifacts", folder)
    assert found["verdict"] == "verified"
    assert any("changed" in one or SUMS_NAME in one for one in found["not_proven"])


def test_bytes_of_one_release_are_not_called_another_container_of_the_next(
    two: Path, key: PrivateKey, tmp_path: Path, lone: Path, ask: Any
) -> None:
    root = tmp_path / "releases"
    shutil.copytree(two / "0.1.0", root / "a")
    other = forge(two / "0.2.0", root / "b", _in_other_order, key, settled=True)
    assert (other / "model.safetensors").read_bytes() != lone.read_bytes()
    found = ask(lone, "--artifacts", root)
    assert found["file"]["releases"] == ["vits@0.1.0", "vits@0.2.0"]
    assert found["file"]["same_tensors_only"] is False
    found = ask(lone, "--artifacts", root, "--expect", "vits@0.2.0")
    assert found["file"]["same_tensors_only"] is True


def _in_other_order(folder: Path) -> None:
    """The same tensors, named in another order: other bytes, as many."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = reversed(json.loads(data[8:end]).items())
    header = json.dumps(dict(entries), separators=(",", ":")).encode()
    path.write_bytes(data[:8] + header.ljust(end - 8) + data[end:])


def test_file_of_damaged_releases_alone_is_refused(folder: Path, lone: Path, ask: Any) -> None:
    for version in ("0.1.0", "0.2.0"):
        (folder / version / "README.md").write_text("x")
    assert ask(lone, "--artifacts", folder)["refusal"]["name"] == "file-changed"


@pytest.mark.parametrize("first", ["a", "z"])
def test_what_one_release_leaves_open_is_said_in_any_order(
    first: str, two: Path, lone: Path, key: PrivateKey, tmp_path: Path, ask: Any
) -> None:
    root = tmp_path / "releases"
    shutil.copytree(two / "0.1.0", root / "m")
    thin = forge(two / "0.1.0", root / first, DIGEST_ONLY, key, settled=True)
    assert audit_release(thin, Question(key=key.public)).not_checked
    found = ask(lone, "--artifacts", root, "--expect", "vits@0.1.0")
    assert (found["verdict"], found["not_checked"]) == ("verified", [])
    assert any("no image was trained and evaluated on" in one for one in found["not_proven"])
    shutil.rmtree(root / "m")
    assert ask(lone, "--artifacts", root)["verdict"] == "undecided"


def test_release_swapped_after_the_search_does_not_vouch_for_the_file(
    folder: Path, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "evil.safetensors"
    data = bytearray((folder / "0.1.0" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    evil.write_bytes(bytes(data))
    genuine = folder / "0.1.0"

    @contextlib.contextmanager
    def swapped(*arguments: Any) -> Iterator[Any]:
        with find_releases(*arguments) as found:
            found.folders.append(genuine)
            yield found

    monkeypatch.setattr(verification, "find_releases", swapped)
    refusal = ask(evil, "--artifacts", folder)["refusal"]
    assert (refusal["name"], refusal["where"]) == ("file-changed", "evil.safetensors")


@pytest.fixture
def store(two: Path, key: PrivateKey, tmp_path: Path) -> Store:
    found = open_store(f"directory:{tmp_path / 'store'}")
    for version in ("0.1.0", "0.2.0"):
        found.publish(two / version, log=tmp_path / "log", key=key)
    return found


def _object(tmp_path: Path, store: Store, version: str) -> Path:
    (digest,) = (one.digest for one in store.entries() if one.version == version)
    return tmp_path / "store" / "objects" / digest


def test_damage_in_a_store_is_named(store: Store, lone: Path, ask: Any, tmp_path: Path) -> None:
    for version in ("0.1.0", "0.2.0"):
        os.truncate(_object(tmp_path, store, version) / SUMS_NAME, 1 << 40)
    found = ask(lone, store=store)
    assert found["verdict"] == "undecided"
    assert "vits@0.1.0 in the store: SHA256SUMS: larger than" in found["fault"]


def test_one_damaged_release_in_a_store_leaves_the_other(
    store: Store, lone: Path, ask: Any, tmp_path: Path
) -> None:
    (_object(tmp_path, store, "0.1.0") / "config.json").write_bytes(b"{}")
    found = ask(lone, store=store)
    assert (found["verdict"], found["file"]["releases"]) == ("verified", ["vits@0.2.0"])
    assert any("vits@0.1.0 in the store" in one for one in found["not_proven"])


@pytest.mark.parametrize("is_pipe", [False, True])
def test_garbage_withdrawal_holds_up_its_own_release_alone(
    is_pipe: bool, store: Store, two: Path, key: PrivateKey, ask: Any, tmp_path: Path
) -> None:
    place = tmp_path / "store" / "withdrawals" / "vits@0.1.0.json"
    if is_pipe:
        os.mkfifo(place)
    else:
        place.write_bytes(b"{}")
    states = [line.split("  ")[2:] for line in listing(store.entries())]
    assert [len(one) for one in states] == [1, 0]
    assert ask(two / "0.2.0", store=store)["verdict"] == "verified"
    found = ask(two / "0.1.0", store=store)
    assert found["verdict"] == "undecided"
    assert any("whether it was withdrawn" in one for one in found["not_checked"])
    findings = audit_store(store, log=tmp_path / "log", keys=[key.public])
    assert any("vits@0.1.0: a withdrawal that says nothing" in one for one in findings)


def test_garbage_beside_the_withdrawals_holds_up_nobody(
    store: Store, two: Path, key: PrivateKey, ask: Any, tmp_path: Path
) -> None:
    (tmp_path / "store" / "withdrawals" / "more.json").write_bytes(b"\xff")
    assert ask(two / "0.1.0", store=store)["verdict"] == "verified"
    findings = audit_store(store, log=tmp_path / "log", keys=[key.public])
    assert any("more.json: withdraws nothing" in one for one in findings)


def test_withdrawal_in_the_place_of_another_is_told(
    store: Store, two: Path, key: PrivateKey, ask: Any, tmp_path: Path
) -> None:
    first, second = store.entries()
    said = {"kind": "withdraw", "model": "vits", "version": "0.2.0", "release": second.digest}
    envelope = sign_envelope({**said, "reason": "wrong labels"}, key)
    (tmp_path / "store" / "withdrawals" / f"{first.name}.json").write_bytes(envelope)
    assert ask(two / "0.1.0", store=store)["verdict"] == "undecided"
    assert ask(two / "0.2.0", store=store)["refusal"]["name"] == "withdrawn"
