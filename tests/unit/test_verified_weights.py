"""A release is loaded, exported and evaluated: from the very bytes that were verified."""

import shutil
from pathlib import Path

import pytest
import torch

from dinov3 import hub, verified_weights
from dinov3.errors import CheckpointError, ConfigError, LineageBroken
from dinov3.evals.candidate import open_candidate
from dinov3.export import ExportRequest, export_weights
from tests.released import make_key, make_release


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release and the public key of its signer."""
    root = tmp_path_factory.mktemp("released")
    key = make_key(root / "keys")
    release = make_release(root, key=key, loadable=True)
    public = root / "publisher.pub"
    public.write_bytes(key.public)
    return release, public


@pytest.fixture
def copy(released: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(released[0], tmp_path / "copy")


def test_verified_release_loads_like_the_artifact_it_was_made_of(released):
    release, key = released
    model = hub.load(release, key=key, expect="vits@0.1.0")
    plain = hub.load(release.parents[2] / "distilled_students" / "vits")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_release_is_evaluated_like_the_artifact_it_was_made_of(released):
    folders = released[0], released[0].parents[2] / "distilled_students" / "vits"
    release, plain = (open_candidate(folder, None, torch.device("cpu")) for folder in folders)
    assert release.name == "release"
    assert release.identity()["tensors"] == plain.identity()["tensors"]


@pytest.mark.parametrize("signed", [True, False])
def test_release_is_exported_like_the_artifact_it_was_made_of(released, tmp_path, signed):
    release, key = released
    plain = release.parents[2] / "distilled_students" / "vits"
    export_weights(ExportRequest(release, tmp_path / "a.pth", key=key if signed else None))
    export_weights(ExportRequest(plain, tmp_path / "b.pth"))
    found, expected = (torch.load(tmp_path / name)["teacher"] for name in ("a.pth", "b.pth"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_release_whose_bytes_changed_is_not_exported(copy, tmp_path):
    path = copy / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(LineageBroken, match="refused, file-changed"):
        export_weights(ExportRequest(copy, tmp_path / "w.pth"))


def test_release_of_another_signer_is_not_exported(released, tmp_path):
    other = tmp_path / "other.pub"
    other.write_bytes(make_key(tmp_path / "keys").public)
    with pytest.raises(LineageBroken, match="refused, signature-invalid"):
        export_weights(ExportRequest(released[0], tmp_path / "w.pth", key=other))


def test_nothing_is_exported_into_a_release(copy):
    with pytest.raises(CheckpointError, match=r"is vouched for by its release\.json"):
        export_weights(ExportRequest(copy, copy / "w.pth"))


def test_one_changed_byte_of_the_weights_loads_nothing(released, copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LineageBroken, match="refused, file-changed"):
        hub.load(copy, key=released[1])


def test_weights_changed_after_the_verification_load_nothing(released, copy, monkeypatch):
    verify = verified_weights.verify_release

    def verify_then_change(folder, question):
        audit = verify(folder, question)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        return audit

    monkeypatch.setattr(verified_weights, "verify_release", verify_then_change)
    with pytest.raises(LineageBroken, match="changed after it was verified"):
        hub.load(copy, key=released[1])


def test_another_name_is_refused(released):
    with pytest.raises(LineageBroken, match="refused, wrong-release"):
        hub.load(released[0], key=released[1], expect="vits@9.9.9")


def test_another_key_is_refused(released, tmp_path):
    other = tmp_path / "other.pub"
    other.write_bytes(make_key(tmp_path / "keys").public)
    with pytest.raises(LineageBroken, match="refused, signature-invalid"):
        hub.load(released[0], key=other)


def test_key_from_the_release_vouches_for_nothing(released, copy):
    key = shutil.copy2(released[1], copy / "publisher.pub")
    with pytest.raises(CheckpointError, match="lies in the release itself"):
        hub.load(copy, key=key)


def test_name_without_a_key_is_a_mistake(released):
    with pytest.raises(ConfigError, match="expect: says nothing without"):
        hub.load(released[0], expect="vits@0.1.0")
