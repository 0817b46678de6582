"""The embedded store: a folder, file locks, and one hard link that makes a release visible.

What lies where:

    store.json                what receipts call this store
    lock                      held for moments: to claim a digest, to append to the index, to prune
    index/000001.json         one entry each, naming the digest of the one before: visible = here
    objects/<digest>/         a whole release, by its release digest
    runs/<digest>-<random>/   a publisher's own: its lock, held while it lives, and content/
    withdrawals/<name>.json   signed withdrawals
    trash/                    what prune is about to delete
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from dinov3.errors import LineageBroken, StoreError, StoreMissing
from dinov3.publish.copying import (
    appearing,
    check_back,
    check_fetched,
    copy_release,
    link_new,
    read_release,
    sync_folder,
    write_file,
)
from dinov3.publish.directory_index import RESTORE, Index, Line, read_object, read_small
from dinov3.publish.entry import (
    Entry,
    OnBytes,
    OnStep,
    Release,
    already_published,
    find_entry,
    ignore,
)
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.store_receipts import (
    WITHDRAWALS,
    check_withdrawn,
    compare_receipts,
    leave_receipt,
    odd_withdrawals,
    reason_in,
    stored_reason,
    withdrawal_name,
)
from dinov3.release.files import SUMS_NAME, UNLISTED, list_files, parse_sums, read_file
from dinov3.release.opening import open_below
from dinov3.release.receipts import Receipt
from dinov3.release.record import canonical_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible

SCHEMA = "dinov3.store/1"
_FOLDERS = ("index", "objects", "runs", "withdrawals")
_MAX_SUMS = 8 << 20  # bytes
LOCK_WAIT = 60  # seconds; the lock is held for moments, so its holder is stopped, not busy


class DirectoryStore:
    """Releases in a folder of this machine; made by the first publication."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._index = Index(root)

    @property
    def identity(self) -> str:
        """`directory:` and the id drawn when the store was made."""
        path = self.root / "store.json"
        if not path.is_file():
            msg = f"directory:{self.root}: no store there. The first dinov3 publish makes it."
            raise StoreMissing(msg)
        head = read_object(path, read_small(self.root, path.name))
        if head.get("schema") != SCHEMA or not isinstance(head.get("id"), str):
            msg = f"{path}: schema is not {SCHEMA}, got {head.get('schema')!r}. Update dinov3."
            raise StoreError(msg)
        return f"directory:{head['id']}"

    def publish(
        self,
        folder: Path,
        *,
        log: Path,
        key: PrivateKey,
        on_step: OnStep = ignore,
        on_bytes: OnBytes = ignore,
    ) -> Entry:
        """Copies, reads back, then links one entry into the index; see `Store`."""
        release = read_release(folder)
        with self._writing():
            self._create()
            entry = self._visible(release)
            if entry is None or not self._object(release.digest).is_dir():
                entry = self._make_visible(folder, release, on_step, on_bytes)
        leave_receipt(entry, log=log, key=key)
        on_step("receipted")
        return entry

    def entries(self) -> list[Entry]:
        """All visible releases, oldest first."""
        identity = self.identity
        return [self._entry(line, identity) for line in self._index.lines()]

    def fetch(self, model: str, version: str, target: Path, *, on_bytes: OnBytes = ignore) -> Entry:
        """Copies a release out; the target appears once its digest was found right."""
        entry = find_entry(self.entries(), model, version)
        with appearing(target) as partial:
            self._copy_out(entry, partial, on_bytes)
            check_fetched(partial, entry)
        return entry

    def open_file(self, model: str, version: str, name: str) -> BinaryIO:
        """A file of a release as a stream."""
        entry = find_entry(self.entries(), model, version)
        try:
            return open_below(self._object(entry.digest), name)
        except FileNotFoundError as error:
            msg = f"{entry.name}: has no file {name!r}. Its SHA256SUMS lists what it has."
            raise StoreError(msg) from error
        except (OSError, Refused) as error:
            raise _damaged(entry, error) from error

    def file_names(self, model: str, version: str) -> list[str]:
        """Every file that stands in a release's place."""
        entry = find_entry(self.entries(), model, version)
        try:
            return list(list_files(self._object(entry.digest)))
        except (Refused, CannotCheck) as error:
            raise _damaged(entry, error) from error

    def withdraw(self, model: str, version: str, envelope: bytes) -> None:
        """Attaches a withdrawal; the first one stays."""
        entry = find_entry(self.entries(), model, version)
        reason = reason_in(entry, envelope)
        with self._writing(), self._locked(), contextlib.suppress(FileExistsError):
            link_new(self.root / withdrawal_name(model, version), envelope, self.root)
        check_withdrawn(find_entry(self.entries(), model, version), reason)

    def withdrawals(self) -> list[bytes]:
        """The envelopes of all withdrawals that can be read; `entries` tells of the others."""
        found = map(self._envelope, self._withdrawal_names())
        return [envelope for envelope in found if isinstance(envelope, bytes)]

    def _withdrawal_names(self) -> list[str]:
        return [
            f"{WITHDRAWALS}{path.name}" for path in sorted((self.root / WITHDRAWALS).glob("*.json"))
        ]

    def unfinished(self) -> list[Entry]:
        """None: what is not visible holds no version here."""
        return []

    def prune(self) -> list[str]:
        """Removes runs of dead publishers, and objects that no entry and no live run names."""
        _ = self.identity
        with self._writing(), self._locked():
            removed = [*self._discard_runs(), *self._discard_objects()]
            for draft in self.root.glob(".*.tmp"):  # made and linked under this lock
                draft.unlink()
            shutil.rmtree(self.root / "trash", ignore_errors=True)
        return removed

    def audit(self, receipts: Sequence[Receipt]) -> list[str]:
        """How the store contradicts the receipts or itself."""
        withdrawals = self._withdrawal_names()  # first: what is withdrawn is published by then
        try:
            entries = self.entries()
        except StoreError as error:
            return [str(error)]
        lost = [
            f"{entry.name}: visible, but its files are gone"
            for entry in entries
            if not self._object(entry.digest).is_dir()
        ]
        odd = odd_withdrawals(entries, withdrawals)
        return [*compare_receipts(self.identity, entries, receipts), *lost, *odd]

    def _create(self) -> None:
        if (self.root / "store.json").exists():
            return
        self._refuse_other_use()
        for name in _FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        head = canonical_json({"schema": SCHEMA, "id": secrets.token_hex(16)})
        with self._locked():
            if not (self.root / "store.json").exists():
                link_new(self.root / "store.json", head, self.root)
        sync_folder(self.root.parent)

    def _refuse_other_use(self) -> None:
        """Prune would remove what somebody keeps in folders of the same names."""
        for path in self.root.glob("*"):
            left = path.name == "lock" or path.name.startswith(".store.json.")  # by who was killed
            held = path.name not in _FOLDERS or any(path.glob("*"))
            # last: another publisher may just have made the store, and be at work in it
            if held and not left and not (self.root / "store.json").exists():
                msg = f"directory:{self.root}: not a store of releases, holds {path.name!r}. "
                raise StoreError(msg + "Name a folder of its own.")

    def _visible(self, release: Release) -> Entry | None:
        """The entry of this version, if there is one: of these bytes, or an error."""
        for entry in self.entries():
            if (entry.model, entry.version) == (release.model, release.version):
                if entry.digest != release.digest:
                    raise already_published(entry, release.digest)
                return entry
        return None

    def _make_visible(
        self, folder: Path, release: Release, on_step: OnStep, on_bytes: OnBytes
    ) -> Entry:
        with self._run(release.digest) as run:
            base = self._index.head()
            on_step("staged")
            if not self._object(release.digest).exists():
                copy_release(folder, release, run / "content", on_bytes)
                on_step("uploaded")
                check_back(run / "content", release)
                on_step("read_back")
                self._adopt(run / "content", release)
            else:
                check_back(self._object(release.digest), release)
            on_step("merged")
            entry = self._append(run, release, base)
            on_step("tagged")
            return entry

    @contextlib.contextmanager
    def _run(self, digest: str) -> Iterator[Path]:
        """A publisher's own folder; its name claims the digest for as long as its lock is held."""
        run = self.root / "runs" / f"{digest}-{secrets.token_hex(8)}"
        with contextlib.ExitStack() as held:
            with self._locked():
                run.mkdir()
                stream = held.enter_context((run / "lock").open("wb"))
                fcntl.flock(stream, fcntl.LOCK_EX)
            held.callback(shutil.rmtree, run, ignore_errors=True)
            yield run

    def _adopt(self, content: Path, release: Release) -> None:
        """Moves read-back content to its place; an equal publisher may have been first."""
        place = self._object(release.digest)
        try:
            content.rename(place)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            check_back(place, release)
        sync_folder(place.parent)

    def _append(self, run: Path, release: Release, base: str | None) -> Entry:
        """Compare and set: the entry names the head it was written on top of."""
        with self._locked():
            if (entry := self._visible(release)) is not None:
                return entry
            return self._entry(self._index.append(release, base, run), self.identity)

    def _object(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def _entry(self, line: Line, identity: str) -> Entry:
        audited, merged = (f"{identity}#{one}" for one in (line.release, line.digest))
        entry = Entry(line.model, line.version, line.release, None, audited, merged)
        name = withdrawal_name(line.model, line.version)
        if not os.path.lexists(self.root / name):
            return entry
        return replace(entry, withdrawn=stored_reason(entry, self._envelope(name)))

    def _envelope(self, name: str) -> bytes | StoreError:
        """A withdrawal, or why it cannot be read."""
        try:
            return read_small(self.root, name)
        except StoreError as error:
            return error

    def _copy_out(self, entry: Entry, partial: Path, on_bytes: OnBytes) -> None:
        folder = self._object(entry.digest)
        try:
            names = list_files(folder)
            sums = parse_sums(read_file(folder, SUMS_NAME, limit=_MAX_SUMS))
            if odd := names.keys() - UNLISTED - sums.keys():  # of any size: it is not copied
                raise Refused("file-unlisted", min(odd), f"{SUMS_NAME} does not list it")
            for name in names:
                with open_below(folder, name) as source:
                    write_file(source, partial / name, on_bytes)
        except (Refused, CannotCheck) as error:
            raise _damaged(entry, error) from error

    def _discard_runs(self) -> Iterator[str]:
        for run in sorted((self.root / "runs").iterdir()):
            if not _is_alive(run):
                with contextlib.suppress(FileNotFoundError):  # its publisher has just finished
                    self._to_trash(run)
                    yield f"runs/{run.name}"

    def _discard_objects(self) -> Iterator[str]:
        needed = {line.release for line in self._index.lines()}
        needed |= {run.name.partition("-")[0] for run in (self.root / "runs").iterdir()}
        for place in sorted((self.root / "objects").iterdir()):
            if place.name not in needed:
                self._to_trash(place)
                yield f"objects/{place.name}"

    def _to_trash(self, path: Path) -> None:
        trash = self.root / "trash"
        trash.mkdir(exist_ok=True)
        path.rename(trash / f"{path.name}-{secrets.token_hex(4)}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        until = time.monotonic() + LOCK_WAIT
        # open for both, so that a pipe planted there is not waited for
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > until:
                        msg = f"{self.root / 'lock'}: held for {LOCK_WAIT} s. End its holder."
                        raise StoreError(msg) from error
                    time.sleep(0.02)
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full or read-only disk into a sentence."""
        try:
            yield
        except OSError as error:
            msg = f"directory:{self.root}: cannot be written: {error}. Free the disk, run it again."
            raise StoreError(msg) from error


def _damaged(entry: Entry, error: Exception) -> LineageBroken:
    why = visible(str(error))
    return LineageBroken(f"{entry.name}: the store's copy is damaged: {why}. {RESTORE}")


def _is_alive(run: Path) -> bool:
    """The kernel lets a lock go when its holder ends, however it ends."""
    try:
        with open_below(run, "lock") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError, Refused):  # no publisher made it
        return False
    except BlockingIOError:
        return True
    return False
