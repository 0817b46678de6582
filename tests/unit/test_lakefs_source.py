"""Sources in lakeFS: pinned by a commit, judged by their listing, loud when the server is away."""

import json
import pickle
import socket
import subprocess
import sys
import threading

import pytest

from dinov3.cli_lake import main as lake
from dinov3.data import sources
from dinov3.data.sources import Entry, ImageSource, open_source
from dinov3.data.sources import lakefs as module
from dinov3.data.sources.entries import StoredEntry
from dinov3.data.sources.fingerprint import Fingerprint, refresh
from dinov3.data.sources.verb import main as source_verb
from dinov3.errors import DataError, StoreError

COMMIT = "0123456789abcdef" * 4
KEYS = {"LAKEFS_ACCESS_KEY_ID": "key", "LAKEFS_SECRET_ACCESS_KEY": "hidden-secret"}


@pytest.fixture
def endpoint(monkeypatch):
    """Points the process at a place."""

    def point(url, timeout="0.3"):
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LAKEFS_ENDPOINT", url)
        monkeypatch.setenv("LAKEFS_TIMEOUT", timeout)
        monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))

    return point


@pytest.mark.parametrize("ref", ["main", "v1.0", COMMIT[:12], f"{COMMIT}~1", COMMIT.upper()])
def test_what_is_not_a_whole_commit_id_is_refused_with_the_way_out(ref):
    words = f"names a branch or a tag.*python -m dinov3 lake pin pictures/{ref}/cats\\.$"
    with pytest.raises(DataError, match=words) as caught:
        open_source(f"lakefs://pictures/{ref}/cats/")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("spec", ["lakefs:pictures", "lakefs://pictures", "lakefs:///main/x"])
def test_what_is_no_address_is_one_clear_error(spec):
    with pytest.raises(DataError, match=r"not of the form lakefs://REPO/COMMIT/PREFIX"):
        open_source(spec)


def test_kind_names_the_commit_and_one_folder_however_it_is_written():
    kinds = {
        open_source(f"lakefs://pictures/{COMMIT}/{path}").kind
        for path in ("a b/cats", "a b/cats/", "/a b/cats//")
    }
    assert kinds == {f"lakefs://pictures/{COMMIT}/a b/cats/"}
    assert open_source(f"lakefs://pictures/{COMMIT}").kind == f"lakefs://pictures/{COMMIT}/"


def test_opening_asks_nobody_and_needs_no_key(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAKEFS_ENDPOINT", raising=False)
    source = open_source(f"lakefs://pictures/{COMMIT}/cats")
    with pytest.raises(StoreError, match=r"LAKEFS_ENDPOINT: not set.*make lakefs"):
        next(source.entries())


def test_keys_do_not_travel_with_the_source(endpoint):
    endpoint("http://127.0.0.1:9")
    source = open_source(f"lakefs://pictures/{COMMIT}/cats")
    with pytest.raises(StoreError, match="no lakeFS server answers"):
        source.read("a.png")
    sent = pickle.dumps(source)
    assert b"hidden-secret" not in sent
    assert pickle.loads(sent).kind == source.kind


def test_dead_server_is_one_sentence_and_never_an_unreadable_picture(endpoint):
    with socket.socket() as taken:  # bound, not listening: nobody answers, nobody else takes it
        taken.bind(("127.0.0.1", 0))
        endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}")
        source = open_source(f"lakefs://pictures/{COMMIT}/cats")
        with pytest.raises(StoreError, match=r"no lakeFS server answers.*make lakefs"):
            next(source.entries())
        with pytest.raises(StoreError, match=r"no lakeFS server answers.*make lakefs"):
            source.read("a.png")


class Silent(threading.Thread):
    """Takes connections and says nothing, or hangs up on them."""

    def __init__(self, *, hang_up):
        super().__init__()
        self.num_calls, self.hang_up, self.kept = 0, hang_up, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self):
        while True:
            connection, _ = self.server.accept()
            if self.num_calls < 0:
                connection.close()
                return
            self.num_calls += 1
            connection.recv(65536)
            if self.hang_up:
                connection.close()
            else:
                self.kept.append(connection)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.num_calls, calls = -1, self.num_calls
        socket.create_connection(self.server.getsockname()).close()
        self.join()
        for connection in (*self.kept, self.server):
            connection.close()
        self.num_calls = calls


def test_silent_server_is_given_its_time_once(endpoint):
    with Silent(hang_up=False) as server:
        endpoint(server.url)
        with pytest.raises(StoreError, match=r"is silent, got no byte for 0\.3 s"):
            open_source(f"lakefs://pictures/{COMMIT}/cats").read("a.png")
    assert server.num_calls == 1


def test_lost_connection_is_tried_again_a_few_times(endpoint):
    with Silent(hang_up=True) as server:
        endpoint(server.url)
        with pytest.raises(StoreError, match=r"the connection to .* was lost"):
            open_source(f"lakefs://pictures/{COMMIT}/cats").read("a.png")
    assert server.num_calls == 3


class Vouched(ImageSource):
    """A pinned source that counts how often it is listed and cannot be read."""

    kind = "vouched:1"
    is_pinned = True
    num_listings = 0
    pictures = (
        StoredEntry("a.png", "cat", address="x:1", size=5),
        Entry("b.png", refused="too large"),
    )

    def entries(self):
        Vouched.num_listings += 1
        yield from self.pictures

    def read(self, path):
        raise RuntimeError(path)

    def file_of(self, path):
        raise RuntimeError(path)


@pytest.fixture
def vouched(monkeypatch):
    monkeypatch.setitem(sources._OPENERS, "vouched", lambda _: Vouched())
    monkeypatch.setattr(Vouched, "num_listings", 0)


def test_pinned_source_is_fingerprinted_unread_and_listed_once(vouched, tmp_path):
    places = tmp_path / "f.json", tmp_path / "cache" / "c.sqlite"
    first = refresh("vouched:1", *places)
    assert refresh("vouched:1", *places) == first == json.loads(places[0].read_text())
    assert Vouched.num_listings == 1
    assert (first["source"], first["num_files"], first["bytes"]) == ("vouched:1", 2, 5)


def test_fingerprint_of_what_was_read_equals_that_of_the_listing(vouched, tmp_path):
    listed = refresh("vouched:1", tmp_path / "f.json", tmp_path / "c.sqlite")
    read = Fingerprint("vouched:1")
    for entry, identity in zip(Vouched.pictures, ("sha256 of the bytes", "too large"), strict=True):
        read.add(entry, identity, getattr(entry, "size", 0))
    assert read.value() == listed


def test_other_address_is_another_fingerprint(vouched, tmp_path, monkeypatch):
    first = refresh("vouched:1", tmp_path / "f.json", tmp_path / "c.sqlite")
    monkeypatch.setattr(Vouched, "kind", "vouched:2")
    monkeypatch.setattr(Vouched, "pictures", (StoredEntry("a.png", "cat", address="x:2", size=5),))
    second = refresh("vouched:2", tmp_path / "f.json", tmp_path / "c.sqlite")
    assert second["sha256"] != first["sha256"]


def test_refresh_may_keep_the_last_look_where_the_source_is_away(tmp_path, capsys):
    params = tmp_path / "params.yaml"
    params.write_text(f"source: folder:{tmp_path}/gone\n")
    refreshing = ["--refresh", "--params", str(params)]
    assert source_verb([*refreshing, "--keep"]) == 2  # there was no look yet
    seen = tmp_path / "data" / "raw_images" / "fingerprint.json"
    seen.parent.mkdir(parents=True)
    seen.write_text('{"source":"folder"}')
    assert source_verb(refreshing) == 2
    capsys.readouterr()
    assert source_verb([*refreshing, "--keep"]) == 0
    said = capsys.readouterr()
    assert said.out == '{"source":"folder"}'
    assert "no such folder" in said.err
    assert f"{seen}: taken as it was last seen" in said.err


def test_lake_verbs_say_what_is_wrong_with_a_place(capsys, endpoint, tmp_path):
    endpoint("http://127.0.0.1:9")
    assert lake(["pin", "pictures", "--params", str(tmp_path / "p.yaml")]) == 2
    assert "place: not of the form REPO/BRANCH[/PREFIX], got 'pictures'" in capsys.readouterr().err
    assert lake(["put", str(tmp_path), "pictures/main"]) == 2
    assert "no lakeFS server answers" in capsys.readouterr().err


def test_listing_code_loads_no_client_until_a_source_is_in_lakefs():
    code = (
        "import sys, dinov3.data.sources.verb, dinov3.data.sources.fingerprint; "
        "print(sorted({'urllib3', 'lakefs_sdk', 'dinov3.lake'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
