"""Starts and ends one lakeFS server on loopback, its state and keys in one folder.

    python tools/lakefs/server.py start [--state .dinov3/lakefs] [--port PORT]
    python tools/lakefs/server.py stop  [--state .dinov3/lakefs]

It listens on 127.0.0.1 only and calls nobody. `env` in the folder holds its address and key.
"""

import argparse
import base64
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import build

STATE = Path(".dinov3/lakefs")
PORT = 8000
FREE = 0
_START_SECONDS = 60
_STOP_SECONDS = 20
_TRIES = 5  # a free port may be taken between choosing and listening


class Failed(Exception):
    """The server did not do what was asked."""


def main() -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("command", choices=("start", "stop"))
    parser.add_argument("--state", type=Path, default=STATE, help="folder of its state and keys")
    parser.add_argument("--port", type=int, help=f"default the last one, {PORT}, or a free one")
    options = parser.parse_args()
    try:
        if options.command == "stop":
            stop(options.state)
        else:
            start(options.state, options.port)
    except build.CannotBeHad as error:
        build.say(str(error))
        return build.CANNOT_BE_HAD
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        build.say(str(error))
        return 1
    return 0


def start(state: Path, port: int | None) -> None:
    """Starts the server of a folder unless it runs.

    Args:
        state: Its folder.
        port: To listen at; 0 takes a free one, None the last one, or the usual, or a free one.

    Raises:
        Failed: It did not come up.
    """
    make_folder(state)
    binary = build.build()
    with (state / "lock").open("a+") as lock:
        if not await_lock(state, lock):
            build.say(f"runs already at {settings_of(state)['LAKEFS_ENDPOINT']}")
            return
        (state / "pid").unlink(missing_ok=True)  # of a server that is gone: nobody may stop by it
        for chosen in ports(state, port):
            if launch(binary, state, chosen or free_port(), lock):
                break
        else:
            raise Failed(f"did not start, got: {last_words(state)} Look at {state / 'log'}.")
    settings = settings_of(state)
    build.say(
        f"ready at {settings['LAKEFS_ENDPOINT']}, key id {settings['LAKEFS_ACCESS_KEY_ID']}; "
        f"address and secret are in {state / 'env'}"
    )


def await_lock(state: Path, lock: IO[str]) -> bool:
    """Whether the folder's lock is ours now; False once the server of who holds it answers.

    Raises:
        Failed: Neither comes about.
    """
    deadline = time.monotonic() + _START_SECONDS
    while not take(lock):
        if (state / "env").is_file() and answers(settings_of(state)):
            return False
        if time.monotonic() > deadline:
            raise Failed(
                f"the server of {state} is silent, got nothing in {_START_SECONDS} s. Stop it."
            )
        time.sleep(0.05)
    return True


def ports(state: Path, wanted: int | None) -> list[int]:
    """What to try, in turn."""
    if wanted is not None:
        return [wanted] if wanted else [FREE] * _TRIES
    known = (state / "env").is_file()
    last = settings_of(state)["LAKEFS_ENDPOINT"].rpartition(":")[2] if known else PORT
    return [int(last), *[FREE] * _TRIES]


def launch(binary: Path, state: Path, port: int, lock: IO[str]) -> bool:
    """Whether our own process lives to answer to our own key.

    Raises:
        Failed: It lives but does not answer.
    """
    configuration = write_configuration(state, port)
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(
            [binary.resolve(), "run", "--config", configuration],
            cwd=state,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(state.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # held as long as the server lives, however it ends
        )
    write_private(state / "pid", f"{process.pid}\n")
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        if answers(settings_of(state)):
            return True
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise Failed(f"did not answer in {_START_SECONDS} s. Look at {state / 'log'}.")
        time.sleep(0.05)
    return False


def stop(state: Path) -> None:
    """Ends the server of a folder and waits until it is gone.

    Raises:
        Failed: It does not end.
    """
    if not (state / "lock").is_file():
        build.say(f"no server in {state}")
        return
    with (state / "lock").open("a+") as lock:
        if take(lock):
            build.say(f"no server runs in {state}")
            return
        if not (state / "pid").is_file():
            raise Failed(f"a server is just starting in {state}, got no pid. Stop it again soon.")
        pid = int((state / "pid").read_text())
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(pid, kind)
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline:
                if take(lock):
                    build.say("stopped")
                    return
                time.sleep(0.02)
    raise Failed(f"process {pid} does not end, got no exit in {2 * _STOP_SECONDS} s. Look at it.")


def take(lock: IO[str]) -> bool:
    """Takes the folder's lock; False while a server, or a start, holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_configuration(state: Path, port: int) -> Path:
    """Writes the server's configuration and our `env`; keys are made once."""
    keys_file = state / "keys.json"
    if not keys_file.is_file():
        keys = {
            "access": f"dinov3{secrets.token_hex(7)}",
            "secret": secrets.token_urlsafe(30),
            "encrypt": secrets.token_hex(32),
        }
        write_private(keys_file, json.dumps(keys))
    keys = json.loads(keys_file.read_text())
    write_private(
        state / "env",
        f"LAKEFS_ENDPOINT=http://127.0.0.1:{port}\n"
        f"LAKEFS_ACCESS_KEY_ID={keys['access']}\n"
        f"LAKEFS_SECRET_ACCESS_KEY={keys['secret']}\n",
    )
    path = state.resolve() / "config.yaml"
    write_private(path, json.dumps(configuration_of(state.resolve(), port, keys), indent=1))
    return path


def configuration_of(state: Path, port: int, keys: dict[str, str]) -> dict[str, Any]:
    """Local database, local storage, one user, no call to anybody."""
    return {
        "listen_address": f"127.0.0.1:{port}",
        "logging": {"level": "WARN"},
        "database": {"type": "local", "local": {"path": str(state / "meta")}},
        "blockstore": {"type": "local", "local": {"path": str(state / "data")}},
        "auth": {"encrypt": {"secret_key": keys["encrypt"]}},
        "installation": {
            "user_name": "dinov3",
            "access_key_id": keys["access"],
            "secret_access_key": keys["secret"],
        },
        "committed": {"local_cache": {"dir": str(state / "cache")}},
        "stats": {"enabled": False},
        # an empty url, since an interval of 0 polls without pause
        "security": {"audit_check_url": "", "check_latest_version": False},
    }


def answers(settings: dict[str, str]) -> bool:
    """Whether a server there knows our key; another one on the port would not."""
    pair = f"{settings['LAKEFS_ACCESS_KEY_ID']}:{settings['LAKEFS_SECRET_ACCESS_KEY']}"
    request = urllib.request.Request(
        f"{settings['LAKEFS_ENDPOINT']}/api/v1/repositories?amount=1",
        headers={"authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # the latter from what is no HTTP server
        return False


def settings_of(state: Path) -> dict[str, str]:
    """The variables of the folder's `env`."""
    lines = (state / "env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def make_folder(state: Path) -> None:
    """The folder, closed to others."""
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """A file only its owner can read, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(state: Path) -> str:
    """The last line of the server's log."""
    lines = (state / "log").read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "nothing in its log"


if __name__ == "__main__":
    sys.exit(main())
