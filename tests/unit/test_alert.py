"""Alerts over a real process and a real server: delivered whole, bounded, never raised."""

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from dinov3.publish.alert import send_alert

FINDING = {"release": "vits@0.2.0", "regressions": [{"protocol": "k-NN", "value": 0.5}], "é": "ü"}


class Server(HTTPServer):
    """Keeps what it got and answers as told."""

    def __init__(self, answer=200, headers=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.headers, self.got = answer, dict(headers), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret"


class Handler(BaseHTTPRequestHandler):
    """One POST."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Content-Type"], body))
        self.send_response(self.server.answer)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.server.got.append((self.path, "GET", b""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture
def serve():
    servers = []

    def start(*arguments, **settings):
        server = Server(*arguments, **settings)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def send(*, command=None, webhook=None, timeout=20.0):
    return send_alert(FINDING, command=command, webhook=webhook, timeout=timeout)


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_nobody_is_told_by_default():
    assert send() == []


def test_command_reads_the_finding_on_its_standard_input(tmp_path):
    path = tmp_path / "got.json"
    code = f"import sys; open({str(path)!r}, 'wb').write(sys.stdin.buffer.read())"
    assert send(command=python(code)) == []
    assert json.loads(path.read_bytes()) == FINDING


def test_arguments_of_the_command_are_no_shell(tmp_path):
    path = tmp_path / "got"
    code = f"import sys; open({str(path)!r}, 'w').write(sys.argv[1])"
    assert send(command=[*python(code), "$(id); `id`"]) == []
    assert path.read_text() == "$(id); `id`"


def test_failing_command_is_reported_with_its_last_words():
    code = "import sys; print('no such room'); sys.exit(4)"
    (failure,) = send(command=python(code))
    assert "ended with 4" in failure
    assert "no such room" in failure


def test_missing_command_is_reported():
    (failure,) = send(command=["/no/such/program"])
    assert failure == "alert command /no/such/program: cannot be run: No such file or directory"


def test_nothing_about_a_command_is_raised(monkeypatch):
    (failure,) = send(command=["a\0b"])
    assert "cannot be run: embedded null byte" in failure
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    (failure,) = send(command=python("pass"))
    assert "cannot be run: No such file or directory" in failure


def test_name_that_is_not_utf8_reaches_the_command_as_json(tmp_path):
    path = tmp_path / "got.json"
    code = f"import sys; open({str(path)!r}, 'wb').write(sys.stdin.buffer.read())"
    finding = {"report": os.fsdecode(b"bad-\xff.json")}
    assert send_alert(finding, command=python(code), webhook=None, timeout=20.0) == []
    assert json.loads(path.read_bytes()) == finding


def test_hanging_command_and_its_children_are_ended(tmp_path):
    path = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; from pathlib import Path;"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
        f"Path({str(path)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    began = time.monotonic()
    (failure,) = send(command=python(code), timeout=3.0)
    assert "not done after 3 s" in failure
    assert time.monotonic() - began < 30
    pid = int(path.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_child_left_behind_does_not_keep_the_alert(tmp_path):
    """It holds the command's output open; a pipe would be read until it ends."""
    path = tmp_path / "pid"
    code = (
        "import subprocess, sys; from pathlib import Path;"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
        f"Path({str(path)!r}).write_text(str(child.pid))"
    )
    try:
        assert send(command=python(code)) == []
    finally:
        psutil.Process(int(path.read_text())).kill()


def test_webhook_gets_the_finding_by_post(serve):
    server = serve()
    assert send(webhook=server.url) == []
    ((path, kind, body),) = server.got
    assert (path, kind) == ("/hook?token=secret", "application/json")
    assert json.loads(body) == FINDING


def test_url_may_stand_in_a_variable(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("DINOV3_TEST_HOOK", server.url)
    assert send(webhook="env:DINOV3_TEST_HOOK") == []
    assert len(server.got) == 1
    monkeypatch.delenv("DINOV3_TEST_HOOK")
    assert send(webhook="env:DINOV3_TEST_HOOK") == [
        "alert webhook: the variable DINOV3_TEST_HOOK is not set"
    ]


@pytest.mark.parametrize("answer", [400, 500])
def test_answer_of_the_server_is_reported_without_its_secret(serve, answer):
    (failure,) = send(webhook=serve(answer).url)
    assert failure == f"alert webhook: answered {answer}"


def test_redirect_is_no_delivery(serve):
    target = serve()
    (failure,) = send(webhook=serve(302, headers={"Location": target.url}).url)
    assert failure == "alert webhook: answered 302"
    assert target.got == []


def test_dead_server_is_reported():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (failure,) = send(webhook=f"http://127.0.0.1:{port}/secret")
    assert "not reached" in failure
    assert "secret" not in failure


def test_server_that_drips_is_left_when_its_time_is_over():
    """A byte now and then keeps every time limit of a single read at bay."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def drip():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not over.wait(0.1):
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            began = time.monotonic()
            failures = send(webhook=f"http://127.0.0.1:{port}/", timeout=1.0)
            assert failures == ["alert webhook: no answer after 1 s"]
            assert time.monotonic() - began < 20
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/secret",
        "http://127.0.0.1:1/secret of mine",
        "http://127.0.0.1:secret/",
        "http://\udcff/secret",
    ],
)
def test_url_that_is_none_is_reported_without_its_secret(url):
    (failure,) = send(webhook=url)
    assert failure.startswith("alert webhook: not reached: ")
    assert "secret" not in failure


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "hook"])
def test_only_http_is_called(url):
    assert send(webhook=url) == ["alert webhook: not a URL of http or https"]


def test_both_are_told_although_one_fails(serve):
    server = serve()
    (failure,) = send(command=["/no/such/program"], webhook=server.url)
    assert "cannot be run" in failure
    assert len(server.got) == 1
