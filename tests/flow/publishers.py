"""Small releases, and publishers and readers of them as processes, for tests of stores."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dinov3.publish.private_key import PrivateKey
from dinov3.publish.store import Entry, Store, open_store, read_log
from dinov3.release.files import format_sums
from dinov3.release.receipts import Receipt
from dinov3.release.record import canonical_json

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """Where a store is: its spec, and what a process needs to reach it."""

    spec: str
    environment: dict[str, str] = field(default_factory=dict)

    def open(self) -> Store:
        return open_store(self.spec)


@dataclass(frozen=True)
class Publisher:
    """Everything but the release and the store that a publication needs."""

    key: PrivateKey
    log: Path

    def publish(self, store: Store, folder: Path, **told: Any) -> Entry:
        return store.publish(folder, log=self.log, key=self.key, **told)

    def receipts(self) -> list[Receipt]:
        return read_log(self.log, [self.key.public])

    def published(self) -> list[tuple[str, str]]:
        return [(one.model, one.version) for one in self.receipts() if one.kind == "publish"]


def make_thin(folder: Path, model: str = "vits", version: str = "0.1.0", text: str = "one") -> Path:
    """The least that a store takes for a release: files in two folders, a name, and the sums."""
    (folder / "records").mkdir(parents=True)
    head = {"schema": "dinov3.release/1", "model": model, "version": version, "records": []}
    (folder / "release.json").write_bytes(canonical_json(head))
    (folder / "records" / "pretrain-0123456789ab.json").write_bytes(canonical_json({"text": text}))
    (folder / "README.md").write_text(f"# {text}\n" * 1000)
    return seal(folder)


def seal(folder: Path) -> Path:
    """Writes SHA256SUMS over what is there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / "SHA256SUMS").write_bytes(format_sums(sums))
    return folder


def make_heavy(folder: Path, size: int) -> Path:
    """A release whose weights have that many bytes, sparse on the disk."""
    header = {"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(stream.tell() + size)
    return make_thin_around(folder)


def make_thin_around(folder: Path) -> Path:
    """Makes a folder that holds files already into a release."""
    head = {"schema": "dinov3.release/1", "model": "vits", "version": "0.1.0", "records": []}
    (folder / "release.json").write_bytes(canonical_json(head))
    return seal(folder)


class Process:
    """A publisher or reader in a process of its own."""

    def __init__(self, place: Place, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "tests.flow.store_process", *map(str, arguments)]
        self._running = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**os.environ, **place.environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """No process outlives its test, however that ends."""
        if self._running.poll() is None:
            self._running.kill()
            self._running.communicate()

    def line(self) -> str:
        """The next line it writes."""
        assert self._running.stdout is not None
        return self._running.stdout.readline().strip()

    def end(self) -> tuple[int, str, str]:
        """Closes its input and waits; exit status, output, errors."""
        output, errors = self._running.communicate()
        return self._running.returncode, output, errors


def run_publisher(
    place: Place, folder: Path, publisher: Publisher, kill_at: str = "never"
) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and errors of one publication; `kill_at` as in `store_process`."""
    started = start_publisher(place, folder, publisher, kill_at)
    status, output, errors = started.end()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return status, json.loads(lines[-1]) if lines else {}, errors


def start_publisher(
    place: Place, folder: Path, publisher: Publisher, kill_at: str = "never"
) -> Process:
    key = publisher.key.path
    return Process(place, "publish", place.spec, folder, publisher.log, key, kill_at)


def start_reader(place: Place, scratch: Path) -> Process:
    """A reader that fetches and checks every version it sees, until its input ends."""
    reader = Process(place, "read", place.spec, scratch)
    assert reader.line() == "reading"
    return reader


def read_report(reader: Process) -> dict[str, Any]:
    """What a reader saw: polls, digests by name, and every version that did not hold."""
    status, output, errors = reader.end()
    assert status == 0, errors
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
