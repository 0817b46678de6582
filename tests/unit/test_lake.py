"""The lakeFS client where no server is needed: addresses, settings, bounds of time, sentences."""

import contextlib
import hashlib
import importlib
import io
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dinov3.errors import StoreError
from dinov3.lake import Address, Lake, parse_address
from dinov3.lake.refusal import detail_of, refused
from dinov3.lake.wire import Outgoing, Pace

COMMIT = "0123456789abcdef" * 4


@contextlib.contextmanager
def peer(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats its one connection so; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                speak(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def client(endpoint: str, timeout: float = 0.3) -> Lake:
    importlib.import_module("lakefs_sdk")  # its seconds are not the server's
    return Lake(endpoint, "key", "secret", timeout)


def test_address_names_repository_ref_and_path():
    assert parse_address("lakefs://data/main/train/a b.png") == Address(
        "data", "main", "train/a b.png"
    )
    assert parse_address("lakefs://data/main") == Address("data", "main", "")


def test_only_a_whole_commit_id_is_pinned():
    assert parse_address(f"lakefs://data/{COMMIT}/train").is_pinned
    for ref in ("main", "release.vits.0.1.0", COMMIT[:-1], COMMIT.upper(), f"{COMMIT}~1"):
        assert not parse_address(f"lakefs://data/{ref}/train").is_pinned


@pytest.mark.parametrize("url", ["lakefs://data", "s3://data/main/x", "lakefs:///main/x", "data"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(StoreError, match="address: not of the form lakefs://REPO/REF/PATH"):
        parse_address(url)


def test_settings_come_from_the_environment():
    lake = Lake.connect(
        {
            "LAKEFS_ENDPOINT": "http://localhost:1/api/v1/",
            "LAKEFS_ACCESS_KEY_ID": "a",
            "LAKEFS_SECRET_ACCESS_KEY": "b",
            "LAKEFS_TIMEOUT": "7.5",
        }
    )
    assert lake == Lake("http://localhost:1", "a", "b", 7.5)


def test_without_settings_the_server_of_this_checkout_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="LAKEFS_ENDPOINT: not set"):
        Lake.connect({})
    (tmp_path / ".dinov3" / "lakefs").mkdir(parents=True)
    (tmp_path / ".dinov3" / "lakefs" / "env").write_text(
        "LAKEFS_ENDPOINT=http://127.0.0.1:5\nLAKEFS_ACCESS_KEY_ID=a\nLAKEFS_SECRET_ACCESS_KEY=b=\n"
    )
    assert Lake.connect({}) == Lake("http://127.0.0.1:5", "a", "b=")


def test_a_named_server_never_gets_the_key_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dinov3" / "lakefs").mkdir(parents=True)
    (tmp_path / ".dinov3" / "lakefs" / "env").write_text("LAKEFS_ACCESS_KEY_ID=a\n")
    with pytest.raises(StoreError, match="LAKEFS_ACCESS_KEY_ID: not set"):
        Lake.connect({"LAKEFS_ENDPOINT": "http://elsewhere"})


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_senseless_timeout_is_refused(text):
    settings = {
        "LAKEFS_ENDPOINT": "http://x",
        "LAKEFS_ACCESS_KEY_ID": "a",
        "LAKEFS_SECRET_ACCESS_KEY": "b",
    }
    with pytest.raises(StoreError, match="LAKEFS_TIMEOUT: not a number of seconds"):
        Lake.connect({**settings, "LAKEFS_TIMEOUT": text})


def test_the_secret_is_never_shown():
    assert "secret" not in repr(Lake("http://x", "key", "s3cr3t")).replace("secret_access_key", "")
    assert "s3cr3t" not in repr(Lake("http://x", "key", "s3cr3t"))


def test_a_client_can_be_pickled():
    lake = client("http://x")
    assert pickle.loads(pickle.dumps(lake)) == lake


def test_the_sdk_is_imported_only_when_a_server_is_spoken_to():
    code = "import sys, dinov3.lake; sys.exit('lakefs_sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dead_server_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(StoreError, match=r"no lakeFS server answers.*make lakefs") as raised:
        client(endpoint).resolve("data", "main")
    assert "object at 0x" not in str(raised.value)


def test_a_silent_server_is_one_sentence_within_the_time_limit():
    done = threading.Event()
    with peer(lambda _: done.wait(20) and None) as endpoint:
        lake = client(endpoint)
        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"is silent, got no byte for 0\.3 s"):
            lake.resolve("data", "main")
        spent = time.monotonic() - begun
        done.set()
    assert spent < 3


def trickle(connection: socket.socket) -> None:
    """An answer of one byte every 50 ms, for as long as somebody listens."""
    connection.recv(1 << 16)
    connection.sendall(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
    )
    while True:
        connection.sendall(b" ")
        threading.Event().wait(0.05)


def test_a_server_that_trickles_is_cut_off():
    with peer(trickle) as endpoint:
        lake = client(endpoint)
        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"too slow, got .* bytes in"):
            lake.resolve("data", "main")
        assert time.monotonic() - begun < 5


def test_a_connection_that_breaks_is_one_sentence():
    with (
        peer(lambda connection: connection.recv(1 << 16) and None) as endpoint,
        pytest.raises(StoreError, match=r"connection to .* was lost.*run it again"),
    ):
        client(endpoint).resolve("data", "main")


def test_another_server_on_the_port_is_no_lakefs():
    def speak(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")

    with (
        peer(speak) as endpoint,
        pytest.raises(StoreError, match=r"not an answer lakeFS gives|answer lakeFS knows"),
    ):
        client(endpoint).resolve("data", "main")


def test_what_the_server_says_cannot_steer_a_terminal():
    said = detail_of(b'{"message": "\\u001b[2Jgone\\nsecond line"}')
    assert said == "[2Jgone second line"
    assert len(detail_of("x" * 5000)) == 300


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not know this key"),
        (403, "may not do that"),
        (404, "not there"),
        (409, "in conflict"),
        (410, "its bytes are gone"),
        (412, "a hook or a condition"),
        (500, "the server failed"),
    ],
)
def test_each_refusal_has_its_own_words(status, words):
    assert words in str(refused("lakefs://data/main", status, '{"message": "because"}'))
    assert "because" in str(refused("lakefs://data/main", status, '{"message": "because"}'))


def sent(stream: io.BytesIO, size: int) -> Outgoing:
    return Outgoing(stream, size, Pace("upload", 1.0), "upload", lambda _: None)


def test_what_is_sent_is_hashed_and_never_exceeds_its_size():
    body = sent(io.BytesIO(b"abcdef"), 5)
    assert [body.read(3), body.read(3), body.read(3)] == [b"abc", b"de", b""]
    assert body.sha256 == hashlib.sha256(b"abcde").hexdigest()


def test_a_file_that_shrinks_while_it_is_sent_is_an_error():
    body = sent(io.BytesIO(b"abc"), 5)
    body.read(4)
    with pytest.raises(StoreError, match="shorter than it was, 2 bytes of 5 missing"):
        body.read(4)


def test_pace_forgives_a_long_transfer_and_ends_a_crawling_one():
    pace = Pace("download", 1.0)
    for _ in range(100):
        pace.spend(1.0, 1 << 20)
    with pytest.raises(StoreError, match="download: too slow"):
        pace.spend(1e6, 1)
