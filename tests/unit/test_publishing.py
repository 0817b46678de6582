"""Publishing, fetching, withdrawing and auditing genuine releases."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dinov3.errors import AlreadyPublished, LineageBroken, ReleaseRefused, StoreError
from dinov3.publish.directory_store import DirectoryStore
from dinov3.publish.keys import revoke
from dinov3.publish.private_key import PrivateKey, load_key, new_key
from dinov3.publish.publishing import (
    audit_store,
    fetch_release,
    publish_release,
    receipt_state,
    signer_of,
    withdraw_release,
    withdrawn_because,
)
from dinov3.publish.releases import View
from dinov3.publish.signed_log import append_receipt
from dinov3.publish.store import Entry, find_entry, read_log
from dinov3.release.receipts import Receipt
from tests.flow.publishers import make_thin
from tests.released import make_release

NAME = ("vits", "0.1.0")


@dataclass(frozen=True)
class Desk:
    """A publisher's desk: a signed release, its key and another one, a store, a log."""

    folder: Path
    key: PrivateKey
    other: PrivateKey
    store: DirectoryStore
    log: Path

    def publish(self) -> Entry:
        return publish_release(self.folder, self.store, log=self.log, key=self.key)

    def receipts(self) -> list[Receipt]:
        return read_log(self.log, [self.key.public])

    def stored(self, entry: Entry, name: str) -> Path:
        return self.store.root / "objects" / entry.digest / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release, and the folder of the key that signed it."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("demo", "other"):
        new_key(name, folder / "keys", None)
    key = load_key("demo", folder / "keys")
    return make_release(folder, key=key), folder / "keys"


@pytest.fixture
def desk(made: tuple[Path, Path], tmp_path: Path) -> Desk:
    release, keys = made
    shutil.copytree(release, tmp_path / "release")
    key, other = load_key("demo", keys), load_key("other", keys)
    store = DirectoryStore(tmp_path / "store")
    return Desk(tmp_path / "release", key, other, store, tmp_path / "log")


def test_what_is_published_is_signed_receipted_and_fetched_verified(desk: Desk, tmp_path: Path):
    entry = desk.publish()
    fetched = fetch_release(
        NAME, tmp_path / "out", desk.store, keys=[desk.other.public, desk.key.public], log=desk.log
    )
    assert fetched.entry == entry
    assert fetched.signer == desk.key.fingerprint
    assert signer_of(View(desk.store, entry), [desk.key.public]) == desk.key.fingerprint
    state = receipt_state(entry, desk.receipts(), desk.store.identity)
    assert state == f"in the log, signed by {desk.key.fingerprint}"
    assert audit_store(desk.store, log=desk.log, keys=[desk.key.public]) == []


def test_a_release_that_the_verifier_refuses_is_not_published(desk: Desk):
    (desk.folder / "README.md").write_text("changed")
    with pytest.raises(ReleaseRefused, match=r"file-changed: README\.md"):
        desk.publish()
    assert not desk.store.root.exists()
    assert not desk.log.exists()


def test_a_release_signed_by_another_key_is_not_published(desk: Desk):
    with pytest.raises(ReleaseRefused, match="signature-invalid"):
        publish_release(desk.folder, desk.store, log=desk.log, key=desk.other)


def test_a_release_signed_by_a_revoked_key_is_neither_published_nor_fetched(
    desk: Desk, tmp_path: Path
):
    desk.publish()
    revoke(desk.key.fingerprint, "stolen", desk.log)
    with pytest.raises(ReleaseRefused, match="key-revoked"):
        desk.publish()
    with pytest.raises(LineageBroken, match="key-revoked"):
        fetch_release(NAME, tmp_path / "out", desk.store, keys=[desk.key.public], log=desk.log)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_release_cannot_be_published(desk: Desk, tmp_path: Path):
    with pytest.raises(StoreError, match="nowhere: cannot be checked"):
        publish_release(tmp_path / "nowhere", desk.store, log=desk.log, key=desk.key)


def test_a_store_that_forgot_a_version_does_not_take_another_under_its_name(
    desk: Desk, tmp_path: Path
):
    receipt = Receipt("publish", *NAME, "a" * 64, audited="x#a", merged="x#b")
    append_receipt(desk.log, receipt, desk.key)
    with pytest.raises(AlreadyPublished, match=r"the log has a receipt for other bytes"):
        desk.publish()
    assert not desk.store.root.exists()


def test_without_keys_a_release_is_fetched_with_its_signer_left_open(desk: Desk, tmp_path: Path):
    desk.publish()
    shutil.rmtree(desk.log)
    fetched = fetch_release(NAME, tmp_path / "out", desk.store, keys=[], log=desk.log)
    assert fetched.signer is None
    assert (tmp_path / "out" / "model.sig").is_file()


def test_a_release_is_not_fetched_for_another_key(desk: Desk, tmp_path: Path):
    desk.publish()
    keys = [desk.other.public]
    with pytest.raises(LineageBroken, match="signature-invalid"):
        fetch_release(NAME, tmp_path / "out", desk.store, keys=keys, log=tmp_path / "no log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "release", "store"]


def test_a_damaged_store_gives_no_release(desk: Desk, tmp_path: Path):
    entry = desk.publish()
    with desk.stored(entry, "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x99")
    with pytest.raises(LineageBroken, match=r"model\.safetensors: changed"):
        fetch_release(NAME, tmp_path / "out", desk.store, keys=[desk.key.public], log=desk.log)
    assert not (tmp_path / "out").exists()


def test_a_withdrawn_release_is_fetched_only_on_demand(desk: Desk, tmp_path: Path):
    desk.publish()
    entry = withdraw_release(NAME, "wrong licence", desk.store, log=desk.log, key=desk.key)
    assert entry.withdrawn == "wrong licence"
    keys = [desk.key.public]
    with pytest.raises(StoreError, match=r"withdrawn, because: wrong licence.*--withdrawn"):
        fetch_release(NAME, tmp_path / "out", desk.store, keys=keys, log=desk.log)
    fetch_release(NAME, tmp_path / "out", desk.store, keys=keys, log=desk.log, with_withdrawn=True)
    assert audit_store(desk.store, log=desk.log, keys=keys) == []


def test_a_withdrawal_that_the_store_forgot_still_counts(desk: Desk, tmp_path: Path):
    desk.publish()
    withdraw_release(NAME, "wrong licence", desk.store, log=desk.log, key=desk.key)
    (desk.store.root / "withdrawals" / "vits@0.1.0.json").unlink()
    keys = [desk.key.public]
    with pytest.raises(StoreError, match="withdrawn, because: wrong licence"):
        fetch_release(NAME, tmp_path / "out", desk.store, keys=keys, log=desk.log)
    (finding,) = audit_store(desk.store, log=desk.log, keys=keys)
    assert finding == "vits@0.1.0: withdrawn in the log, the store says otherwise"


def test_a_withdrawal_that_was_interrupted_is_finished_by_doing_it_again(desk: Desk):
    entry = desk.publish()
    receipt = Receipt("withdraw", *NAME, entry.digest, reason="wrong licence")
    receipt = replace(receipt, audited=entry.audited, merged=entry.merged)
    append_receipt(desk.log, receipt, desk.key)
    with pytest.raises(StoreError, match="already withdrawn, because: wrong licence"):
        withdraw_release(NAME, "another reason", desk.store, log=desk.log, key=desk.key)
    withdraw_release(NAME, "wrong licence", desk.store, log=desk.log, key=desk.key)
    assert [one.kind for one in desk.receipts()] == ["publish", "withdraw"]
    assert find_entry(desk.store.entries(), *NAME).withdrawn == "wrong licence"


def test_only_the_key_that_signed_a_release_withdraws_it(desk: Desk):
    desk.publish()
    public = desk.log / "keys" / "demo.pub"
    public.parent.mkdir()
    public.write_bytes(desk.key.public)
    with pytest.raises(StoreError, match="Use the key that signed it"):
        withdraw_release(NAME, "sabotage", desk.store, log=desk.log, key=desk.other)
    assert desk.store.entries()[0].withdrawn is None


@pytest.mark.parametrize("reason", ["", " ", "two\nlines", "\x1b[31mred"])
def test_a_reason_is_one_line_of_text(desk: Desk, reason: str):
    desk.publish()
    with pytest.raises(StoreError, match="--reason: not one line of text"):
        withdraw_release(NAME, reason, desk.store, log=desk.log, key=desk.key)


def test_an_audit_of_all_bytes_names_every_file_that_changed(desk: Desk):
    entry = desk.publish()
    for name in ("README.md", "model.safetensors"):
        with desk.stored(entry, name).open("ab") as stream:
            stream.write(b"more")
    keys = [desk.key.public]
    assert audit_store(desk.store, log=desk.log, keys=keys) == []
    findings = audit_store(desk.store, log=desk.log, keys=keys, with_bytes=True)
    assert [finding.split(": ")[2] for finding in findings] == ["README.md", "model.safetensors"]
    desk.stored(entry, "SHA256SUMS").unlink()
    (finding,) = audit_store(desk.store, log=desk.log, keys=keys, with_bytes=True)
    assert "has no file 'SHA256SUMS'" in finding


def test_what_is_published_during_an_audit_is_no_finding(desk: Desk):
    desk.publish()

    class Meddled(DirectoryStore):
        def audit(self, receipts: Sequence[Receipt]) -> list[str]:
            if len(receipts) == 1:
                late = make_thin(desk.folder.parent / "late", version="0.1.1")
                desk.store.publish(late, log=desk.log, key=desk.key)
            return super().audit(receipts)

    assert audit_store(Meddled(desk.store.root), log=desk.log, keys=[desk.key.public]) == []


def test_an_audit_of_all_bytes_names_what_was_planted_beside_them(desk: Desk):
    entry = desk.publish()
    desk.stored(entry, "hubconf.py").write_text("planted")
    (found,) = audit_store(desk.store, log=desk.log, keys=[desk.key.public], with_bytes=True)
    assert "hubconf.py: SHA256SUMS does not list it" in found


def test_a_withdrawal_planted_in_the_store_is_found_by_the_audit(desk: Desk, tmp_path: Path):
    entry = desk.publish()
    receipt = Receipt("withdraw", *NAME, entry.digest, reason="planted")
    line = append_receipt(tmp_path / "other log", receipt, desk.other)
    desk.store.withdraw(*NAME, line.envelope)
    (finding,) = audit_store(desk.store, log=desk.log, keys=[desk.key.public])
    assert "a withdrawal in the store" in finding
    assert "which is no key that was given" in finding


def test_a_log_that_was_cut_is_found_by_the_audit(desk: Desk):
    desk.publish()
    withdraw_release(NAME, "wrong licence", desk.store, log=desk.log, key=desk.key)
    receipts = desk.log / "receipts.jsonl"
    receipts.write_bytes(receipts.read_bytes().splitlines(keepends=True)[1])
    (finding,) = audit_store(desk.store, log=desk.log, keys=[desk.key.public])
    assert "does not follow the line before it" in finding


def test_a_rewritten_index_contradicts_the_receipt(desk: Desk):
    entry = desk.publish()
    (line,) = (desk.store.root / "index").iterdir()
    changed = {**json.loads(line.read_bytes()), "base": "0" * 64}
    line.write_text(json.dumps(changed))
    entry = desk.store.entries()[0]
    state = receipt_state(entry, desk.receipts(), desk.store.identity)
    assert state == "CONTRADICTED: the store's history was rewritten"
    other = replace(entry, digest="b" * 64)
    assert "the log has release digest" in receipt_state(
        other, desk.receipts(), desk.store.identity
    )
    assert receipt_state(entry, desk.receipts(), "elsewhere") == "none for this store"


def test_the_logs_word_on_a_withdrawal_goes_before_the_stores(desk: Desk):
    entry = desk.publish()
    told = replace(entry, withdrawn="by the store")
    assert withdrawn_because(entry, desk.receipts()) is None
    assert withdrawn_because(told, desk.receipts()) == "by the store"
    said = Receipt("withdraw", *NAME, entry.digest, reason="by the log")
    assert withdrawn_because(told, [*desk.receipts(), said]) == "by the log"
