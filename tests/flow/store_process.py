"""A publisher, a fetcher or a reader of a store as a process, for tests to start and kill.

python -m tests.flow.store_process publish SPEC FOLDER LOG KEY STEP|bytes:N|event:N|never
python -m tests.flow.store_process fetch SPEC MODEL@VERSION TARGET
python -m tests.flow.store_process read SPEC SCRATCH
"""

import json
import os
import select
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError, StoreError, StoreMissing
from dinov3.publish.private_key import load_key
from dinov3.publish.store import open_store, split_name

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def publish(spec: str, folder: str, log: str, key: str, kill_at: str) -> None:
    """Publishes; kills itself in a step, after N bytes, or before its N-th change of the disk."""
    word, _, number = kill_at.partition(":")
    counts = {"bytes": 0, "event": 0}

    def count(kind: str, more: int) -> None:
        counts[kind] += more
        if kind == word and counts[kind] >= int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step(step: str) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or event in CHANGES:
            count("event", 1)

    store, secret = open_store(spec), load_key(key)
    sys.addaudithook(on_event)
    entry = store.publish(
        Path(folder),
        log=Path(log),
        key=secret,
        on_step=on_step,
        on_bytes=lambda more: count("bytes", more),
    )
    report(digest=entry.digest, events=counts["event"])


def fetch(spec: str, name: str, target: str) -> None:
    """Fetches one release."""
    entry = open_store(spec).fetch(*split_name(name), Path(target))
    report(digest=entry.digest)


def read(spec: str, scratch: str) -> None:
    """Fetches every release it sees and has not had, until its input ends."""
    seen: dict[str, list[str]] = {}
    wrong: list[str] = []
    polls = 0
    say("reading")
    store = open_store(spec)
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], 0.02)[0])  # a last look after the end
        polls += 1
        try:
            entries = store.entries()
        except StoreMissing:
            continue
        except StoreError as error:
            wrong.append(str(error))
            continue
        for entry in entries:
            if entry.digest in seen.setdefault(entry.name, []):
                continue
            seen[entry.name].append(entry.digest)
            try:
                store.fetch(entry.model, entry.version, Path(scratch) / entry.name)
                shutil.rmtree(Path(scratch) / entry.name)
            except DinoError as error:
                wrong.append(f"{entry.name}: {error}")
    report(polls=polls, seen=seen, wrong=wrong)


def report(**facts: object) -> None:
    """One line of JSON, the peak memory of this process with it."""
    # Not ru_maxrss: a child starts with what its parent had when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    say(json.dumps({**facts, "peak_bytes": peak * 1024}))


def say(line: str) -> None:
    """A line for the parent, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Runs one verb; errors become an exit code as on the command line."""
    verb, *arguments = sys.argv[1:]
    try:
        {"publish": publish, "fetch": fetch, "read": read}[verb](*arguments)
    except DinoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
