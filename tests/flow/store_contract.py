"""What every store of releases promises, as tests that a subclass runs on its own kind of store.

    class TestDirectoryStore(StoreContract):
        @pytest.fixture
        def place(self, tmp_path): return Place(f"directory:{tmp_path / 'store'}")

Publishers and readers are processes of their own (`tests/flow/store_process.py`): only so can one
be killed, and only so does a reader see nothing but what the store shows.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dinov3.errors import AlreadyPublished, LineageBroken, StoreError
from dinov3.publish.private_key import load_key, new_key
from dinov3.publish.signed_log import append_receipt
from dinov3.publish.store import STEPS, Entry, read_release
from dinov3.release.receipts import Receipt
from tests.flow.publishers import (
    Place,
    Process,
    Publisher,
    make_heavy,
    make_thin,
    read_report,
    run_publisher,
    start_publisher,
    start_reader,
)

BEFORE_TAG = STEPS[: STEPS.index("tagged")]
MANY_KILLS = [(step, number) for step in STEPS for number in range(10 if step in BEFORE_TAG else 5)]


def _rewrite(path: Path) -> None:
    path.write_text("edited")


def _make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


class StoreContract:
    """The promises; `place`, and the ways to hurt a store, are the subclass's."""

    @pytest.fixture
    def place(self) -> Iterator[Place]:
        """An empty store."""
        raise NotImplementedError

    @pytest.fixture
    def small_place(self) -> Callable[[int], AbstractContextManager[Place]]:
        """Makes an empty store with room for that many bytes only."""
        raise NotImplementedError

    def damage(self, place: Place, entry: Entry, name: str) -> None:
        """Changes a byte of a stored file behind the store's back."""
        raise NotImplementedError

    def forget(self, place: Place, entry: Entry) -> None:
        """Takes a release out of what is visible, as a rolled-back store would."""
        raise NotImplementedError

    def remake(self, place: Place, entry: Entry, folder: Path, publisher: Publisher) -> None:
        """Makes other bytes visible under a version that was published."""
        raise NotImplementedError

    def spoil(self, place: Place, entry: Entry) -> None:
        """Makes a stored withdrawal unreadable."""
        raise NotImplementedError

    @pytest.fixture
    def publisher(self, tmp_path: Path) -> Publisher:
        new_key("demo", tmp_path / "keys", None)
        return Publisher(load_key("demo", tmp_path / "keys"), tmp_path / "log")

    def test_what_is_published_is_listed_and_fetched_whole(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        steps: list[str] = []
        entry = publisher.publish(place.open(), folder, on_step=steps.append)
        assert steps == list(STEPS)
        assert place.open().entries() == [entry]
        assert place.open().fetch("vits", "0.1.0", tmp_path / "fetched") == entry
        assert read_release(tmp_path / "fetched") == read_release(folder)
        assert set(place.open().file_names("vits", "0.1.0")) == read_release(folder).hashes.keys()
        with place.open().open_file("vits", "0.1.0", "README.md") as stream:
            assert stream.read() == (folder / "README.md").read_bytes()

    def test_bytes_are_counted_while_they_are_copied(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        counts: list[int] = []
        publisher.publish(place.open(), folder, on_bytes=counts.append)
        assert sum(counts) == sum(path.stat().st_size for path in _files(folder))

    def test_the_same_release_again_changes_nothing(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        first = publisher.publish(place.open(), folder)
        again = publisher.publish(place.open(), folder)
        assert again == first
        assert publisher.published() == [("vits", "0.1.0")]

    def test_other_bytes_under_a_version_are_refused_with_both_digests(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        first = publisher.publish(place.open(), make_thin(tmp_path / "one"))
        other = make_thin(tmp_path / "other", text="other")
        digest = read_release(other).digest
        with pytest.raises(AlreadyPublished, match=f"{digest}.*{first.digest}.*next version"):
            publisher.publish(place.open(), other)
        assert place.open().entries() == [first]

    def test_a_receipt_is_left_for_every_publication(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        (receipt,) = publisher.receipts()
        assert receipt.release == entry.digest
        assert (receipt.audited, receipt.merged) == (entry.audited, entry.merged)
        assert place.open().audit([receipt]) == []

    def test_a_version_that_is_not_there_is_said_so(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        with pytest.raises(StoreError, match=r"vits@0\.2\.0: not in the store"):
            place.open().fetch("vits", "0.2.0", tmp_path / "fetched")
        with pytest.raises(StoreError, match="has no file 'absent'"):
            place.open().open_file("vits", "0.1.0", "absent")
        with pytest.raises(StoreError, match="not MAJOR"):
            place.open().fetch("vits", "../0.1.0", tmp_path / "fetched")

    def test_a_folder_that_is_there_is_never_fetched_over(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").write_text("keep")
        with pytest.raises(StoreError, match="already there"):
            place.open().fetch("vits", "0.1.0", tmp_path / "mine")
        assert (tmp_path / "mine" / "notes").read_text() == "keep"

    def test_a_folder_that_is_no_release_is_refused(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        publisher.publish(place.open(), folder)
        with pytest.raises(StoreError, match="cannot be read as a release"):
            publisher.publish(place.open(), tmp_path / "nowhere")

    def test_what_is_edited_later_does_not_reach_the_store(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        entry = publisher.publish(place.open(), folder)
        with (folder / "README.md").open("r+b") as stream:
            stream.write(b"edited in place")
        assert place.open().fetch("vits", "0.1.0", tmp_path / "fetched").digest == entry.digest

    def test_stored_bytes_that_changed_are_found_by_fetching(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        self.damage(place, entry, "README.md")
        with pytest.raises(LineageBroken, match=r"vits@0\.1\.0.*README\.md"):
            place.open().fetch("vits", "0.1.0", tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()
        assert not list(tmp_path.glob(".fetched*"))

    def test_a_rolled_back_store_contradicts_its_receipts(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "one"))
        last = publisher.publish(place.open(), make_thin(tmp_path / "two", version="0.1.1"))
        self.forget(place, last)
        findings = place.open().audit(publisher.receipts())
        assert any("vits@0.1.1: a receipt names it" in finding for finding in findings)

    def test_a_version_made_again_with_other_bytes_contradicts_its_receipt(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "one"))
        last = publisher.publish(place.open(), make_thin(tmp_path / "two", version="0.1.1"))
        other = make_thin(tmp_path / "other", version="0.1.1", text="other")
        receipts = publisher.receipts()
        self.remake(place, last, other, publisher)
        findings = place.open().audit(receipts)
        assert any("vits@0.1.1: made again" in finding for finding in findings)

    def test_a_release_without_a_receipt_is_found(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "one"))
        receipts = publisher.receipts()
        publisher.publish(place.open(), make_thin(tmp_path / "two", version="0.1.1"))
        assert place.open().audit(receipts) == ["vits@0.1.1: visible without a receipt"]

    def test_a_withdrawal_shows_and_stays(self, place: Place, publisher: Publisher, tmp_path: Path):
        entry = publisher.publish(place.open(), make_thin(tmp_path / "release"))
        envelope = withdrawal_of(entry, "trained on the test set", publisher)
        place.open().withdraw("vits", "0.1.0", envelope)
        (shown,) = place.open().entries()
        assert shown.withdrawn == "trained on the test set"
        assert place.open().withdrawals() == [envelope]
        assert place.open().audit(publisher.receipts()) == []
        place.open().withdraw("vits", "0.1.0", envelope)
        with pytest.raises(StoreError, match="already withdrawn"):
            place.open().withdraw("vits", "0.1.0", withdrawal_of(entry, "other", publisher))

    def test_a_withdrawal_of_another_release_is_not_attached(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        one = publisher.publish(place.open(), make_thin(tmp_path / "one"))
        publisher.publish(place.open(), make_thin(tmp_path / "two", version="0.1.1"))
        with pytest.raises(StoreError, match=r"the withdrawal names vits@0\.1\.0"):
            place.open().withdraw("vits", "0.1.1", withdrawal_of(one, "why", publisher))

    def test_an_unreadable_withdrawal_hides_no_other_and_its_release_does_not_look_sound(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        entries = [
            publisher.publish(place.open(), make_thin(tmp_path / version, version=version))
            for version in ("0.1.0", "0.1.1", "0.1.2")
        ]
        envelopes = [withdrawal_of(entry, "why", publisher) for entry in entries[:2]]
        for entry, envelope in zip(entries, envelopes, strict=False):
            place.open().withdraw(entry.model, entry.version, envelope)
        self.spoil(place, entries[0])
        first, second, third = place.open().entries()
        assert str(first.withdrawn).startswith("a withdrawal that says nothing: ")
        assert (second.withdrawn, third.withdrawn) == ("why", None)
        assert envelopes[1] in place.open().withdrawals()
        findings = place.open().audit(publisher.receipts())
        assert any("vits@0.1.0: a withdrawal that says nothing" in one for one in findings)
        assert not any("vits@0.1.1" in one or "vits@0.1.2" in one for one in findings)
        publisher.publish(place.open(), make_thin(tmp_path / "fourth", version="0.1.3"))

    def test_what_is_fetched_is_on_the_disk_before_it_appears(
        self, place: Place, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "release"))
        synced, fsync = set(), os.fsync

        def note(descriptor: int) -> None:
            synced.add(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        fetched = tmp_path / "to" / "fetched"
        place.open().fetch("vits", "0.1.0", fetched)
        places = [fetched.parent, fetched, *fetched.rglob("*")]
        assert [place for place in places if place.stat().st_ino not in synced] == []

    @pytest.mark.parametrize("change", [Path.unlink, _rewrite, _make_link])
    def test_a_release_that_changes_while_it_is_published_is_said_so_and_not_visible(
        self,
        place: Place,
        publisher: Publisher,
        tmp_path: Path,
        change: Callable[[Path], None],
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        folder = make_thin(tmp_path / "release", version="0.1.1")

        def on_step(step: str) -> None:
            if step == "staged":
                change(folder / "README.md")

        with pytest.raises(StoreError, match=r"changed while it was published.*Run it again"):
            publisher.publish(place.open(), folder, on_step=on_step)
        assert [entry.version for entry in place.open().entries()] == ["0.1.0"]
        assert place.open().prune() == []

    def test_racing_publishers_of_the_same_bytes_all_succeed(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_thin(tmp_path / "release")
        racers = [start_publisher(place, folder, publisher) for _ in range(4)]
        ends = [racer.end() for racer in racers]
        assert [status for status, _, _ in ends] == [0] * 4, ends
        (entry,) = place.open().entries()
        assert entry.digest == read_release(folder).digest
        assert publisher.published() == [("vits", "0.1.0")]

    def test_one_of_racing_publishers_of_other_bytes_wins(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folders = [make_thin(tmp_path / str(at), text=str(at)) for at in range(4)]
        racers = [start_publisher(place, folder, publisher) for folder in folders]
        ends = [racer.end() for racer in racers]
        assert sorted(status for status, _, _ in ends) == [0, 1, 1, 1], ends
        (entry,) = place.open().entries()
        winner = [status for status, _, _ in ends].index(0)
        assert entry.digest == read_release(folders[winner]).digest
        losers = [errors for status, _, errors in ends if status]
        assert all(entry.digest in errors and "next version" in errors for errors in losers)

    def test_publishers_of_different_models_all_succeed_at_once(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        models = ["vits", "convnext", "highres", "pretrained"]
        folders = [make_thin(tmp_path / model, model=model) for model in models]
        racers = [start_publisher(place, folder, publisher) for folder in folders]
        ends = [racer.end() for racer in racers]
        assert [status for status, _, _ in ends] == [0] * 4, ends
        assert sorted(entry.model for entry in place.open().entries()) == sorted(models)
        assert place.open().audit(publisher.receipts()) == []

    @pytest.mark.parametrize("step", STEPS)
    def test_a_publisher_killed_at_a_step_leaves_nothing_half_and_a_second_run_finishes(
        self, place: Place, publisher: Publisher, tmp_path: Path, step: str
    ):
        first = publisher.publish(place.open(), make_thin(tmp_path / "first"))
        folder = make_thin(tmp_path / "release", version="0.1.1")
        with start_reader(place, tmp_path / "reader") as reader:
            self._kill_and_finish(place, publisher, folder, step)
            report = read_report(reader)
        assert report["wrong"] == []
        assert report["seen"]["vits@0.1.0"] == [first.digest]

    @pytest.mark.slow
    def test_a_reader_sees_whole_versions_only_through_fifty_kills(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        with start_reader(place, tmp_path / "reader") as reader:
            for number, (step, _) in enumerate(MANY_KILLS):
                version = f"0.2.{number}"
                folder = make_thin(tmp_path / version, version=version, text=version)
                self._kill_and_finish(place, publisher, folder, step)
            report = read_report(reader)
        assert report["wrong"] == []
        assert len(report["seen"]) == len(MANY_KILLS) + 1
        assert all(len(digests) == 1 for digests in report["seen"].values())
        assert len(place.open().entries()) == len(MANY_KILLS) + 1
        assert place.open().audit(publisher.receipts()) == []

    @pytest.mark.parametrize("at_bytes", [1, 3000])
    def test_a_publisher_killed_in_the_middle_of_copying_leaves_nothing_visible(
        self, place: Place, publisher: Publisher, tmp_path: Path, at_bytes: int
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        folder = make_thin(tmp_path / "release", version="0.1.1")
        status, _, errors = run_publisher(place, folder, publisher, f"bytes:{at_bytes}")
        assert status == -signal.SIGKILL, errors
        assert [entry.version for entry in place.open().entries()] == ["0.1.0"]
        assert place.open().prune() != []
        publisher.publish(place.open(), folder)
        assert place.open().prune() == []

    def _kill_and_finish(self, place: Place, publisher: Publisher, folder: Path, step: str) -> None:
        release = read_release(folder)
        status, _, errors = run_publisher(place, folder, publisher, step)
        assert status == -signal.SIGKILL, errors
        visible = [entry for entry in place.open().entries() if entry.version == release.version]
        assert bool(visible) == (step not in BEFORE_TAG)
        status, report, errors = run_publisher(place, folder, publisher)
        assert status == 0, errors
        assert report["digest"] == release.digest
        assert place.open().unfinished() == []
        place.open().prune()
        assert place.open().prune() == []
        assert publisher.published().count((release.model, release.version)) == 1
        assert place.open().audit(publisher.receipts()) == []

    def test_prune_leaves_a_live_publisher_alone(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        publisher.publish(place.open(), make_thin(tmp_path / "first"))
        dead = make_thin(tmp_path / "dead", version="0.1.1")
        run_publisher(place, dead, publisher, "read_back")
        live = make_thin(tmp_path / "live", version="0.1.2")
        removed: list[list[str]] = []

        def prune(step: str) -> None:
            removed.append(place.open().prune())

        publisher.publish(place.open(), live, on_step=prune)
        assert removed[0] != []
        assert removed[1:] == [[]] * (len(STEPS) - 1)
        place.open().fetch("vits", "0.1.2", tmp_path / "fetched")

    def test_a_full_disk_stops_a_publication_and_a_second_run_finishes(
        self,
        small_place: Callable[[int], AbstractContextManager[Place]],
        publisher: Publisher,
        tmp_path: Path,
    ):
        big = make_heavy(tmp_path / "big", 12_000_000)
        with small_place(8_000_000) as place:
            first = make_thin(tmp_path / "first", model="convnext")
            publisher.publish(place.open(), first)
            with pytest.raises(StoreError, match="space"):
                publisher.publish(place.open(), big)
            assert [entry.model for entry in place.open().entries()] == ["convnext"]
            second = make_thin(tmp_path / "second", model="convnext", version="0.1.1")
            place.open().prune()
            publisher.publish(place.open(), second)
            assert place.open().audit(publisher.receipts()) == []

    def test_memory_does_not_grow_with_the_size_of_the_weights(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        folder = make_heavy(tmp_path / "release", 400_000_000)
        status, report, errors = run_publisher(place, folder, publisher)
        assert status == 0, errors
        fetcher = Process(place, "fetch", place.spec, "vits@0.1.0", tmp_path / "fetched")
        status, output, errors = fetcher.end()
        assert status == 0, errors
        fetched = json.loads(output.splitlines()[-1])
        assert fetched["digest"] == report["digest"]
        peaks = {"publish": report["peak_bytes"], "fetch": fetched["peak_bytes"]}
        assert max(peaks.values()) <= 300e6, peaks


def withdrawal_of(entry: Entry, reason: str, publisher: Publisher) -> bytes:
    receipt = Receipt(
        "withdraw",
        entry.model,
        entry.version,
        entry.digest,
        audited=entry.audited,
        merged=entry.merged,
        reason=reason,
    )
    return append_receipt(publisher.log, receipt, publisher.key).envelope


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
