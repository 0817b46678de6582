"""Published releases as people read them: list, show, what comes next.

Small files are read out of the store one by one, each checked against the release digest of its
entry: SHA256SUMS and the signature make that digest, SHA256SUMS binds every other file. No weights
are fetched for it.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from dinov3.errors import LineageBroken, StoreError
from dinov3.publish.store import (
    CHUNK,
    Entry,
    Release,
    Store,
    check_name,
    copy_stream,
    version_key,
)
from dinov3.release.chain import stem_of
from dinov3.release.contents import CARD_NAME, EVALS_NAME
from dinov3.release.files import SIGNATURE_NAME, SUMS_NAME, parse_sums
from dinov3.release.head import Head, read_head
from dinov3.release.index import Stored
from dinov3.release.policy import MODEL
from dinov3.release.receipts import Receipt
from dinov3.release.record import Record, RecordError, digest_of, parse_json, parse_record
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible
from dinov3.release.tensors import FileHash

FIRST_VERSION = "0.1.0"
_MAX_WHOLE = 64 << 20  # bytes of a file that is read into memory
_CARD_LINES = 20
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")  # what a card escapes in Markdown


class View:
    """One stored release without its weights; nothing is believed that its digest does not bind.

    Raises:
        LineageBroken: The store's SHA256SUMS or signature are not those of the release.
    """

    def __init__(self, store: Store, entry: Entry) -> None:
        self.entry = entry
        self._store = store
        own = {SUMS_NAME: self._whole(SUMS_NAME)}
        try:
            self.hashes = parse_sums(own[SUMS_NAME])
        except Refused as error:
            raise self._broken(str(error)) from error
        missing: StoreError | None = None
        try:
            own[SIGNATURE_NAME] = self._whole(SIGNATURE_NAME)
        except StoreError as error:  # unsigned, or the store fails: the digest tells
            missing = error
        self.signature = own.get(SIGNATURE_NAME)
        self.digests = {**self.hashes, **{name: _sha256(data) for name, data in own.items()}}
        if digest_of(sorted([name, one] for name, one in self.digests.items())) != entry.digest:
            raise missing or self._broken(f"its {SUMS_NAME} or {SIGNATURE_NAME} was changed")

    def read(self, name: str) -> bytes:
        """A file's bytes, checked.

        Raises:
            LineageBroken: The store's bytes are not those of the release.
            StoreError: The release has no such file.
        """
        data = self._whole(name)
        self._check(name, _sha256(data))
        return data

    def json(self, name: str) -> Any:
        """A file's JSON, checked.

        Raises:
            LineageBroken: As `read`, or it is no JSON.
        """
        try:
            return parse_json(self.read(name))
        except RecordError as error:
            raise self._broken(f"{name}: {error}") from error

    def copy(self, name: str, target: Path) -> Path:
        """Writes a file of any size, checked, in constant memory; returns the target."""
        with self._open(name) as source, target.open("wb") as stream:
            found = copy_stream(source, stream)
        self._check(name, found)
        return target

    def damage(self) -> Iterator[str]:
        """Each stored file that is not as the release has it, or no part of it; all read once."""
        try:
            there = self._store.file_names(self.entry.model, self.entry.version)
            for name in sorted(set(there) - self.digests.keys()):
                yield str(self._broken(f"{name}: {SUMS_NAME} does not list it"))
        except (LineageBroken, StoreError) as error:
            yield str(error)
        for name in self.hashes:
            try:
                with self._open(name) as source, Path(os.devnull).open("wb") as nowhere:
                    self._check(name, copy_stream(source, nowhere))
            except (LineageBroken, StoreError) as error:
                yield str(error)

    def head(self) -> Head:
        """`release.json`, checked field by field.

        Raises:
            LineageBroken: It is malformed.
            StoreError: Its schema is newer.
        """
        try:
            hashes = {name: FileHash(digest, 0) for name, digest in self.digests.items()}
            return read_head(Stored(Path(self.entry.name), hashes, self))
        except Refused as error:
            raise self._broken(str(error)) from error
        except CannotCheck as error:
            msg = f"{self.entry.name}: {visible(str(error))}"
            raise StoreError(msg) from error

    def records(self) -> dict[str, tuple[str, Record]]:
        """Digest and record by stage, inputs first; a stage that stands twice is numbered.

        Raises:
            LineageBroken: One is malformed.
        """
        found: dict[str, tuple[str, Record]] = {}
        for stage, digest in self.head().records:
            name = f"records/{stem_of(stage, digest)}.json"
            number = sum(key.partition(" ")[0] == stage for key in found)
            try:
                record = parse_record(self.read(name), name)
            except RecordError as error:
                raise self._broken(str(error)) from error
            found[f"{stage} {number + 1}" if number else stage] = digest, record
        return found

    def _open(self, name: str) -> BinaryIO:
        return self._store.open_file(self.entry.model, self.entry.version, name)

    def _whole(self, name: str) -> bytes:
        with self._open(name) as stream:
            data = bytearray()
            while chunk := stream.read(CHUNK):
                data += chunk
                if len(data) > _MAX_WHOLE:
                    raise self._broken(f"{name}: larger than {_MAX_WHOLE} bytes")
        return bytes(data)

    def _check(self, name: str, found: str) -> None:
        if found != self.hashes.get(name):
            raise self._broken(f"{name}: its sha256 is {found}, expected {self.hashes.get(name)}")

    def _broken(self, why: str) -> LineageBroken:
        return LineageBroken(
            f"{self.entry.name}: the store's copy: {visible(why)}. Restore the store."
        )


def listing(entries: Iterable[Entry]) -> Iterator[str]:
    """One line a release, by model and version; a withdrawn one says why."""
    for entry in sorted(entries, key=lambda one: (one.model, version_key(one.version))):
        state = "" if entry.withdrawn is None else f"  withdrawn: {visible(entry.withdrawn)}"
        yield f"{entry.name}  {visible(entry.digest)}{state}"


def next_version(
    model: str,
    entries: Iterable[Entry],
    receipts: Iterable[Receipt] = (),
    *,
    release: Release | None = None,
) -> str:
    """The patch version after the highest one of the store and of the log.

    Args:
        model: Its name.
        entries: Of the store.
        receipts: Of the log.
        release: If its own version is free, or is published as these very bytes, that one.
    """
    check_name(model, FIRST_VERSION)
    held = {(one.version, one.digest) for one in entries if one.model == model}
    held |= {(one.version, one.release) for one in receipts if one.model == model}
    if release is not None:
        others = {digest for version, digest in held if version == release.version}
        if others <= {release.digest}:
            return release.version
    if not held:
        return FIRST_VERSION
    major, minor, patch = max(version_key(version) for version, _ in held)
    return f"{major}.{minor}.{patch + 1}"


def describe(view: View, withdrawn: str | None) -> Iterator[str]:
    """Why it was withdrawn, if it was; the head of the model card, the chain, the metrics."""
    head = view.head()
    yield f"{view.entry.name}  release digest {view.entry.digest}"
    yield f"licence {visible(head.licence)}"
    if withdrawn is not None:
        yield f"WITHDRAWN: {visible(withdrawn)}"
    yield ""
    yield from _card_head(view.read(CARD_NAME))
    yield ""
    yield "Chain, inputs first:"
    for root in head.roots:
        licences = visible(", ".join(root.licences))
        name = f"{visible(root.name)}  {visible(root.sha256)[:12]}"
        yield f"  root {name}  {licences}  training data {root.training_data}"
    yield from (f"  {stage}  {digest[:12]}" for stage, digest in head.records)
    yield ""
    yield "Metrics with their intervals:"
    yield from (f"  {visible(name)}  {figure}" for name, figure in metrics(view).items())


def metrics(view: View) -> dict[str, str]:
    """What was measured of the model -> value and interval, as the evaluation wrote them."""
    report = view.json(EVALS_NAME)
    rows = report.get("rows") if isinstance(report, dict) else None
    return {
        metric_name(row): interval(row)
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and row.get("subject") == MODEL
    }


def metric_name(row: Mapping[str, Any]) -> str:
    """Protocol, its settings, metric."""
    figures = {"value", "low", "high", "num_samples", "subject", "metric", "protocol", "per_seed"}
    settings = [
        f"{name}={row[name]}"
        for name in sorted(row.keys() - figures)
        if isinstance(row[name], str | int)
    ]
    return " ".join([str(row.get("protocol")), *settings, str(row.get("metric"))])


def interval(row: Mapping[str, Any]) -> str:
    """A value with its interval."""
    numbers = [row.get(name) for name in ("value", "low", "high")]
    texts = [f"{one:.3f}" if isinstance(one, int | float) else "none" for one in numbers]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _card_head(card: bytes) -> Iterator[str]:
    """A model card from below its YAML header to its results, which are shown as metrics."""
    lines = card.decode("utf-8", "replace").split("\n")
    if lines[0] == "---" and "---" in lines[1:]:
        lines = lines[lines.index("---", 1) + 1 :]
    text = [line for line in lines if line.strip()]
    head = itertools.takewhile(lambda line: line != "## Results", text[:_CARD_LINES])
    yield from (visible(_ESCAPED.sub(r"\1", line)) for line in head)


def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()
