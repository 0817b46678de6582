"""The log of receipts: signed lines in a chain, appended whole or not at all."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3.errors import DinoError, LineageBroken
from dinov3.publish.private_key import load_key, new_key
from dinov3.publish.signed_log import append_receipt, sign_envelope
from dinov3.release.receipts import Receipt, read_keys, read_lines, read_receipts
from dinov3.release.refusals import CannotCheck, Refused

FIRST = Receipt("publish", "vits", "0.1.0", "a" * 64, audited="c1", merged="c2")
SECOND = dataclasses.replace(FIRST, version="0.2.0", release="b" * 64)
THIRD = Receipt("withdraw", "vits", "0.1.0", "a" * 64, reason="found to be wrong")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys")
    for name in ("demo", "other"):
        new_key(name, path, None)
    return path


@pytest.fixture(scope="module")
def keys(folder):
    return {name: load_key(name, folder) for name in ("demo", "other")}


@pytest.fixture
def log(tmp_path, keys):
    """A log of three lines by two keys."""
    for receipt, name in ((FIRST, "demo"), (SECOND, "other"), (THIRD, "demo")):
        append_receipt(tmp_path / "log", receipt, keys[name])
    return tmp_path / "log"


def trusted(keys):
    return [key.public for key in keys.values()]


def test_lines_come_back_in_order_with_their_signers(log, keys):
    found = read_receipts(log / "receipts.jsonl", trusted(keys))
    plain = [dataclasses.replace(one, previous=None, signer=None) for one in found]
    assert plain == [FIRST, SECOND, THIRD]
    signers = [keys[name].fingerprint for name in ("demo", "other", "demo")]
    assert [one.signer for one in found] == signers
    lines = read_lines(log / "receipts.jsonl", None)
    assert [one.previous for one in found] == [None, lines[0].sha256, lines[1].sha256]


def test_no_log_is_an_empty_one(tmp_path):
    assert read_receipts(tmp_path / "receipts.jsonl", []) == []


def test_same_receipt_is_not_written_twice(log, keys):
    before = (log / "receipts.jsonl").read_bytes()
    again = append_receipt(log, FIRST, keys["other"])
    assert (log / "receipts.jsonl").read_bytes() == before
    assert again.receipt.signer == keys["demo"].fingerprint
    assert again.envelope == before.splitlines(keepends=True)[0]


def test_another_merge_of_the_same_release_is_another_receipt(log, keys):
    append_receipt(log, dataclasses.replace(FIRST, merged="c9"), keys["demo"])
    assert len(read_receipts(log / "receipts.jsonl", trusted(keys))) == 4


def test_appending_leaves_nothing_else_in_the_folder(log):
    assert [path.name for path in log.iterdir()] == ["receipts.jsonl"]


def cut_first(lines, keys):
    return lines[1:]


def cut_middle(lines, keys):
    return [lines[0], lines[2]]


def swap(lines, keys):
    return [lines[1], lines[0], lines[2]]


def repeat(lines, keys):
    return [*lines, lines[2]]


def remake_first(lines, keys):
    other = dataclasses.replace(FIRST, release="c" * 64)
    return [sign_envelope(other.payload(), keys["demo"]), *lines[1:]]


@pytest.mark.parametrize("change", [cut_first, cut_middle, swap, repeat, remake_first])
def test_broken_chain_is_refused_and_not_built_upon(change, log, keys):
    path = log / "receipts.jsonl"
    changed = b"".join(change(path.read_bytes().splitlines(keepends=True), keys))
    path.write_bytes(changed)
    with pytest.raises(Refused, match=r"receipts\.jsonl:\d: does not follow") as caught:
        read_receipts(path, trusted(keys))
    assert caught.value.name == "receipts-broken"
    with pytest.raises(LineageBroken, match="Restore the log from git"):
        append_receipt(log, dataclasses.replace(FIRST, version="0.3.0"), keys["demo"])
    assert path.read_bytes() == changed


def test_line_of_an_untrusted_key_is_refused_with_its_number(log, keys):
    with pytest.raises(Refused, match=r"receipts\.jsonl:2: signed by .* no key that was given"):
        read_receipts(log / "receipts.jsonl", [keys["demo"].public])


def test_changed_byte_is_refused_in_every_line(log, keys):
    path = log / "receipts.jsonl"
    genuine = path.read_bytes()
    for place in range(0, len(genuine), 29):
        changed = bytearray(genuine)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(Refused, match=r"receipts\.jsonl:\d"):
            read_receipts(path, trusted(keys))


@pytest.mark.parametrize("tail", [b"\n", b"{}\n", b"<<<<<<< ours\n", b" "])
def test_anything_else_at_the_end_is_refused(tail, log, keys):
    path = log / "receipts.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(Refused, match=r"receipts\.jsonl:4: "):
        read_receipts(path, trusted(keys))


def test_unreadable_log_is_no_verdict(tmp_path):
    (tmp_path / "receipts.jsonl").mkdir()
    with pytest.raises(CannotCheck, match="cannot be read: Is a directory"):
        read_receipts(tmp_path / "receipts.jsonl", [])


def test_keys_of_a_log_are_those_beside_it(tmp_path, keys):
    (tmp_path / "keys").mkdir()
    for name, key in keys.items():
        (tmp_path / "keys" / f"{name}.pub").write_bytes(key.public)
    (tmp_path / "keys" / "notes.txt").write_text("no key")
    assert read_keys(tmp_path) == trusted(keys)


def test_malformed_receipt_is_not_written(log, keys):
    before = (log / "receipts.jsonl").read_bytes()
    with pytest.raises(DinoError, match="version is of the wrong kind"):
        append_receipt(log, dataclasses.replace(FIRST, version="latest"), keys["demo"])
    assert (log / "receipts.jsonl").read_bytes() == before


APPEND = """
import dataclasses, os, sys
from pathlib import Path
from dinov3.publish.private_key import load_key
from dinov3.publish import signed_log
from dinov3.release.receipts import Receipt

key = load_key(sys.argv[1])
log = Path(sys.argv[2])
if sys.argv[3].startswith("die"):
    real = getattr(os, sys.argv[3].removeprefix("die in "))
    def die(*arguments):
        real(*arguments)
        os.kill(os.getpid(), 9)
    setattr(os, sys.argv[3].removeprefix("die in "), die)
for number in range(int(sys.argv[4])):
    version = f"{sys.argv[5]}.0.{number}"
    signed_log.append_receipt(log, Receipt("publish", "vits", version, "a" * 64), key)
"""


def appender(folder, log, how, count, major):
    command = [sys.executable, "-c", APPEND, str(folder / "demo.pem"), str(log), how]
    return subprocess.Popen([*command, str(count), str(major)])


def test_make_clean_keeps_the_log_and_what_else_stands_in_git(tmp_path):
    checkout = Path(__file__).parents[2]
    shutil.copy2(checkout / "Makefile", tmp_path)
    kept = ["release_log/receipts.jsonl", "release_log/keys/demo.pub", "release_log/waivers.yaml"]
    kept += ["README.md", "raw_images/fingerprint.json", "stamps/picture"]
    for name in [*kept, "vits/weights", "notes"]:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path, check=True)
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "data").as_posix() for path in left} == set(kept)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        {name.partition("/")[0] for name in kept}
    )


def test_two_processes_append_one_chain(log, keys, folder):
    running = [appender(folder, log, "live", 15, major) for major in (1, 2)]
    assert [process.wait() for process in running] == [0, 0]
    found = read_receipts(log / "receipts.jsonl", trusted(keys))
    versions = {f"{major}.0.{number}" for major in (1, 2) for number in range(15)}
    assert {one.version for one in found} == versions | {"0.1.0", "0.2.0"}
    assert len(found) == 33


def test_killed_process_leaves_the_old_log_and_the_next_one_goes_on(log, keys, folder):
    path = log / "receipts.jsonl"
    before = path.read_bytes()
    killed = appender(folder, log, "die in fsync", 1, 1)
    assert killed.wait() == -signal.SIGKILL
    assert path.read_bytes() == before
    assert appender(folder, log, "live", 1, 1).wait() == 0
    found = read_receipts(path, trusted(keys))
    assert [one.version for one in found] == ["0.1.0", "0.2.0", "0.1.0", "1.0.0"]
    assert [path.name for path in log.iterdir()] == ["receipts.jsonl"]


def test_process_killed_after_the_rename_leaves_the_new_log(log, keys, folder):
    killed = appender(folder, log, "die in replace", 1, 1)
    assert killed.wait() == -signal.SIGKILL
    assert appender(folder, log, "live", 1, 1).wait() == 0
    assert len(read_receipts(log / "receipts.jsonl", trusted(keys))) == 4
