"""The verbs around stores of releases: publish one; list, show, get, compare, withdraw, audit.

    dinov3 publish data/releases/vits/release --store directory:.dinov3/store --key demo
    dinov3 releases get vits@0.1.0 /tmp/vits --store directory:.dinov3/store

Results go to stdout, progress to stderr.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

import typer

app = typer.Typer()
releases = typer.Typer(
    help="Published releases: list, show, get, diff, withdraw, prune, audit, next."
)

StoreSpec = Annotated[
    str, typer.Option("--store", help="directory:PATH or lakefs://REPO.", show_default=True)
]
Log = Annotated[Path, typer.Option(help="Folder of the log of releases.")]
Name = Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="As in vits@0.1.0.")]
PublicKey = Annotated[
    list[str] | None,
    typer.Option("--key", help="Public key: a name or a .pub file; the log's keys if left out."),
]
SigningKey = Annotated[str, typer.Option("--key", help="Name of the key that signed the release.")]

LOG = Path("data/release_log")
STORE = "directory:.dinov3/store"

_QUIET_SECONDS = 2.0  # what is over by then needs no counter
_LIVE_SECONDS, _LINE_SECONDS = 0.5, 10.0  # between two counts, on a terminal and in a log


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A release directory.")],
    key: SigningKey,
    store: StoreSpec = STORE,
    log: Log = LOG,
) -> None:
    """Make a verified release visible in a store, and leave a signed receipt in the log."""
    from dinov3.publish.private_key import load_key
    from dinov3.publish.publishing import is_made, publish_release
    from dinov3.publish.store import open_store

    opened = open_store(store)
    made = not is_made(opened)
    told = iter([f"made a new store at {store}\n"] if made else [])
    with _Progress() as progress:
        entry = publish_release(
            folder,
            opened,
            log=log,
            key=load_key(key),
            on_step=lambda _: sys.stderr.writelines(told),  # at the first, when there is one
            on_bytes=progress.add,
        )
    print(f"{entry.name} {entry.digest}")


@releases.command("list")
def list_releases(store: StoreSpec = STORE) -> None:
    """All visible releases with their digests."""
    from dinov3.publish.releases import listing
    from dinov3.publish.store import open_store

    for line in listing(open_store(store).entries()):
        print(line)


@releases.command()
def show(name: Name, store: StoreSpec = STORE, log: Log = LOG, key: PublicKey = None) -> None:
    """A release's card, chain, metrics, signer and receipt, without fetching its weights."""
    from dinov3.publish.publishing import receipt_state, signer_of, withdrawn_because
    from dinov3.publish.releases import View, describe
    from dinov3.publish.store import find_entry, open_store, read_log, split_name
    from dinov3.release.render import visible

    opened = open_store(store)
    entry = find_entry(opened.entries(), *split_name(name))
    view = View(opened, entry)
    keys = _public_keys(key, log)
    receipts = read_log(log, keys)
    reason = withdrawn_because(entry, receipts)
    for line in describe(view, reason):
        print(line)
    print()
    print(f"Signer: {signer_of(view, keys) or 'none of the keys given'}")
    print(f"Receipt: {visible(receipt_state(entry, receipts, opened.identity))}")


@releases.command()
def get(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="A folder that is not there.")],
    store: StoreSpec = STORE,
    log: Log = LOG,
    key: PublicKey = None,
    withdrawn: Annotated[bool, typer.Option(help="Take one that was withdrawn.")] = False,
) -> None:
    """Fetch a release; the folder appears once it is verified. Exits 2 if no key was there."""
    from dinov3.publish.publishing import fetch_release
    from dinov3.publish.store import open_store, split_name

    with _Progress() as progress:
        found = fetch_release(
            split_name(name),
            folder,
            open_store(store),
            keys=_public_keys(key, log),
            log=log,
            with_withdrawn=withdrawn,
            on_bytes=progress.add,
        )
    print(f"{found.entry.name} {found.entry.digest} {folder}")
    if found.signer is None:
        sys.stderr.write("dinov3: intact, but the signer was not checked: give --key\n")
        raise typer.Exit(2)
    print(f"signed by {found.signer}")


@releases.command()
def diff(
    before: Name,
    after: Name,
    store: StoreSpec = STORE,
    every: Annotated[bool, typer.Option("--all", help="Every setting, however many.")] = False,
) -> None:
    """What changed between two releases: records, settings, metrics, images, licences, code."""
    from dinov3.publish.differences import differences
    from dinov3.publish.releases import View
    from dinov3.publish.store import find_entry, open_store, split_name

    opened = open_store(store)
    entries = opened.entries()
    views = [View(opened, find_entry(entries, *split_name(name))) for name in (before, after)]
    for line in differences(*views, every_setting=every):
        print(line)


@releases.command()
def withdraw(
    name: Name,
    reason: Annotated[str, typer.Option(help="One line that says why.")],
    key: SigningKey,
    store: StoreSpec = STORE,
    log: Log = LOG,
) -> None:
    """Take a release back: signed, with a reason, in the store and in the log."""
    from dinov3.publish.private_key import load_key
    from dinov3.publish.publishing import withdraw_release
    from dinov3.publish.store import open_store, split_name

    entry = withdraw_release(
        split_name(name), reason, open_store(store), log=log, key=load_key(key)
    )
    print(f"{entry.name} withdrawn; commit and push {log}")


@releases.command()
def prune(store: StoreSpec = STORE) -> None:
    """Remove what killed publishers left; never what a live one uses."""
    from dinov3.publish.store import open_store

    opened = open_store(store)
    removed = opened.prune()
    for line in removed:
        print(f"removed {line}")
    print(f"{len(removed)} removed")
    for entry in opened.unfinished():
        held = f"{entry.name}: held by release digest {entry.digest}, not visible yet"
        print(f"{held}; publish that release again to finish it")


@releases.command()
def audit(
    store: StoreSpec = STORE,
    log: Log = LOG,
    key: PublicKey = None,
    with_bytes: Annotated[bool, typer.Option("--bytes", help="Read every stored byte.")] = False,
) -> None:
    """Compare a store with the receipts: re-made, rewritten, rolled back. Exits 1 if so."""
    from dinov3.publish.publishing import audit_store
    from dinov3.publish.store import open_store
    from dinov3.release.render import visible

    opened = open_store(store)
    keys = _public_keys(key, log)
    findings = audit_store(opened, log=log, keys=keys, with_bytes=with_bytes)
    for finding in findings:
        print(visible(finding))
    if findings:
        raise typer.Exit(1)
    print(f"{len(opened.entries())} releases agree with their receipts")


@releases.command("next")
def next_free(
    model: Annotated[str, typer.Argument(help="As in vits.")],
    store: StoreSpec = STORE,
    log: Log = LOG,
    release: Annotated[
        Path | None,
        typer.Option("--for", help="A release: its own version, if it can be published as that."),
    ] = None,
) -> None:
    """The next free patch version of a model, by the store and the log."""
    from dinov3.publish.publishing import read_built
    from dinov3.publish.releases import next_version
    from dinov3.publish.store import held_versions, open_store, read_log

    built = None if release is None else read_built(release, model)
    held = held_versions(open_store(store))
    print(next_version(model, held, read_log(log, keys=None), release=built))


def _public_keys(named: list[str] | None, log: Path) -> list[bytes]:
    from dinov3.publish.keys import public_key_of
    from dinov3.publish.private_key import keys_folder
    from dinov3.publish.store import log_keys

    if not named:
        return log_keys(log)
    return [public_key_of(one, folder=keys_folder(), log=log) for one in named]


class _Progress:
    """Bytes copied, on stderr, once that takes a while: in place on a terminal, else in lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._is_live = sys.stderr.isatty()
        self._bytes = 0
        self._clock = clock
        self._next = clock() + _QUIET_SECONDS
        self._is_shown = False

    def __enter__(self) -> Self:
        """Begins to count."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the line that was written in place."""
        if self._is_live and self._is_shown:
            sys.stderr.write("\n")

    def add(self, count: int) -> None:
        """Counts bytes, and shows them from time to time."""
        self._bytes += count
        now = self._clock()
        if now < self._next:
            return
        text = f"{self._bytes / 1e6:.0f} MB"
        sys.stderr.write(f"\r{text}" if self._is_live else f"{text}\n")
        sys.stderr.flush()
        self._is_shown = True
        self._next = now + (_LIVE_SECONDS if self._is_live else _LINE_SECONDS)
