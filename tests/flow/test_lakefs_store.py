"""The contract of stores on a real lakeFS server, and what only a server can suffer."""

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dinov3 import cli
from dinov3.errors import (
    AlreadyPublished,
    DinoError,
    LineageBroken,
    StoreError,
    StoreMissing,
)
from dinov3.lake import Lake
from dinov3.publish.lakefs_index import HOOK, INDEX
from dinov3.publish.lakefs_main import Change, Main
from dinov3.publish.lakefs_store import LakefsStore, open_lakefs_store
from dinov3.publish.publishing import audit_store
from dinov3.publish.releases import next_version
from dinov3.publish.store import STEPS, Entry, held_versions, read_release
from dinov3.release.files import format_sums
from tests.flow.store_contract import (
    Place,
    Publisher,
    StoreContract,
    make_thin,
    withdrawal_of,
)
from tests.lakefs_server import Server, running_server

AT_SERVER = STEPS[: STEPS.index("receipted")]  # the receipt is written to git, not to the server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("lakefs")) as found:
        yield found


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path / "lakefs") as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of publishers go into the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def enter(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


class TestLakefsStore(StoreContract):
    @pytest.fixture
    def place(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> Place:
        enter(monkeypatch, server)
        self.server = server
        return Place(f"lakefs://s{os.urandom(8).hex()}", server.environment)

    @pytest.fixture
    def small_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[int], AbstractContextManager[Place]]:
        @contextlib.contextmanager
        def make(size: int) -> Iterator[Place]:
            data = tmp_path / "small" / "data"
            data.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(data)]
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
            try:
                with running_server(data.parent) as found:
                    enter(monkeypatch, found)
                    yield Place("lakefs://small", found.environment)
            finally:
                subprocess.run(["umount", str(data)], check=True)

        return make

    def damage(self, place: Place, entry: Entry, name: str) -> None:
        with place.open().open_file(entry.model, entry.version, name) as stream:
            data = stream.read()
        path = self.stored(place, data)
        changed = bytearray(data)
        changed[len(data) // 2] ^= 1
        path.write_bytes(changed)

    def forget(self, place: Place, entry: Entry) -> None:
        untag(self.server.lake(), repo_of(place), entry)

    def spoil(self, place: Place, entry: Entry) -> None:
        name = f"withdrawals/{entry.name}.json"
        self.stored(place, self.server.lake().read(repo_of(place), "main", name)).unlink()

    def stored(self, place: Place, data: bytes) -> Path:
        """The file in which the server keeps these bytes."""
        (path,) = [
            path
            for path in (self.server.state / "data").rglob("*")
            if path.is_file() and path.read_bytes() == data and repo_of(place) in str(path)
        ]
        return path

    def remake(self, place: Place, entry: Entry, folder: Path, publisher: Publisher) -> None:
        lake, repo = self.server.lake(), repo_of(place)
        untag(lake, repo, entry)
        plant(lake, repo, release_files(folder), entry.model, entry.version)

    @pytest.mark.slow  # half a gigabyte four times through the server; its client is measured alone
    def test_memory_does_not_grow_with_the_size_of_the_weights(
        self, place: Place, publisher: Publisher, tmp_path: Path
    ):
        super().test_memory_does_not_grow_with_the_size_of_the_weights(place, publisher, tmp_path)


def repo_of(place: Place) -> str:
    return place.spec.removeprefix("lakefs://")


def untag(lake: Lake, repo: str, entry: Entry) -> None:
    tag = f"release.{entry.model}.{entry.version}"
    lake._sdk.call(tag, lake._sdk.tags.delete_tag, repo, tag)


def release_files(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def plant(lake: Lake, repo: str, files: dict[str, bytes], model: str, version: str) -> None:
    """What a holder of the server's key can do: any files, merged and tagged as a release."""
    prefix = f"releases/{model}/{version}/"
    hashes = {prefix + name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    def opened(path: str) -> tuple[io.BytesIO, int]:
        data = files[path.removeprefix(prefix)]
        return io.BytesIO(data), len(data)

    digest = hashlib.sha256(repr(files).encode()).hexdigest()
    change = Change("publish", model, version, digest, prefix, hashes, opened)
    main = Main(lake, repo)
    merged = main._land_on(main.head(), change, lambda _: None, lambda _: None)
    assert lake.tag(repo, f"release.{model}.{version}", merged.id)


def reset(lake: Lake, repo: str, commit: str) -> None:
    """Moves `main` back."""
    call = lake._sdk.models.ExperimentalApi(lake._sdk.branches.api_client).hard_reset_branch
    lake._sdk.call("main", call, repo, "main", commit)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return StoreContract.publisher.__wrapped__(None, tmp_path)  # type: ignore[attr-defined]


@pytest.fixture
def lake(server: Server) -> Lake:
    return server.lake()


@pytest.fixture
def store(lake: Lake, server: Server) -> LakefsStore:
    """On a repository that nobody protects, so that its history can be rewritten."""
    return LakefsStore(lake, server.repository())


def test_a_tag_made_again_on_another_release_is_noticed(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    first = publisher.publish(store, make_thin(tmp_path / "one"))
    last = publisher.publish(store, make_thin(tmp_path / "two", version="0.1.1"))
    repo = store._repo
    untag(lake, repo, last)
    assert lake.tag(repo, "release.vits.0.1.1", first.merged.rpartition("#")[2])
    with pytest.raises(StoreError, match=r"release\.vits\.0\.1\.1: tags no publication of it"):
        store.entries()
    with pytest.raises(StoreError, match=r"release\.vits\.0\.1\.1: tags no publication of it"):
        store.fetch("vits", "0.1.1", tmp_path / "fetched")
    assert store.fetch("vits", "0.1.0", tmp_path / "sound") == first
    findings = store.audit(publisher.receipts())
    assert any("tags no publication of it" in finding for finding in findings)
    assert any("vits@0.1.1: a receipt names it" in finding for finding in findings)


def test_a_rewritten_main_is_noticed(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    before = lake.resolve(store._repo, "main")
    folder = make_thin(tmp_path / "two", version="0.1.1")
    last = publisher.publish(store, folder)
    receipts = publisher.receipts()
    reset(lake, store._repo, before)
    with pytest.raises(StoreError, match=r"release\.vits\.0\.1\.1: .* main rewritten"):
        store.entries()
    assert any("main rewritten" in finding for finding in store.audit(receipts))
    untag(lake, store._repo, last)
    publisher.publish(store, folder)
    (finding,) = store.audit(receipts)
    assert finding.startswith("vits@0.1.1: history rewritten")


def test_an_index_rolled_back_is_noticed(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    repo = store._repo
    old = lake.read(repo, "main", INDEX)
    publisher.publish(store, make_thin(tmp_path / "two", version="0.1.1"))
    assert store.audit(publisher.receipts()) == []
    lake.create_branch(repo, "evil", lake.resolve(repo, "main"))
    lake.put(repo, "evil", INDEX, old)
    commit = lake.commit(repo, "evil", "roll back")
    lake.merge(repo, commit, "main", "roll back", {"audited_commit": commit})
    findings = store.audit(publisher.receipts())
    assert any("is no publication's" in finding for finding in findings)
    assert any("index.json is not the one of the last change" in finding for finding in findings)
    publisher.publish(store, make_thin(tmp_path / "three", version="0.1.2"))
    findings = store.audit(publisher.receipts())
    assert any("does not follow the index before it" in finding for finding in findings)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dinov3.lakefs-index/1"', b'"dinov3.lakefs-index/9"'),
        (b'"number":1', b'"number":"1"'),
        (b"{", b"["),
    ],
)
def test_an_index_of_another_form_is_never_followed(
    store: LakefsStore,
    lake: Lake,
    publisher: Publisher,
    tmp_path: Path,
    old: bytes,
    new: bytes,
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    repo = store._repo
    data = lake.read(repo, "main", INDEX).replace(old, new)
    lake.create_branch(repo, "evil", lake.resolve(repo, "main"))
    lake.put(repo, "evil", INDEX, data)
    commit = lake.commit(repo, "evil", "other form")
    lake.merge(repo, commit, "main", "other form", {"audited_commit": commit})
    with pytest.raises(LineageBroken, match=r"index\.json: no index of releases"):
        publisher.publish(store, make_thin(tmp_path / "two", version="0.1.1"))
    assert "no index of releases" in LakefsStore(lake, repo).audit(publisher.receipts())[0]


def test_a_version_that_could_not_be_published_is_not_shown(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    files = release_files(make_thin(tmp_path / "two", version="0.1.1"))
    plant(lake, store._repo, files, "vits", "01.0.0")
    with pytest.raises(StoreError, match=r"version: not MAJOR\.MINOR\.PATCH, got '01\.0\.0'"):
        store.entries()
    assert any("01.0.0" in finding for finding in store.audit(publisher.receipts()))


def test_an_audit_without_a_server_is_no_finding(
    own_server: Server, publisher: Publisher, tmp_path: Path
):
    store = LakefsStore(own_server.lake(), "models")
    publisher.publish(store, make_thin(tmp_path / "one"))
    own_server.kill()
    with pytest.raises(StoreError, match="no lakeFS server answers"):
        store.audit(publisher.receipts())


def test_a_release_planted_without_its_receipt_is_noticed(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    plant(lake, store._repo, release_files(tmp_path / "one"), "vits", "0.3.0")
    assert store.audit(publisher.receipts()) == ["vits@0.3.0: visible without a receipt"]
    with pytest.raises(LineageBroken, match="another release"):
        store.fetch("vits", "0.3.0", tmp_path / "fetched")


@pytest.mark.parametrize("name", ["../../escape", "/escape", "a/../../escape", "records"])
def test_a_name_that_leads_out_of_the_release_is_never_written(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path, name: str
):
    files = release_files(make_thin(tmp_path / "one"))
    publisher.publish(store, tmp_path / "one")
    listed = {one: hashlib.sha256(data).hexdigest() for one, data in files.items()}
    plant(lake, store._repo, {**files, name: b"x"}, "vits", "0.3.0")
    listed[name] = hashlib.sha256(b"x").hexdigest()
    plant(
        lake,
        store._repo,
        {**files, name: b"x", "SHA256SUMS": format_sums(listed)},
        "vits",
        "0.3.1",
    )
    before = sorted(tmp_path.rglob("*"))
    for version in ("0.3.0", "0.3.1"):
        with pytest.raises(DinoError, match=r"unlisted or missing|leaves its folder|cannot be"):
            store.fetch("vits", version, tmp_path / "fetched")
    assert sorted(tmp_path.rglob("*")) == before


def test_main_takes_audited_commits_only(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    repo, head = store._repo, lake.resolve(store._repo, "main")
    lake.create_branch(repo, "by-hand", head)
    lake.put(repo, "by-hand", "stray", b"1")
    commit = lake.commit(repo, "by-hand", "by hand")
    for claim in ({}, {"audited_commit": head}):
        with pytest.raises(StoreError, match=r"got 412: .*audited commits only"):
            lake.merge(repo, commit, "main", "by hand", claim)
    assert lake.resolve(repo, "main") == head


def test_a_guard_that_was_taken_away_is_put_back(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    repo = store._repo
    lake._sdk.call("hook", lake._sdk.objects.delete_object, repo, "main", HOOK)
    lake.commit(repo, "main", "no guard")
    publisher.publish(store, make_thin(tmp_path / "two", version="0.1.1"))
    assert lake.stat(repo, "main", HOOK) is not None
    (finding,) = store.audit(publisher.receipts())
    assert "is no publication's" in finding


def test_the_first_publication_protects_main(
    server: Server, lake: Lake, publisher: Publisher, tmp_path: Path
):
    store = LakefsStore(lake, f"s{os.urandom(8).hex()}")
    publisher.publish(store, make_thin(tmp_path / "one"))
    rules = lake._sdk.call("rules", lake._sdk.repositories.get_branch_protection_rules, store._repo)
    assert [rule.pattern for rule in rules] == ["main"]


def test_a_repository_that_holds_data_is_not_made_a_store(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    lake.put(store._repo, "main", "train/0.png", b"1")
    head = lake.commit(store._repo, "main", "pictures")
    with pytest.raises(StoreError, match=r"not a store of releases, holds 'train/0\.png'"):
        publisher.publish(store, make_thin(tmp_path / "one"))
    assert lake.resolve(store._repo, "main") == head


def test_something_staged_on_main_by_hand_is_said_and_nothing_published(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    lake.put(store._repo, "main", "stray", b"1")
    folder = make_thin(tmp_path / "two", version="0.1.1")
    with pytest.raises(StoreError, match="uncommitted changes"):
        publisher.publish(store, folder)
    assert [entry.version for entry in store.entries()] == ["0.1.0"]
    assert lake.branches(store._repo, "run-") == {}


def test_bytes_that_change_between_upload_and_merge_are_never_merged(
    store: LakefsStore, lake: Lake, publisher: Publisher, server: Server, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    folder = make_thin(tmp_path / "two", version="0.1.1", text="two")
    data = (folder / "README.md").read_bytes()

    def damage(step: str) -> None:
        if step == "uploaded":
            (path,) = [
                path
                for path in (server.state / "data" / store._repo).rglob("*")
                if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
            ]
            path.write_bytes(data.swapcase())

    head = lake.resolve(store._repo, "main")
    with pytest.raises(LineageBroken, match=r"README\.md: not the bytes sent"):
        publisher.publish(store, folder, on_step=damage)
    assert lake.resolve(store._repo, "main") == head


def test_bytes_that_change_between_merge_and_tag_are_never_tagged(
    store: LakefsStore, publisher: Publisher, server: Server, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    folder = make_thin(tmp_path / "two", version="0.1.1", text="2 and more")
    data = (folder / "README.md").read_bytes()

    def damage(step: str) -> None:
        if step == "merged":
            (path,) = [
                path
                for path in (server.state / "data" / store._repo).rglob("*")
                if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
            ]
            path.write_bytes(data.swapcase())

    with pytest.raises(LineageBroken, match=r"README\.md: not the bytes sent"):
        publisher.publish(store, folder, on_step=damage)
    assert [entry.version for entry in store.entries()] == ["0.1.0"]


def interrupt_at(wanted: str) -> Callable[[str], None]:
    def on_step(step: str) -> None:
        if step == wanted:
            raise KeyboardInterrupt

    return on_step


def test_a_version_held_by_a_stopped_publisher_is_named_and_finished_or_passed_over(
    server: Server,
    store: LakefsStore,
    publisher: Publisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    stopped = make_thin(tmp_path / "two", version="0.1.1", text="two")
    other = make_thin(tmp_path / "other", version="0.1.1", text="other")
    with pytest.raises(KeyboardInterrupt):
        publisher.publish(store, stopped, on_step=interrupt_at("merged"))
    digest = read_release(stopped).digest
    with pytest.raises(AlreadyPublished, match=f"{digest}, not visible yet. Publish that release"):
        publisher.publish(store, other)
    assert [entry.version for entry in store.entries()] == ["0.1.0"]
    assert [(entry.version, entry.digest) for entry in store.unfinished()] == [("0.1.1", digest)]
    built = read_release(other)
    assert next_version("vits", held_versions(store), release=built) == "0.1.2"
    assert next_version("vits", held_versions(store), release=read_release(stopped)) == "0.1.1"
    enter(monkeypatch, server)
    assert cli.run(["releases", "prune", "--store", f"lakefs://{store._repo}"]) == 0
    removed, held = capsys.readouterr().out.splitlines()
    assert removed == "0 removed"
    assert held.startswith(f"vits@0.1.1: held by release digest {digest}")
    publisher.publish(store, stopped)
    assert store.unfinished() == []
    assert store.audit(publisher.receipts()) == []


def meddled(
    store: LakefsStore, at: int, act: Callable[[], object]
) -> tuple[LakefsStore, list[str]]:
    """The store, but something happens before its client's question of that number."""
    asked: list[str] = []

    class Meddled(Lake):
        def __getattribute__(self, name: str) -> Any:
            if name in ("resolve", "tags", "log", "list"):
                asked.append(name)
                if len(asked) == at:
                    act()
            return super().__getattribute__(name)

    lake = store._lake
    keys = lake.access_key_id, lake.secret_access_key
    return LakefsStore(Meddled(lake.endpoint, *keys, lake.timeout), store._repo), asked


@pytest.mark.parametrize("at", range(1, 8))
def test_what_is_published_during_an_audit_is_no_contradiction(
    store: LakefsStore, publisher: Publisher, tmp_path: Path, at: int
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    second = make_thin(tmp_path / "two", version="0.1.1")
    receipts = publisher.receipts()
    reader, asked = meddled(store, at, lambda: publisher.publish(store, second))
    assert set(reader.audit(receipts)) <= {"vits@0.1.1: visible without a receipt"}
    assert len(asked) >= at


@pytest.mark.parametrize("at", range(1, 5))  # up to its own merge
@pytest.mark.parametrize("text", ["equal", "other"])
def test_a_version_lands_once_whenever_another_publisher_comes_in_between(
    store: LakefsStore, publisher: Publisher, tmp_path: Path, at: int, text: str
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    first = make_thin(tmp_path / "first", version="0.1.1", text="equal")
    own = make_thin(tmp_path / "own", version="0.1.1", text=text)
    late, asked = meddled(store, at, lambda: publisher.publish(store, first))
    refused = pytest.raises(AlreadyPublished, match=r"already published with other bytes.*next ver")
    with contextlib.nullcontext() if text == "equal" else refused:
        publisher.publish(late, own)
    assert len(asked) >= at
    landed = [one for one in store._main.history() if one.metadata["version"] == "0.1.1"]
    assert len(landed) == 1
    assert store.entries()[-1].digest == read_release(first).digest
    assert store.audit(publisher.receipts()) == []


@pytest.mark.parametrize("at", range(1, 7))
def test_the_first_of_two_withdrawals_stays_whenever_it_comes_in_between(
    store: LakefsStore, publisher: Publisher, tmp_path: Path, at: int
):
    entry = publisher.publish(store, make_thin(tmp_path / "one"))
    first, second = (withdrawal_of(entry, why, publisher) for why in ("first", "second"))
    late, asked = meddled(store, at, lambda: store.withdraw("vits", "0.1.0", first))
    with pytest.raises(StoreError, match="already withdrawn, because: first"):
        late.withdraw("vits", "0.1.0", second)
    assert len(asked) >= at
    assert store.withdrawals() == [first]


def test_a_withdrawal_taken_out_of_main_is_put_back_by_withdrawing_again(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    entry = publisher.publish(store, make_thin(tmp_path / "one"))
    envelope = withdrawal_of(entry, "why", publisher)
    store.withdraw("vits", "0.1.0", envelope)
    repo = store._repo
    path = "withdrawals/vits@0.1.0.json"
    lake._sdk.call("withdrawal", lake._sdk.objects.delete_object, repo, "main", path)
    lake.commit(repo, "main", "taken out")
    assert store.entries()[0].withdrawn is None
    store.withdraw("vits", "0.1.0", envelope)
    assert store.entries()[0].withdrawn == "why"


def test_a_cache_emptied_under_a_publisher_does_not_stop_it(
    store: LakefsStore, publisher: Publisher, tmp_path: Path
):
    def empty(step: str) -> None:
        if step == "uploaded":
            shutil.rmtree(tmp_path / "cache")

    publisher.publish(store, make_thin(tmp_path / "one"), on_step=empty)
    assert store.audit(publisher.receipts()) == []


def test_runs_of_another_machine_are_pruned_after_a_day(
    store: LakefsStore, lake: Lake, publisher: Publisher, tmp_path: Path
):
    publisher.publish(store, make_thin(tmp_path / "one"))
    head = lake.resolve(store._repo, "main")
    old, young = "run-20200101T000000Z-0123456789ab", "run-29990101T000000Z-0123456789ab"
    undated = "run-20209999T999999Z-0123456789ab"
    for branch in (old, young, undated, "run-of-somebody"):
        lake.create_branch(store._repo, branch, head)
    assert store.prune() == [old]
    assert sorted(lake.branches(store._repo, "run-")) == [undated, young, "run-of-somebody"]


def test_a_store_that_is_not_there_is_said_so_and_not_made_by_reading(lake: Lake, tmp_path: Path):
    store = LakefsStore(lake, "never-made")
    with pytest.raises(StoreError, match="lakefs://never-made: no store there"):
        store.entries()
    (found,) = audit_store(store, log=tmp_path / "log", keys=[], with_bytes=True)
    assert "no store there" in found
    assert not lake.has_repository("never-made")


@pytest.mark.parametrize("spec", ["lakefs://", "lakefs://a", "lakefs://A-B-C", "lakefs://abc/main"])
def test_what_is_no_name_of_a_repository_is_refused(spec: str):
    with pytest.raises(StoreError, match="store: not lakefs://REPO"):
        open_lakefs_store(spec)


class Watcher(threading.Thread):
    """A reader that polls all the while; a server that is away is no finding, all else is."""

    def __init__(self, lake: Lake, repo: str, scratch: Path) -> None:
        super().__init__()
        self._store, self._scratch = LakefsStore(lake, repo), scratch
        self._ended = threading.Event()
        self.seen: dict[str, str] = {}
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self._look()
        self._look()

    def _look(self) -> None:
        try:
            for entry in self._store.entries():
                if self.seen.setdefault(entry.name, entry.digest) != entry.digest:
                    self.wrong.append(f"{entry.name}: another digest")
                folder = self._scratch / entry.name
                self._store.fetch(entry.model, entry.version, folder)
                shutil.rmtree(folder)
        except StoreMissing:
            return
        except DinoError as error:
            away = ("no lakeFS server answers", "was lost", "is silent")
            if not any(words in str(error) for words in away):
                self.wrong.append(str(error))

    def end(self) -> None:
        self._ended.set()
        self.join()


def kill_at(server: Server, wanted: str) -> Callable[[str], None]:
    """Kills the server when a step is durable."""

    def on_step(step: str) -> None:
        if step == wanted:
            server.kill()

    return on_step


def kill_and_finish(server: Server, store: LakefsStore, publisher: Publisher, folder: Path, step):
    """A publication during which the server dies, and the one after."""
    expected = pytest.raises(StoreError, match=r"no lakeFS server answers|was lost")
    with contextlib.nullcontext() if step == "tagged" else expected:
        publisher.publish(store, folder, on_step=kill_at(server, step))
    server.start()
    release = read_release(folder)
    visible = [entry.version for entry in store.entries()]
    assert (release.version in visible) == (step == "tagged")
    assert publisher.publish(store, folder).digest == release.digest
    store.prune()
    assert store.prune() == []
    assert publisher.published().count((release.model, release.version)) == 1


@pytest.mark.parametrize("step", AT_SERVER)
def test_a_server_killed_at_a_step_leaves_nothing_half_and_a_second_run_finishes(
    own_server: Server, publisher: Publisher, tmp_path: Path, step: str
):
    store = LakefsStore(own_server.lake(), "models")
    publisher.publish(store, make_thin(tmp_path / "first"))
    watcher = Watcher(own_server.lake(), "models", tmp_path / "watcher")
    watcher.start()
    folder = make_thin(tmp_path / "release", version="0.1.1")
    kill_and_finish(own_server, store, publisher, folder, step)
    watcher.end()
    assert watcher.wrong == []
    assert watcher.seen["vits@0.1.1"] == read_release(folder).digest
    assert store.audit(publisher.receipts()) == []


@pytest.mark.slow
def test_a_reader_sees_whole_versions_only_through_twenty_server_kills(
    own_server: Server, publisher: Publisher, tmp_path: Path
):
    store = LakefsStore(own_server.lake(), "models")
    publisher.publish(store, make_thin(tmp_path / "first"))
    watcher = Watcher(own_server.lake(), "models", tmp_path / "watcher")
    watcher.start()
    for number in range(20):
        version = f"0.2.{number}"
        folder = make_thin(tmp_path / version, version=version, text=version)
        kill_and_finish(own_server, store, publisher, folder, AT_SERVER[number % len(AT_SERVER)])
    watcher.end()
    assert watcher.wrong == []
    assert len(store.entries()) == 21
    assert store.audit(publisher.receipts()) == []


@pytest.mark.slow
def test_a_server_killed_at_any_moment_leaves_a_store_that_a_second_run_finishes(
    own_server: Server, publisher: Publisher, tmp_path: Path
):
    rng = random.Random(0)
    for number in range(20):
        repo, folder = f"models-{number}", make_thin(tmp_path / str(number))
        store = LakefsStore(own_server.lake(), repo)
        watcher = Watcher(own_server.lake(), repo, tmp_path / "watcher")
        watcher.start()
        killer = threading.Timer(rng.uniform(0, 1.5), own_server.kill)
        killer.start()
        with contextlib.suppress(StoreError):
            publisher.publish(store, folder)
        killer.join()
        own_server.start()
        publisher.publish(store, folder)
        watcher.end()
        assert watcher.wrong == []
        assert store.audit(publisher.receipts()) == []


@pytest.mark.parametrize("step", ["staged", "merged"])
def test_a_server_that_hangs_ends_a_publication_in_bounded_time(
    own_server: Server, publisher: Publisher, tmp_path: Path, step: str
):
    store = LakefsStore(own_server.lake(timeout=1), "models")
    publisher.publish(store, make_thin(tmp_path / "first"))
    folder = make_thin(tmp_path / "release", version="0.1.1")
    with contextlib.ExitStack() as hanging:

        def hang(reached: str) -> None:
            if reached == step:
                hanging.enter_context(own_server.hung())

        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"is silent, got no byte for 1 s"):
            publisher.publish(store, folder, on_step=hang)
        with pytest.raises(StoreError, match=r"is silent, got no byte for 1 s"):
            store.entries()
        assert time.monotonic() - begun < 10
    assert [entry.version for entry in store.entries()] == ["0.1.0"]
    publisher.publish(store, folder)
    assert store.audit(publisher.receipts()) == []
