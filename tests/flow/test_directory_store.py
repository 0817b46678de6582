"""The contract of stores on the embedded store, and what only a folder can suffer."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from dinov3.errors import LineageBroken, StoreError
from dinov3.publish import directory_store
from dinov3.publish.directory_store import DirectoryStore
from dinov3.publish.publishing import audit_store
from dinov3.publish.store import Entry
from tests.flow.publishers import (
    Place,
    Publisher,
    make_thin,
    read_report,
    run_publisher,
    start_reader,
)
from tests.flow.store_contract import StoreContract, withdrawal_of


class TestDirectoryStore(StoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(f"directory:{tmp_path / 'store'}")

    @pytest.fixture
    def small_place(self, tmp_path: Path) -> Callable[[int], AbstractContextManager[Place]]:
        @contextlib.contextmanager
        def make(size: int) -> Iterator[Place]:
            folder = tmp_path / "small"
            folder.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
            try:
                yield Place(f"directory:{folder / 'store'}")
            finally:
                subprocess.run(["umount", str(folder)], check=True)

        return make

    def damage(self, place: Place, entry: Entry, name: str) -> None:
        path = _root(place) / "objects" / entry.digest / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def forget(self, place: Place, entry: Entry) -> None:
        _last_line(place).unlink()

    def spoil(self, place: Place, entry: Entry) -> None:
        (_root(place) / "withdrawals" / f"{entry.name}.json").write_bytes(b"{}")

    def remake(self, place: Place, entry: Entry, folder: Path, publisher: Publisher) -> None:
        self.forget(place, entry)
        place.open().publish(folder, log=publisher.log / "elsewhere", key=publisher.key)

    @pytest.mark.slow
    def test_a_publisher_killed_before_any_change_of_the_disk_leaves_nothing_half(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        second = make_thin(tmp_path / "second", version="0.1.1")
        num_changes = run_publisher(place, second, publisher)[1]["events"]
        assert num_changes > 15
        with start_reader(place, tmp_path / "reader") as reader:
            for number in range(1, num_changes + 1):
                folder = make_thin(tmp_path / f"{number}", version=f"0.2.{number}")
                _kill_and_finish(place, publisher, folder, number)
            report = read_report(reader)
        assert report["wrong"] == []
        assert len(report["seen"]) == num_changes + 2
        assert len(publisher.published()) == num_changes + 2

    @pytest.mark.slow
    def test_a_publisher_killed_while_it_makes_the_store_leaves_one_that_can_be_used(
        self, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        place = Place(f"directory:{tmp_path / 'whole'}")
        num_changes = run_publisher(place, folder, publisher)[1]["events"]
        for number in range(1, num_changes + 1):
            place = Place(f"directory:{tmp_path / f'store {number}'}")
            own = replace(publisher, log=tmp_path / f"log {number}")
            _kill_and_finish(place, own, folder, number)

    def test_an_entry_taken_out_of_the_index_is_noticed(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        for version in ("0.1.0", "0.1.1", "0.1.2"):
            publisher.publish(place.open(), make_thin(tmp_path / version, version=version))
        (_root(place) / "index" / "000002.json").unlink()
        with pytest.raises(StoreError, match=r"000002\.json: .* an entry is gone"):
            place.open().entries()
        assert "the index is broken" in place.open().audit(publisher.receipts())[0]

    def test_an_entry_rewritten_in_the_index_is_noticed(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        for version in ("0.1.0", "0.1.1"):
            publisher.publish(place.open(), make_thin(tmp_path / version, version=version))
        first = _root(place) / "index" / "000001.json"
        first.write_bytes(first.read_bytes().replace(b'"0.1.0"', b'"0.3.0"'))
        with pytest.raises(StoreError, match=r"000002\.json: .* does not follow"):
            place.open().entries()

    @pytest.mark.parametrize(
        ("old", "new"),
        [(b'"digest":"', b'"digest":"../'), (b'"vits"', b'"../vits"'), (b"{", b"[")],
    )
    def test_an_entry_of_another_form_is_never_followed(
        self, place: Place, publisher: Publisher, tmp_path: Path, old: bytes, new: bytes
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        line = _last_line(place)
        line.write_bytes(line.read_bytes().replace(old, new, 1))
        with pytest.raises(StoreError, match=r"index is broken|cannot be read|model: not a"):
            place.open().fetch("vits", "0.1.0", tmp_path / "fetched")

    def test_a_link_planted_in_the_store_is_not_read(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        path = _root(place) / "objects" / entry.digest / "README.md"
        path.unlink()
        path.symlink_to("/etc/hostname")
        with pytest.raises(LineageBroken, match=r"README\.md: a link"):
            place.open().fetch("vits", "0.1.0", tmp_path / "fetched")
        with pytest.raises(LineageBroken, match=r"README\.md: a link"):
            place.open().open_file("vits", "0.1.0", "README.md")

    @pytest.mark.parametrize("name", ["store.json", "index/000001.json"])
    def test_a_pipe_or_a_giant_planted_in_the_store_is_not_waited_for(
        self, place: Place, publisher: Publisher, tmp_path: Path, name: str
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        path = _root(place) / name
        path.unlink()
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(StoreError, match="larger than"):
            place.open().entries()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(StoreError, match=r"not a regular file|no store there"):
            place.open().entries()

    def test_a_pipe_in_place_of_a_lock_is_not_waited_for(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        (_root(place) / "lock").unlink()
        os.mkfifo(_root(place) / "lock")
        (_root(place) / "runs" / "file").write_text("no run")
        (_root(place) / "runs" / "pipe").mkdir()
        os.mkfifo(_root(place) / "runs" / "pipe" / "lock")
        assert place.open().prune() == ["runs/file", "runs/pipe"]
        publisher.publish(place.open(), make_thin(tmp_path / "next", version="0.1.1"))

    def test_a_giant_planted_beside_a_release_is_not_copied(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        with (_root(place) / "objects" / entry.digest / "giant").open("wb") as stream:
            stream.truncate(1 << 28)
        counts: list[int] = []
        with pytest.raises(LineageBroken, match="giant: SHA256SUMS does not list it"):
            place.open().fetch("vits", "0.1.0", tmp_path / "fetched", on_bytes=counts.append)
        assert counts == []

    def test_a_file_in_place_of_a_release_is_damage(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        folder = _root(place) / "objects" / entry.digest
        shutil.rmtree(folder)
        folder.write_text("a file")
        with pytest.raises(LineageBroken, match=r"vits@0\.1\.0: the store's copy is damaged"):
            place.open().open_file("vits", "0.1.0", "README.md")
        findings = audit_store(place.open(), log=publisher.log, keys=[publisher.key.public])
        assert findings == ["vits@0.1.0: visible, but its files are gone"]

    @pytest.mark.parametrize("name", ["runs/events", "objects/mine", "notes"])
    def test_a_folder_in_other_use_is_not_made_a_store(
        self, place: Place, publisher: Publisher, tmp_path: Path, name: str
    ):
        mine = _root(place) / name
        mine.parent.mkdir(parents=True)
        mine.write_text("kept")
        with pytest.raises(StoreError, match=r"not a store of releases, holds .* of its own"):
            publisher.publish(place.open(), make_thin(tmp_path / "release"))
        assert [path for path in _root(place).rglob("*") if path.is_file()] == [mine]

    def test_a_planted_name_cannot_steer_a_terminal(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        (_root(place) / "objects" / entry.digest / "\x1b[2J").write_text("planted")
        with pytest.raises(LineageBroken) as caught:
            place.open().fetch("vits", "0.1.0", tmp_path / "fetched")
        assert str(caught.value).isprintable()

    def test_a_store_that_is_not_there_is_said_so_and_not_made_by_reading(self, place: Place):
        with pytest.raises(StoreError, match="no store there"):
            place.open().entries()
        assert place.open().audit([]) != []
        assert not _root(place).exists()

    def test_a_moved_store_keeps_its_receipts(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        _root(place).rename(tmp_path / "moved")
        moved = Place(f"directory:{tmp_path / 'moved'}").open()
        assert moved.audit(publisher.receipts()) == []

    def test_a_store_made_anew_has_no_receipts(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        release = make_thin(tmp_path / "release")
        publisher.publish(place.open(), release)
        receipts = publisher.receipts()
        anew = Place(f"directory:{tmp_path / 'anew'}").open()
        publisher.publish(anew, release)
        assert "no receipt of this log speaks of this store" in anew.audit(receipts)[0]

    def test_stored_files_share_nothing_with_the_users_files(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        assert all(path.stat().st_nlink == 1 for path in files)

    def test_a_damaged_leftover_is_not_made_visible(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        folder = make_thin(tmp_path / "release", version="0.1.1")
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(place.open(), folder, on_step=_interrupt_at("merged"))
        (leftover,) = [
            path
            for path in (_root(place) / "objects").iterdir()
            if "0.1.1" in (path / "release.json").read_text()
        ]
        (leftover / "README.md").write_text("damaged")
        with pytest.raises(StoreError, match="read back with other bytes"):
            publisher.publish(place.open(), folder)
        assert place.open().prune() == [f"objects/{leftover.name}"]
        publisher.publish(place.open(), folder)

    def test_a_release_whose_files_were_lost_is_restored_by_publishing_it_again(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        entry = publisher.publish(place.open(), folder)
        shutil.rmtree(_root(place) / "objects" / entry.digest)
        assert place.open().audit(publisher.receipts()) == [
            "vits@0.1.0: visible, but its files are gone"
        ]
        assert publisher.publish(place.open(), folder) == entry
        place.open().fetch("vits", "0.1.0", tmp_path / "fetched")

    def test_what_is_published_and_withdrawn_during_an_audit_is_no_contradiction(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        receipts = publisher.receipts()

        class Meddled(DirectoryStore):
            def entries(self) -> list[Entry]:
                found = super().entries()
                late = publisher.publish(place.open(), make_thin(tmp_path / "2", version="0.1.1"))
                place.open().withdraw("vits", "0.1.1", withdrawal_of(late, "why", publisher))
                return found

        assert Meddled(_root(place)).audit(receipts) == []

    def test_a_stopped_publisher_holds_no_version(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        run_publisher(place, make_thin(tmp_path / "one", version="0.1.1"), publisher, "merged")
        assert place.open().unfinished() == []
        other = make_thin(tmp_path / "other", version="0.1.1", text="other")
        publisher.publish(place.open(), other)

    def test_a_lock_that_is_never_let_go_ends_in_an_error(
        self, place: Place, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        monkeypatch.setattr(directory_store, "LOCK_WAIT", 0.1)
        with (_root(place) / "lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            with pytest.raises(StoreError, match="held for"):
                place.open().prune()


def _kill_and_finish(place: Place, publisher: Publisher, folder: Path, number: int) -> None:
    """Kills a publisher before its change of that number, then lets another finish."""
    status, _, errors = run_publisher(place, folder, publisher, f"event:{number}")
    assert status == -signal.SIGKILL, (number, errors)
    status, _, errors = run_publisher(place, folder, publisher)
    assert status == 0, (number, errors)
    place.open().prune()
    assert place.open().prune() == []
    assert not list(_root(place).glob(".*"))
    assert place.open().audit(publisher.receipts()) == []


def _interrupt_at(wanted: str) -> Callable[[str], None]:
    def on_step(step: str) -> None:
        if step == wanted:
            raise KeyboardInterrupt

    return on_step


def _root(place: Place) -> Path:
    return Path(place.spec.removeprefix("directory:"))


def _last_line(place: Place) -> Path:
    return max((_root(place) / "index").glob("*.json"))
