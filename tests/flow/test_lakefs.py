"""The project's lakeFS server and its client, against each other."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dinov3.errors import StoreError
from dinov3.lake import Lake, client
from tests.lakefs_server import CACHE, TOOLS, Server, require_binary, running_server

CLAIM = {"audited_commit": "x"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("lakefs")) as found:
        yield found


@pytest.fixture
def own_server(tmp_path):
    with running_server(tmp_path / "lakefs") as found:
        yield found


@pytest.fixture
def lake(server):
    return server.lake()


@pytest.fixture
def repo(server):
    return server.repository()


def commit_files(lake: Lake, repo: str, branch: str, files: dict[str, bytes]) -> str:
    for path, data in files.items():
        lake.put(repo, branch, path, data)
    return lake.commit(repo, branch, "files")


GO = """#!/bin/sh
case "$1" in
env) echo go1.26.8 ;;
build)
    echo built >>"$LOG"
    sleep 0.5
    while [ "$1" != -o ]; do shift; done
    echo server >"$2" ;;
esac
"""


@pytest.fixture
def building(tmp_path):
    """The build in an empty cache, with a Go that only says that it built."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "go").write_text(GO)
    (tmp_path / "bin" / "go").chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LOG": str(tmp_path / "log"),
    }


def test_two_builds_at_once_make_one_binary(building, tmp_path):
    command = [sys.executable, TOOLS / "build.py"]
    builds = [
        subprocess.Popen(
            command, env=building, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ends = [(*build.communicate(), build.returncode) for build in builds]
    assert [code for _, _, code in ends] == [0, 0, 0], ends
    (binary,) = {out.strip() for out, _, _ in ends}
    assert Path(binary).read_text() == "server\n"
    assert (tmp_path / "log").read_text() == "built\n"
    assert [path.name for path in Path(binary).parent.iterdir()] == ["lakefs"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("dial tcp: lookup modules.invalid: no such host", 3),
        ("cmd/lakefs/main.go:1: undefined: x", 1),
    ],
)
def test_a_build_that_fails_is_told_apart_from_one_that_cannot_be(building, tmp_path, words, code):
    script = GO.replace("echo built", f"echo '{words}' >&2; exit 1; echo built")
    (tmp_path / "bin" / "go").write_text(script)
    done = subprocess.run(
        [sys.executable, TOOLS / "build.py"],
        env=building,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert ("cannot be had here" in done.stderr) == (code == 3)


def test_where_nothing_can_be_kept_the_build_says_so(building, tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = subprocess.run(
        [sys.executable, TOOLS / "build.py"],
        env={**building, "XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "cannot be made: Not a directory. Set XDG_CACHE_HOME." in done.stderr


def test_where_go_cannot_be_had_the_build_says_so(building, tmp_path):
    (tmp_path / "bin" / "go").write_text("#!/bin/sh\necho go1.21.0\n")
    code = (
        "import sys, build; build.USUAL_GO = '/nowhere/go'; sys.argv = ['build.py']; "
        "sys.exit(build.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOOLS,
        env={**building, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "There is no Go 1.26.4 or newer, and none could be fetched." in done.stderr


def test_a_second_start_says_that_it_runs_already(server):
    pid = server.pid
    again = server.tool("start", "--port", "0")
    assert again.returncode == 0
    assert f"runs already at {server.environment['LAKEFS_ENDPOINT']}" in again.stderr
    assert server.pid == pid


def begin_start(server: Server) -> subprocess.Popen:
    """A start that goes on beside the test."""
    command = [sys.executable, TOOLS / "server.py", "start", "--state", server.state, "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": CACHE}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_second_start_waits_until_the_server_of_the_first_answers(own_server):
    with own_server.hung():
        second = begin_start(own_server)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
    said = second.communicate()[1]
    assert second.returncode == 0
    assert f"runs already at {own_server.environment['LAKEFS_ENDPOINT']}" in said


def test_a_second_start_takes_over_from_a_first_that_gave_up(tmp_path):
    require_binary()
    own = Server(tmp_path / "own")
    own.state.mkdir()
    with (own.state / "lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = begin_start(own)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert own.lake().storage_kind() == "local"
    own.stop()


def test_keys_are_readable_by_their_owner_alone_and_the_secret_is_not_printed(own_server):
    for name in ("env", "keys.json", "config.yaml", "pid"):
        assert stat.S_IMODE((own_server.state / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(own_server.state.stat().st_mode) == 0o700
    own_server.stop()
    said = own_server.tool("start", "--port", str(own_server.port)).stderr
    assert own_server.environment["LAKEFS_ACCESS_KEY_ID"] in said
    assert own_server.environment["LAKEFS_SECRET_ACCESS_KEY"] not in said


def test_a_server_that_was_stopped_comes_back_with_its_keys_and_data(own_server):
    lake, repo = own_server.lake(), own_server.repository()
    commit = commit_files(lake, repo, "main", {"a": b"1"})
    environment = own_server.environment
    own_server.stop()
    assert "no server runs" in own_server.tool("stop").stderr
    own_server.start()
    assert own_server.environment == environment
    assert lake.read(repo, commit, "a") == b"1"


def test_a_killed_server_can_be_started_again_at_once(own_server):
    own_server.kill()
    own_server.start()
    assert own_server.lake().storage_kind() == "local"


def test_another_server_on_the_port_is_not_taken_for_ours(server, tmp_path):
    other = Server(tmp_path / "other")
    started = other.tool("start", "--port", str(server.port))
    assert started.returncode == 1
    assert "did not start" in started.stderr
    assert "address already in use" in started.stderr
    assert "no server runs" in other.tool("stop").stderr


def test_a_port_that_was_not_asked_for_is_left_to_who_has_it(tmp_path):
    own = Server(tmp_path / "own")
    with socket.create_server(("127.0.0.1", 0)) as other:
        own.state.mkdir()
        taken = f"LAKEFS_ENDPOINT=http://127.0.0.1:{other.getsockname()[1]}\n"
        (own.state / "env").write_text(taken)
        started = own.tool("start")
        assert started.returncode == 0, started.stderr
        assert own.environment["LAKEFS_ENDPOINT"] not in taken
        assert own.lake().storage_kind() == "local"
        own.stop()


def test_a_port_of_another_kind_of_server_is_left_to_it(tmp_path):
    own = Server(tmp_path / "own")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet():
            with contextlib.suppress(OSError):
                while True:
                    with other.accept()[0] as connection:
                        connection.sendall(b"SSH-2.0-other\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        started = own.tool("start", "--port", str(other.getsockname()[1]))
        other.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert started.returncode == 1
    assert "did not start" in started.stderr
    assert "Traceback" not in started.stderr


def test_a_state_that_cannot_be_kept_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = Server(tmp_path / "file" / "state").tool("start")
    assert done.returncode == 1
    assert re.fullmatch(r"lakefs: .*Not a directory: '.*file/state'\n", done.stderr)


def test_stopping_where_nothing_ever_ran_is_no_error(tmp_path):
    assert Server(tmp_path / "nothing").tool("stop").returncode == 0


def test_the_server_listens_on_loopback_and_talks_to_nobody_else(server):
    lake = server.lake()
    for _ in range(3):
        lake.storage_kind()  # this call makes a server ask for newer versions, where it may
    connections = psutil.Process(server.pid).net_connections("all")
    addresses = {end.ip for one in connections for end in (one.laddr, one.raddr) if end}
    assert addresses == {"127.0.0.1"}
    settings = json.loads((server.state / "config.yaml").read_text())
    assert settings["security"] == {"audit_check_url": "", "check_latest_version": False}
    assert settings["stats"] == {"enabled": False}


def test_a_ref_is_resolved_to_the_commit_it_stands_for(lake, repo):
    first = commit_files(lake, repo, "main", {"a": b"1"})
    second = commit_files(lake, repo, "main", {"a": b"2"})
    assert lake.tag(repo, "release.m.0.1.0", first)
    assert lake.resolve(repo, "main") == second
    assert lake.resolve(repo, "release.m.0.1.0") == lake.resolve(repo, first) == first
    assert (lake.read(repo, first, "a"), lake.read(repo, second, "a")) == (b"1", b"2")
    assert lake.find(repo, "nowhere") is None
    with pytest.raises(StoreError, match=f"lakefs://{repo}/nowhere: not there"):
        lake.resolve(repo, "nowhere")


def test_what_is_staged_is_in_no_commit(lake, repo):
    head = lake.resolve(repo, "main")
    lake.put(repo, "main", "a", b"1")
    assert lake.resolve(repo, "main") == head
    assert lake.stat(repo, head, "a") is None


def test_only_what_a_commit_would_change_counts_as_staged(lake, repo):
    assert not lake.has_staged(repo, "main")
    commit_files(lake, repo, "main", {"a": b"1", "z": b"1"})
    assert not lake.has_staged(repo, "main")
    lake.put(repo, "main", "a", b"1")
    assert not lake.has_staged(repo, "main")
    lake.put(repo, "main", "z", b"2")
    assert lake.has_staged(repo, "main")
    with pytest.raises(StoreError, match="nowhere: not there"):
        lake.has_staged(repo, "nowhere")


def test_listing_goes_over_all_pages_in_order_of_bytes(lake, repo, monkeypatch):
    monkeypatch.setattr(client, "_PAGE_SIZE", 3)
    names = ["z", "é", "a/b", "a b", "a%2Fb", "a.b", "+", "日本/語", "A"]
    commit = commit_files(lake, repo, "main", {f"x/{name}": b"1" for name in names})
    found = [one.path for one in lake.list(repo, commit, "x/")]
    assert found == sorted((f"x/{name}" for name in names), key=str.encode)
    assert list(lake.list(repo, commit, "y/")) == []
    for name in names:
        assert lake.read(repo, commit, f"x/{name}") == b"1"


def test_branches_tags_and_log_go_over_all_pages(lake, repo, monkeypatch):
    monkeypatch.setattr(client, "_PAGE_SIZE", 2)
    commits = [commit_files(lake, repo, "main", {"a": b"%d" % number}) for number in range(5)]
    for number, commit in enumerate(commits):
        lake.tag(repo, f"t{number}", commit)
        lake.create_branch(repo, f"run-{number}", commit)
    assert lake.tags(repo, "t") == {f"t{number}": one for number, one in enumerate(commits)}
    assert list(lake.branches(repo, "run-").values()) == commits
    assert [one.id for one in lake.log(repo, "main")][:5] == commits[::-1]


def test_a_stream_jumps_and_reads_any_part(lake, repo):
    data = os.urandom(3_000_000)
    commit = commit_files(lake, repo, "main", {"a": data, "empty": b""})
    with lake.open(repo, commit, "a") as stream:
        assert stream.read(10) == data[:10]
        assert stream.seek(2_500_000) == 2_500_000
        assert stream.read(7) == data[2_500_000:2_500_007]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]
        stream.seek(0)
        assert stream.read() == data
    with lake.open(repo, commit, "empty") as stream:
        assert stream.read() == b""


def test_an_upload_reports_its_digest_and_its_bytes(lake, repo, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(os.urandom(1_000_000))
    moved = []
    with path.open("rb") as stream:
        sent = lake.upload(repo, "main", "a", stream, 1_000_000, moved.append)
    assert sent == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(moved) == 1_000_000


def test_a_small_object_that_is_large_is_refused(lake, repo):
    commit = commit_files(lake, repo, "main", {"a": b"12345"})
    with pytest.raises(StoreError, match="too large to hold, got over 4 bytes"):
        lake.read(repo, commit, "a", max_size=4)


def test_refusals_are_sentences(lake, repo, server):
    head = lake.resolve(repo, "main")
    with pytest.raises(
        StoreError, match=r"lakefs://.*/nothing: not there, got 404: no such object"
    ):
        lake.open(repo, head, "nothing")
    with pytest.raises(StoreError, match=r"refused, got 400: .*no changes"):
        lake.commit(repo, "main", "nothing")
    with pytest.raises(StoreError, match="not a name or an answer lakeFS knows"):
        lake.create_repository("No Name", "local://no-name")
    with pytest.raises(StoreError, match="not there, got 404"):
        lake.put("nowhere", "main", "a", b"1")
    stranger = Lake(lake.endpoint, "nobody", "nothing", 20)
    with pytest.raises(StoreError, match="does not know this key, got 401"):
        stranger.resolve(repo, "main")
    with pytest.raises(StoreError, match="does not know this key, got 401"):
        stranger.put(repo, "main", "a", b"1")


def test_what_is_there_already_is_told_apart_from_failure(lake, repo):
    first = commit_files(lake, repo, "main", {"a": b"1"})
    second = commit_files(lake, repo, "main", {"a": b"2"})
    assert not lake.create_repository(repo, "local://other")
    assert lake.create_branch(repo, "b", first)
    assert not lake.create_branch(repo, "b", second)
    assert lake.tag(repo, "t", first)
    assert not lake.tag(repo, "t", second)
    assert lake.resolve(repo, "t") == first
    assert lake.delete_branch(repo, "b")
    assert not lake.delete_branch(repo, "b")


def test_a_commit_is_merged_by_its_id_and_a_conflict_is_none(lake, repo):
    base = lake.resolve(repo, "main")
    sides = []
    for branch in ("one", "two"):
        lake.create_branch(repo, branch, base)
        sides.append(commit_files(lake, repo, branch, {"a": branch.encode(), branch: b"1"}))
    lake.put(repo, "one", "later", b"staged and never merged")
    merged = lake.merge(repo, sides[0], "main", "one", {"who": "one"})
    assert merged == lake.resolve(repo, "main")
    newest = next(lake.log(repo, "main"))
    assert newest.parents == (base, sides[0])
    assert newest.metadata["who"] == "one"
    assert lake.merge(repo, sides[1], "main", "two") is None
    assert lake.resolve(repo, "main") == merged
    above = lake.merge(repo, merged, "two", "on top", on_conflict="source-wins")
    assert lake.read(repo, above, "a") == b"one"
    assert lake.stat(repo, above, "two") is not None
    assert lake.stat(repo, above, "later") is None


def test_a_client_works_in_a_fork(lake, repo):
    lake.put(repo, "main", "a", b"1")
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if lake.read(repo, "main", "a") == b"1" else 1)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert lake.read(repo, "main", "a") == b"1"


def test_threads_share_a_client(lake, repo):
    commit = commit_files(lake, repo, "main", {f"{number}": b"%d" % number for number in range(8)})
    found = {}

    def read(number):
        for _ in range(10):
            found[number] = lake.read(repo, commit, f"{number}")

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: b"%d" % number for number in range(8)}


def test_a_dead_server_is_one_sentence_and_the_client_lives_on(own_server):
    lake, repo = own_server.lake(), own_server.repository()
    commit = commit_files(lake, repo, "main", {"a": b"1"})
    own_server.kill()
    for call in (
        lambda: lake.resolve(repo, "main"),
        lambda: lake.put(repo, "main", "b", b"1"),
        lambda: lake.open(repo, commit, "a"),
    ):
        with pytest.raises(StoreError, match=r"no lakeFS server answers|connection .* was lost"):
            call()
    own_server.start()
    assert lake.read(repo, commit, "a") == b"1"


def test_a_hung_server_is_one_sentence_within_the_time_limit(own_server):
    repo = own_server.repository()
    lake = own_server.lake(timeout=1)
    commit = commit_files(lake, repo, "main", {"a": b"1" * (8 << 20)})
    stream = lake.open(repo, commit, "a")
    stream.read(10)
    with own_server.hung():
        for call in (
            lambda: lake.resolve(repo, "main"),
            lambda: lake.put(repo, "main", "b", b"1"),
            lambda: lake.put(repo, "main", "b", b"1" * (32 << 20)),
            lambda: stream.read(),
        ):
            begun = time.monotonic()
            with pytest.raises(StoreError, match=r"is silent, got no byte for 1 s"):
                call()
            assert time.monotonic() - begun < 8
    stream.close()
    assert lake.read(repo, commit, "a", max_size=8 << 20) == b"1" * (8 << 20)


def test_a_server_killed_during_an_upload_shows_nothing_of_it(own_server, tmp_path):
    lake, repo = own_server.lake(), own_server.repository()
    killed = threading.Event()

    def kill_once(_):
        if not killed.is_set():
            killed.set()
            own_server.send_signal(signal.SIGKILL)

    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(64 << 20)
    with path.open("rb") as stream, pytest.raises(StoreError, match=r"connection .* was lost"):
        lake.upload(repo, "main", "a", stream, 64 << 20, kill_once)
    own_server.stop()
    own_server.start()
    assert lake.stat(repo, "main", "a") is None


def crawl(listener: socket.socket, target: tuple[str, int], ended: threading.Event) -> None:
    """Passes on what comes, 1 kB at a time with pauses."""
    near, _ = listener.accept()
    with near, socket.create_connection(target) as far:
        while not ended.wait(0.1) and (chunk := near.recv(1024)):
            far.sendall(chunk)


def test_an_upload_that_crawls_is_cut_off(server, repo):
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = ("127.0.0.1", server.port)
        thread = threading.Thread(target=crawl, args=(listener, target, ended))
        thread.start()
        port = listener.getsockname()[1]
        settings = {**server.environment, "LAKEFS_ENDPOINT": f"http://127.0.0.1:{port}"}
        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"too slow|is silent"):
            Lake.connect(settings, timeout=1).put(repo, "main", "a", b"1" * (64 << 20))
        assert time.monotonic() - begun < 10
        ended.set()
        thread.join()


MEASURE = """
import re, sys
from pathlib import Path
from dinov3.lake import Lake
repo, path = sys.argv[1], Path(sys.argv[2])
lake = Lake.connect()
with path.open("rb") as stream:
    sent = lake.upload(repo, "main", "large", stream, path.stat().st_size)
import hashlib
with lake.open(repo, "main", "large") as stream:
    read = hashlib.file_digest(stream, "sha256").hexdigest()
assert sent == read, (sent, read)
# not ru_maxrss, which starts at the size of the parent
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_at_any_size(server, repo, tmp_path):
    peaks = []
    for size in (1 << 20, 300 << 20):
        path = tmp_path / "large"
        with path.open("wb") as stream:
            stream.truncate(size)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, repo, path],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **server.environment},
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] < 300 << 20
    assert peaks[1] - peaks[0] < 24 << 20
