"""What all stores share: names, receipts against entries, folders that appear whole."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dinov3.errors import DinoError, LineageBroken, StoreError
from dinov3.publish.copying import check_fetched
from dinov3.publish.private_key import PrivateKey, load_key, new_key
from dinov3.publish.signed_log import append_receipt, sign_envelope
from dinov3.publish.store import (
    CHUNK,
    Entry,
    appearing,
    copy_stream,
    find_entry,
    open_store,
    read_log,
    read_release,
    split_name,
    version_key,
)
from dinov3.publish.store_receipts import (
    UNREADABLE,
    compare_receipts,
    leave_receipt,
    odd_withdrawals,
    read_withdrawal,
    reason_in,
    stored_reason,
)
from dinov3.release.receipts import Receipt
from dinov3.release.refusals import Refused
from tests.flow.publishers import make_thin, seal

STORE = "directory:0"
ONE = Entry("vits", "0.1.0", "a" * 64, None, f"{STORE}#audited", f"{STORE}#merged")


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    new_key("demo", tmp_path / "keys", None)
    return load_key("demo", tmp_path / "keys")


def receipt_of(entry: Entry) -> Receipt:
    return Receipt(
        "publish",
        entry.model,
        entry.version,
        entry.digest,
        audited=entry.audited,
        merged=entry.merged,
    )


@pytest.mark.parametrize(
    "spec", ["", "directory:", "folder:/tmp", "lakefs:", "s3://bucket", "/tmp"]
)
def test_a_spec_of_no_kind_names_the_kinds(spec: str):
    with pytest.raises(StoreError, match="Use directory:PATH or lakefs://REPO"):
        open_store(spec)


def test_the_directory_store_loads_neither_the_lakefs_sdk_nor_torch(tmp_path: Path):
    code = (
        "import sys; from dinov3.publish.store import open_store; "
        f"open_store('directory:{tmp_path}'); "
        "sys.exit(bool({'lakefs', 'lakefs_sdk', 'torch', 'dinov3.lake'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_is_a_model_and_a_version():
    assert split_name("vits@0.10.2") == ("vits", "0.10.2")
    assert version_key("0.10.2") > version_key("0.9.10")


@pytest.mark.parametrize(
    "text",
    ["vits", "vits@1.0", "vits@01.0.0", "vits@1.0.0\n", "../x@1.0.0", "a/b@1.0.0", "@1.0.0"],
)
def test_what_could_lead_out_of_a_path_or_a_tag_is_no_name(text: str):
    with pytest.raises(StoreError, match=r"not a name|not MAJOR\.MINOR\.PATCH"):
        split_name(text)


def test_a_version_that_is_not_visible_is_not_found():
    assert find_entry([ONE], "vits", "0.1.0") == ONE
    with pytest.raises(StoreError, match=r"vits@0\.1\.1: not in the store"):
        find_entry([ONE], "vits", "0.1.1")


def test_receipts_that_agree_give_no_findings():
    assert list(compare_receipts(STORE, [ONE], [receipt_of(ONE)])) == []


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        ([], "the store does not: rolled back or removed"),
        ([replace(ONE, digest="b" * 64)], "made again with other bytes"),
        ([replace(ONE, merged=f"{STORE}#other")], "history rewritten"),
        ([replace(ONE, audited=f"{STORE}#other")], "history rewritten"),
        ([ONE, replace(ONE, version="0.1.1")], "vits@0.1.1: visible without a receipt"),
    ],
)
def test_a_store_that_differs_from_a_receipt_is_named(now: list[Entry], finding: str):
    (found,) = compare_receipts(STORE, now, [receipt_of(ONE)])
    assert finding in found


def test_receipts_of_another_store_prove_nothing_here():
    findings = list(compare_receipts("directory:1", [ONE], [receipt_of(ONE)]))
    assert findings == [
        "directory:1: no receipt of this log speaks of this store",
        "vits@0.1.0: visible without a receipt",
    ]


def test_a_withdrawal_that_the_store_forgot_is_named():
    withdrawal = replace(receipt_of(ONE), kind="withdraw", reason="broken")
    (found,) = compare_receipts(STORE, [ONE], [receipt_of(ONE), withdrawal])
    assert found == "vits@0.1.0: withdrawn in the log, the store says otherwise"
    told = replace(ONE, withdrawn="broken")
    assert list(compare_receipts(STORE, [told], [receipt_of(ONE), withdrawal])) == []


def test_of_two_who_withdrew_at_once_the_store_may_give_the_word_of_either():
    both = [
        replace(receipt_of(ONE), kind="withdraw", reason=reason) for reason in ("first", "second")
    ]
    told = replace(ONE, withdrawn="first")
    assert list(compare_receipts(STORE, [told], [receipt_of(ONE), *both])) == []
    other = replace(ONE, withdrawn="third")
    (found,) = compare_receipts(STORE, [other], [receipt_of(ONE), *both])
    assert found == "vits@0.1.0: withdrawn in the log, the store says otherwise"


def test_a_receipt_is_left_once(tmp_path: Path, key: PrivateKey):
    leave_receipt(ONE, log=tmp_path / "log", key=key)
    leave_receipt(ONE, log=tmp_path / "log", key=key)
    (receipt,) = read_log(tmp_path / "log", [key.public])
    assert (receipt.release, receipt.merged) == (ONE.digest, ONE.merged)


def test_a_forged_receipt_does_not_stand_in_for_a_genuine_one(tmp_path: Path, key: PrivateKey):
    new_key("forger", tmp_path / "keys", None)
    append_receipt(tmp_path / "log", receipt_of(ONE), load_key("forger", tmp_path / "keys"))
    with pytest.raises(StoreError, match=r"receipts\.jsonl: .*Restore it from git"):
        leave_receipt(ONE, log=tmp_path / "log", key=key)


def test_a_withdrawal_is_read_from_its_envelope(key: PrivateKey):
    said = {"kind": "withdraw", "model": "vits", "version": "0.1.0", "release": "a" * 64}
    envelope = sign_envelope({**said, "reason": "broken"}, key)
    assert read_withdrawal(envelope).reason == "broken"
    with pytest.raises(StoreError, match="withdrawal: not readable"):
        read_withdrawal(b"{}")
    published = sign_envelope({**said, "kind": "publish"}, key)
    with pytest.raises(StoreError, match="withdrawal: not readable"):
        read_withdrawal(published)


def withdrawal_of(entry: Entry, key: PrivateKey) -> bytes:
    said = {"kind": "withdraw", "model": entry.model, "version": entry.version}
    return sign_envelope({**said, "release": entry.digest, "reason": "broken"}, key)


def test_a_withdrawal_gives_its_reason_for_its_own_release_alone(key: PrivateKey):
    assert reason_in(ONE, withdrawal_of(ONE, key)) == "broken"
    for other in (replace(ONE, version="0.1.1"), replace(ONE, digest="b" * 64)):
        with pytest.raises(StoreError, match=r"the withdrawal names vits@0\.1\.0 a{64}\. Sign"):
            reason_in(other, withdrawal_of(ONE, key))


def test_a_withdrawal_that_says_nothing_counts_as_one(key: PrivateKey):
    assert stored_reason(ONE, withdrawal_of(ONE, key)) == "broken"
    other = replace(ONE, version="0.1.1")
    unreadable = [b"{}", withdrawal_of(other, key), StoreError("its bytes are gone")]
    for envelope in unreadable:
        told = replace(ONE, withdrawn=stored_reason(ONE, envelope))
        assert str(told.withdrawn).startswith(UNREADABLE)
        (finding,) = odd_withdrawals([told], ["withdrawals/vits@0.1.0.json"])
        assert finding == f"vits@0.1.0: {told.withdrawn}"


def test_a_withdrawal_of_nothing_that_is_visible_is_named():
    names = ["withdrawals/vits@0.1.0.json", "withdrawals/vits@0.1.1.json"]
    (finding,) = odd_withdrawals([ONE], names)
    assert finding == "withdrawals/vits@0.1.1.json: withdraws nothing that is visible here"


def test_a_stream_is_copied_in_chunks_and_counted():
    data = bytes(range(256)) * (CHUNK // 100)
    target, counts = io.BytesIO(), []
    copy_stream(io.BytesIO(data), target, counts.append)
    assert target.getvalue() == data
    assert sum(counts) == len(data)
    assert max(counts) == CHUNK


def test_a_folder_appears_only_when_all_went_well(tmp_path: Path):
    with appearing(tmp_path / "target") as hidden:
        hidden.mkdir()
        (hidden / "file").write_text("whole")
        assert not (tmp_path / "target").exists()
    assert (tmp_path / "target" / "file").read_text() == "whole"
    with pytest.raises(DinoError, match="stop"), appearing(tmp_path / "other") as hidden:
        hidden.mkdir()
        raise DinoError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_no_folder_appears_over_a_link_or_in_place_of_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for target in (tmp_path / "dangling", tmp_path / "link", Path(), Path("/")):
        with pytest.raises(StoreError, match="already there"), appearing(target):
            pytest.fail("begun, although it cannot end well")
    with appearing(tmp_path / "empty") as hidden:
        hidden.mkdir()


FETCHES = """
import os, sys
from pathlib import Path
from dinov3.publish.copying import appearing
with appearing(Path(sys.argv[1])) as outer:
    with appearing(outer) as hidden:
        hidden.mkdir()
        if sys.argv[2] == "inner":
            os.kill(os.getpid(), 9)
    os.kill(os.getpid(), 9)
"""


def test_what_killed_fetches_left_goes_with_the_next_one_and_nothing_else(tmp_path: Path):
    kept = tmp_path / f".target.partial-{os.getppid()}"  # of one that lives
    for path in (kept, tmp_path / ".target.partial-x", tmp_path / ".other.partial-1"):
        path.mkdir()
    for stopped in ("inner", "outer"):
        command = [sys.executable, "-c", FETCHES, tmp_path / "target", stopped]
        subprocess.run(command, check=False)
        assert len(list(tmp_path.iterdir())) == 4
    with appearing(tmp_path / "target") as hidden:
        hidden.mkdir()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"target", kept.name, ".target.partial-x", ".other.partial-1"}


def test_a_release_is_named_by_its_head_and_all_its_bytes(tmp_path: Path):
    first = read_release(make_thin(tmp_path / "one"))
    second = read_release(make_thin(tmp_path / "two", text="two"))
    assert (first.model, first.version) == ("vits", "0.1.0")
    assert first.digest != second.digest
    assert set(first.hashes) >= {"release.json", "SHA256SUMS"}


@pytest.mark.parametrize(
    "head", [b"[]", b"{", b'{"model":"vits"}', b'{"model":1,"version":"0.1.0"}']
)
def test_a_release_without_a_name_is_refused(tmp_path: Path, head: bytes):
    folder = make_thin(tmp_path / "release")
    (folder / "release.json").write_bytes(head)
    with pytest.raises(Refused, match=r"release\.json"):
        read_release(seal(folder))


def test_what_was_fetched_must_be_what_the_entry_names(tmp_path: Path):
    folder = make_thin(tmp_path / "release")
    digest = read_release(folder).digest
    check_fetched(folder, replace(ONE, digest=digest))
    with pytest.raises(LineageBroken, match="the store holds another release"):
        check_fetched(folder, ONE)
    with pytest.raises(LineageBroken, match="the store holds another release"):
        check_fetched(folder, replace(ONE, digest=digest, version="0.1.1"))
    (folder / "extra").write_text("unlisted")
    with pytest.raises(LineageBroken, match=r"copy is damaged.*extra"):
        check_fetched(folder, replace(ONE, digest=digest))
