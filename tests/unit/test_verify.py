"""Exit codes, words and places of `dinov3 verify`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dinov3.errors import LineageBroken, StoreError
from dinov3.publish.private_key import PrivateKey, load_key, new_key
from dinov3.publish.signed_log import sign_envelope
from dinov3.publish.store import Store, open_store
from dinov3.release.audit import Question, audit_release
from dinov3.release.files import check_sums, release_digest
from dinov3.release.images import write_images
from dinov3.release.refusals import Refused
from dinov3.release.revoked import revoked_bytes
from dinov3.release.verify import main
from tests.audit.insider import edit_json, forge, sign_again
from tests.released import make_chain, make_release


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    folder = tmp_path_factory.mktemp("keys") / "private"
    new_key("publisher", folder, None)
    return load_key("publisher", folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/`, a chain of artifacts and a release made of it."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def release(project: Path, key: PrivateKey) -> Path:
    """Never to be changed in place."""
    return make_release(project, key=key, chain=make_chain(project / "data"))


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy" / "release"))


@pytest.fixture
def public(key: PrivateKey, tmp_path: Path) -> Path:
    path = tmp_path / "publisher.pub"
    path.write_bytes(key.public)
    return path


def _verify(*arguments: str | Path, store: Any = None) -> int:
    opener = None if store is None else lambda _: store
    return main([str(one) for one in arguments], open_store=opener)


def _json(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, store: Any = None
) -> dict[str, Any]:
    code = _verify(*arguments, "--format", "json", store=store)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["exit"] == code
    return found


@pytest.fixture(scope="module")
def store(release: Path, key: PrivateKey, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with that one release."""
    folder = tmp_path_factory.mktemp("store")
    found = open_store(f"directory:{folder / 'store'}")
    found.publish(release, log=folder / "log", key=key)
    return found


def test_signed_release_with_its_key_exits_0(
    release: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(release, "--key", public, "--expect", "vits@0.1.0") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "VERIFIED vits@0.1.0"


def test_json_says_what_holds_and_what_that_rests_on(
    release: Path, public: Path, key: PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, release, "--key", public)
    assert found["schema"] == "dinov3.verification/1"
    assert found["verdict"] == "verified"
    assert found["refusal"] is found["fault"] is found["file"] is None
    assert found["release"]["signer"] == key.fingerprint
    assert found["release"]["digest"] == release_digest(check_sums(release))
    assert all(line["what"] and line["rests_on"] for line in found["holds"])
    assert {row["contamination"] for row in found["figures"]} == {"none"}
    assert found["roots"][0]["training_data"] == "listed"
    assert "attribution: GPL-2.0-or-later" in found["obligations"]
    assert any("training took place" in one for one in found["not_proven"])


def test_revoked_keys_without_a_key_leave_it_undecided(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "revoked.json").write_bytes(revoked_bytes([]))
    assert _verify(release, "--revoked", tmp_path / "revoked.json") == 2
    assert "whether the key that signed was revoked" in capsys.readouterr().out


def test_signed_release_without_a_key_exits_2_and_says_so(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(release) == 2
    assert "not checked who signed it: no --key was given" in capsys.readouterr().out


def test_unsigned_release_without_a_key_exits_2_and_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "model.sig").unlink()
    assert _verify(copy) == 2
    assert "it is unsigned" in capsys.readouterr().out


def test_changed_release_without_a_key_is_refused_all_the_same(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "evals.json").write_bytes(b"{}")
    assert _verify(copy) == 1
    assert "REFUSED file-changed: evals.json" in capsys.readouterr().out


def test_refusal_is_named_in_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "more.txt").touch()
    refusal = _json(capsys, copy)["refusal"]
    assert (refusal["name"], refusal["where"]) == ("file-unlisted", "more.txt")


@pytest.mark.parametrize("name", ["key.pub", "sub/key.pub"])
def test_key_that_comes_with_the_release_exits_2(
    name: str, copy: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(public, copy / name)
    assert _verify(copy, "--key", copy / name) == 2
    assert "lies in the release itself" in capsys.readouterr().out


def test_link_to_a_key_inside_the_release_exits_2(
    copy: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(public, copy / "key.pub")
    (tmp_path / "link.pub").symlink_to(copy / "key.pub")
    assert _verify(copy, "--key", tmp_path / "link.pub") == 2
    assert "lies in the release itself" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "schema"),
    [("release.json", "dinov3.release/2"), ("checks.json", "dinov3.checks/2")],
)
def test_newer_schema_exits_2(
    name: str,
    schema: str,
    release: Path,
    key: PrivateKey,
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def newer(folder: Path) -> None:
        edit_json(folder, name, lambda content: content.update(schema=schema))

    forged = forge(release, tmp_path / "newer", newer, key, settled=False)
    assert _verify(forged, "--key", public) == 2
    assert "schema is newer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--key", "absent.pub", "cannot be read"),
        ("--revoked", "absent.json", "cannot be read"),
        ("--artifacts", "absent", "no such folder"),
        ("--images", "absent.bin", "cannot be read"),
        ("--expect", "vits", "not MODEL@VERSION"),
        ("--store", "directory:absent", "stores cannot be opened here"),
    ],
)
def test_option_that_cannot_be_used_exits_2(
    option: str, value: str, why: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(release, option, value) == 2
    assert why in capsys.readouterr().out.splitlines()[-1]


def test_target_that_is_not_there_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(tmp_path / "absent") == 2
    assert "no such file or folder" in capsys.readouterr().out


def test_unusable_option_is_a_usage_error_with_exit_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["release", "--trust-me"])
    assert "unrecognized arguments" in capsys.readouterr().err


class _Broken:
    def entries(self) -> None:
        msg = "a bug of ours\x1b[2J"
        raise ZeroDivisionError(msg)

    withdrawals = entries


def test_crash_of_the_verifier_exits_2_with_a_sentence(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(release, "--store", "any", store=_Broken()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the verifier itself failed, ZeroDivisionError: a bug of ours\\x1b[2J" in last


class _Down:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def entries(self) -> None:
        raise self._error

    withdrawals = entries


@pytest.mark.parametrize(
    ("error", "code"),
    [(StoreError("store: no answer"), 2), (LineageBroken("the store's copy is damaged"), 1)],
)
def test_store_that_fails_is_told_apart_from_one_that_lies(
    error: Exception, code: int, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(release, "--store", "any", store=_Down(error)) == code
    assert str(error) in capsys.readouterr().out.splitlines()[-1]


def test_foreign_words_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31mred\u202e"
    folder.mkdir()
    (folder / "SHA256SUMS").touch()
    (folder / "x\nREFUSED fake").touch()
    assert _verify(folder) == 1
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text
    assert text.count("\n") == 2
    assert json.loads(_again(folder, capsys))["target"] == str(folder)


def _again(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    _verify(folder, "--format", "json")
    text = capsys.readouterr().out
    assert text.isascii()
    return text


def test_artifacts_at_hand_are_hashed_again(
    release: Path, project: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, release, "--key", public, "--artifacts", project / "data")
    assert found["verdict"] == "verified"
    assert any("artifacts of 6 of 6 records are here" in line["what"] for line in found["holds"])
    assert not any("gate" in one for one in found["not_proven"])


def test_artifact_that_differs_is_refused(
    release: Path, project: Path, key: PrivateKey, tmp_path: Path
) -> None:
    data = shutil.copytree(project / "data", tmp_path / "data")
    (data / "curated_dataset" / "curated.parquet").write_bytes(b"other")
    with pytest.raises(Refused, match=r"curated\.parquet: changed") as caught:
        audit_release(release, Question(key=key.public, artifacts=data))
    assert caught.value.name == "artifact-changed"


def test_health_that_was_otherwise_than_the_gate_says_is_refused(
    release: Path, project: Path, key: PrivateKey, tmp_path: Path
) -> None:
    def kinder(folder: Path) -> None:
        def change(content: Any) -> None:
            (gate,) = [one for one in content["gates"] if one["name"] == "training_health"]
            for metrics in gate["result"].values():
                metrics["mean_cosine"] = 0.01

        edit_json(folder, "checks.json", change)

    forged = forge(release, tmp_path / "kinder", kinder, key, settled=True)
    audit_release(forged, Question(key=key.public))
    with pytest.raises(Refused, match="ended otherwise than is said") as caught:
        audit_release(forged, Question(key=key.public, artifacts=project / "data"))
    assert caught.value.name == "check-differs"


def _withhold_images(folder: Path) -> None:
    (folder / "images.bin").unlink()
    edit_json(folder, "release.json", lambda content: content["images"].update(mode="digest"))


def test_withheld_list_of_images_is_asked_for(
    release: Path, project: Path, key: PrivateKey, tmp_path: Path
) -> None:
    forged = forge(release, tmp_path / "withheld", _withhold_images, key, settled=True)
    audit = audit_release(forged, Question(key=key.public))
    assert any("give images.bin with --images" in one for one in audit.not_checked)
    (again,) = [one.what for one in audit.holds if one.what.startswith("gates judged again")]
    assert "contamination" not in again
    given = project / "data" / "curated_dataset" / "images.bin"
    assert audit_release(forged, Question(key=key.public, images=given)).not_checked == []


def test_other_list_of_images_than_the_record_names_is_refused(
    release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    write_images(tmp_path / "images.bin", [(b"x" * 32, 1)], {1: "trained"})
    with pytest.raises(Refused, match="not the list") as caught:
        audit_release(release, Question(key=key.public, images=tmp_path / "images.bin"))
    assert caught.value.name == "images-differ"


def test_release_below_outside_weights_verifies_down_to_them(
    tmp_path: Path, key: PrivateKey, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = make_release(tmp_path / "below", key=key, outside="Apache-2.0")
    assert _verify(release, "--key", public) == 0
    text = capsys.readouterr().out
    assert "down to external root outside.pth, training data unknown" in text.splitlines()[-1]
    assert "contamination: unknown" in text


def test_lone_file_in_its_release_is_judged_with_it(
    release: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, release / "model.safetensors", "--key", public)
    assert found["verdict"] == "verified"
    assert found["file"]["releases"] == ["vits@0.1.0"]


def test_lone_file_is_found_among_the_releases_below_a_folder(
    release: Path, project: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copyfile(release / "model.safetensors", lone)
    found = _json(capsys, lone, "--key", public, "--artifacts", project)
    assert found["verdict"] == "verified"
    assert found["file"]["releases"] == ["vits@0.1.0"]
    assert found["file"]["tensors"] == check_sums(release)["model.safetensors"].tensors


def test_lone_file_is_found_in_a_store(
    release: Path, public: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copyfile(release / "model.safetensors", lone)
    found = _json(capsys, lone, "--key", public, "--store", "any", store=store)
    assert found["verdict"] == "verified"
    assert found["file"]["releases"] == ["vits@0.1.0"]


def test_same_tensors_in_another_container_are_found_and_told(
    release: Path, public: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.safetensors"
    data = (release / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8
    lone.write_bytes(longer + data[8 + length :])
    found = _json(capsys, lone, "--key", public, "--store", "any", store=store)
    assert found["verdict"] == "verified"
    assert found["file"]["same_tensors_only"] is True


def test_lone_file_that_no_release_holds_exits_2(
    release: Path, public: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copyfile(release / "heads.safetensors", lone)
    data = bytearray(lone.read_bytes())
    data[-1] ^= 1
    lone.write_bytes(bytes(data))
    assert _verify(lone, "--key", public, "--store", "any", store=store) == 2
    assert "no release holds these bytes or tensors" in capsys.readouterr().out


def test_changed_lone_file_in_its_release_is_refused(
    copy: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert _verify(copy / "model.safetensors", "--key", public) == 1
    assert "REFUSED file-changed" in capsys.readouterr().out


def test_published_release_is_known_to_its_store(
    release: Path, public: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, release, "--key", public, "--store", "any", store=store)
    assert found["verdict"] == "verified"
    assert any("the store has vits@0.1.0" in line["what"] for line in found["holds"])


def test_release_that_the_store_does_not_have_is_undecided(release: Path, key: PrivateKey) -> None:
    audit = audit_release(release, Question(key=key.public, published={}))
    assert audit.not_checked == ["the store: it has no vits@0.1.0"]


def test_store_that_is_not_there_leaves_it_undecided(
    release: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = open_store(f"directory:{tmp_path / 'store'}")
    assert _verify(release, "--key", public, "--store", "any", store=absent) == 2
    assert "no store there" in capsys.readouterr().out


def test_release_that_the_store_withdrew_is_refused(
    release: Path,
    key: PrivateKey,
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = open_store(f"directory:{tmp_path / 'store'}")
    found.publish(release, log=tmp_path / "log", key=key)
    digest = release_digest(check_sums(release))
    said = {"kind": "withdraw", "model": "vits", "version": "0.1.0", "release": digest}
    envelope = sign_envelope({**said, "reason": "wrong labels"}, key)
    found.withdraw("vits", "0.1.0", envelope)
    assert _verify(release, "--key", public, "--store", "any", store=found) == 1
    assert "REFUSED withdrawn: vits@0.1.0: wrong labels" in capsys.readouterr().out


def test_folder_may_be_renamed_and_moved(release: Path, key: PrivateKey, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(release, tmp_path / "elsewhere" / "other name"))
    assert audit_release(moved, Question(key=key.public)).name == "vits@0.1.0"


def test_forger_leaves_an_unchanged_release_valid(copy: Path, key: PrivateKey) -> None:
    sign_again(copy, key)
    assert audit_release(copy, Question(key=key.public)).not_checked == []
