"""Signing: with encrypted keys too, which never reach the disk in the clear."""

import base64
import json
import subprocess
import sys

import pytest

from dinov3.errors import DinoError
from dinov3.publish.private_key import load_key, new_key
from dinov3.publish.sign import check_with_library, sign_release
from dinov3.publish.signed_log import sign_envelope
from dinov3.release.envelope import open_envelope
from dinov3.release.record import canonical_json

PASSPHRASE = b"correct horse"


@pytest.fixture
def locked(tmp_path, monkeypatch):
    new_key("locked", tmp_path / "keys", PASSPHRASE)
    monkeypatch.setenv("DINOV3_PASSPHRASE", PASSPHRASE.decode())
    return load_key("locked", tmp_path / "keys")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "release"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_encrypted_key_signs_and_is_nowhere_in_the_clear(locked, folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    code = (
        "import sys; from pathlib import Path\n"
        "import tempfile; tempfile.gettempdir()\n"  # which writes to find out whether it can
        "written = []\n"
        "sys.addaudithook(lambda event, args: written.append(str(args[0]))\n"
        "    if event == 'open' and args[2] & 3 else None)\n"
        "from dinov3.publish.private_key import load_key\n"
        "from dinov3.publish.sign import sign_release\n"
        f"key = load_key({str(locked.path)!r})\n"
        f"sign_release(Path({str(folder)!r}), key)\n"
        "print('\\n'.join(written))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    written = [line for line in done.stdout.splitlines() if line.startswith("/")]
    names = {line.rpartition("/")[2] for line in written if "__pycache__" not in line}
    assert {name for name in names if not name.endswith((".tmp", "null"))} == {
        "model.sig",
        "key.pub",
    }
    assert list(scratch.iterdir()) == []
    check_with_library(folder, folder / "model.sig", locked.public)


def test_bundle_is_canonical_and_names_no_ignored_file(locked, folder):
    sign_release(folder, locked)
    data = (folder / "model.sig").read_bytes()
    bundle = json.loads(data)
    assert canonical_json(bundle) == data
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["predicate"]["serialization"] == {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
    }


def test_bundle_and_private_key_do_not_show_the_passphrase_or_the_secret(locked, folder):
    sign_release(folder, locked)
    secret = format(locked.secret.private_numbers().private_value, "x")
    for shown in (repr(locked), (folder / "model.sig").read_text()):
        assert PASSPHRASE.decode() not in shown
        assert secret not in shown


def test_library_refuses_what_it_did_not_see(locked, folder):
    sign_release(folder, locked)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DinoError, match=r"model-signing refuses .*model\.safetensors"):
        check_with_library(folder, folder / "model.sig", locked.public)


def test_envelope_is_signed_without_chance(locked):
    payload = {"kind": "publish", "model": "vits", "version": "0.1.0", "release": "a" * 64}
    first = sign_envelope(payload, locked)
    assert first == sign_envelope(payload, locked)
    assert open_envelope(first, locked.public)["signer"] == locked.fingerprint


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "other"}, "kind is of the wrong kind"),
        ({"version": "01.0.0"}, "version is of the wrong kind"),
        ({"release": "A" * 64}, "release is of the wrong kind"),
        ({"model": "../up"}, "model is of the wrong kind"),
        ({"more": 1}, "not an object of"),
        ({"kind": "withdraw"}, "a withdrawal has a reason"),
        ({"reason": "why"}, "a withdrawal has a reason"),
    ],
)
def test_envelope_with_a_wrong_field_is_not_signed(changes, why, locked):
    payload = {"kind": "publish", "model": "vits", "version": "0.1.0", "release": "a" * 64}
    with pytest.raises(DinoError, match=why):
        sign_envelope({**payload, **changes}, locked)
