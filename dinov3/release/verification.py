"""What `dinov3 verify` does with its options: a folder or a lone file, a key, a store."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from dinov3.errors import DinoError, LineageBroken
from dinov3.release.audit import Audit, Question, audit_release
from dinov3.release.lone_file import Found, find_releases
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.verdict import Verdict, to_json_text, to_text


class StoreEntry(Protocol):
    """A visible release of a store."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def digest(self) -> str:
        """Its release digest."""

    @property
    def withdrawn(self) -> str | None:
        """Why it was withdrawn, by the store's word."""


class ReadableStore(Protocol):
    """What is asked of a store of releases."""

    def entries(self) -> Iterable[StoreEntry]:
        """All visible releases."""

    def withdrawals(self) -> Iterable[bytes]:
        """The envelopes of all withdrawals."""

    def open_file(self, model: str, version: str, name: str) -> BinaryIO:
        """A file of a release as a stream."""

    def fetch(self, model: str, version: str, target: Path) -> Any:
        """Copies a release to a folder."""


OpenStore = Callable[[str], ReadableStore]


def answer(options: argparse.Namespace, open_store: OpenStore | None) -> tuple[str, int]:
    """The answer as it is printed, and its exit code.

    Args:
        options: Of the command line.
        open_store: Opens what `--store` names.
    """
    verdict = Verdict(target=str(options.target))
    try:
        _run(options, open_store, verdict)
    except Refused as error:
        verdict.refusal = error
    except LineageBroken as error:  # of a store, whose copy is damaged
        verdict.refusal = Refused("file-changed", str(options.store), str(error))
    except (CannotCheck, DinoError) as error:
        verdict.fault = str(error)
    text = to_json_text(verdict) if options.format == "json" else to_text(verdict)
    return text, verdict.exit_code


def _run(options: argparse.Namespace, open_store: OpenStore | None, verdict: Verdict) -> None:
    target: Path = options.target
    store = _open(options.store, open_store)
    if target.is_dir():
        _verify_folder(target, options, store, verdict.audit)
        return
    if not target.is_file():
        msg = f"{target}: no such file or folder"
        raise CannotCheck(msg)
    with find_releases(target, options.artifacts, store, _expected(options.expect)) as found:
        verdict.file = found.file
        _check_found(target, found, options)
        outcomes = [_judge(folder, found, options, store) for folder in found.folders]
        _decide(outcomes, found, verdict)


@dataclass
class _Outcome:
    """What one release that holds a lone file came to."""

    folder: Path
    audit: Audit
    refusal: Refused | None = None
    fault: str | None = None

    @property
    def rank(self) -> int:
        """0 verified, 1 undecided, 2 refused."""
        if self.refusal is not None:
            return 2
        return 1 if self.fault is not None or self.audit.not_checked else 0

    def sentences(self) -> Iterator[str]:
        """What it came to, where another one decides."""
        where = f"{self.audit.name or self.folder}, which holds this file too"
        if self.refusal is not None:
            yield f"{where}: refused, {self.refusal.name}: {self.refusal}"
        elif self.fault is not None:
            yield f"{where}: {self.fault}"
        yield from (f"{where}: not checked {one}" for one in self.audit.not_checked)


def _check_found(target: Path, found: Found, options: argparse.Namespace) -> None:
    """Some release is there to be asked.

    Raises:
        Refused: `wrong-release`: only others than the expected one hold the file.
        CannotCheck: None holds it, as far as they can be read.
    """
    if found.folders:
        return
    if found.others:
        held = ", ".join(sorted(set(found.others)))
        why = f"is of {held}, {options.expect} was expected"
        raise Refused("wrong-release", str(target), why)
    where = ", ".join(found.searched)
    msg = f"{target}: no release holds these bytes or tensors, searched {where}. Give --store"
    if found.damaged:
        msg = f"{msg}. What is damaged could hold them: {'; '.join(found.damaged)}"
    raise CannotCheck(msg)


def _judge(
    folder: Path, found: Found, options: argparse.Namespace, store: ReadableStore | None
) -> _Outcome:
    """Audits one release, and asks whether it holds the file as it was audited."""
    outcome = _Outcome(folder, Audit())
    try:
        _verify_folder(folder, options, store, outcome.audit)
        held = {*outcome.audit.hashes.values(), *outcome.audit.tensors}
        if not held & {found.file.sha256, found.file.tensors}:
            why = f"not a file of {outcome.audit.name} as it was verified"
            raise Refused("file-changed", options.target.name, why)
    except Refused as error:
        outcome.refusal = error
    except CannotCheck as error:
        outcome.fault = str(error)
    return outcome


def _decide(outcomes: Sequence[_Outcome], found: Found, verdict: Verdict) -> None:
    """One release that verifies is enough; what the others came to is said."""
    best = min(outcomes, key=lambda one: one.rank)  # of equals the first
    verdict.audit, verdict.refusal, verdict.fault = best.audit, best.refusal, best.fault
    held = verdict.audit.hashes.values()
    found.file.same_tensors_only = bool(held) and found.file.sha256 not in held
    names = (str(one.audit.name) for one in outcomes if one.rank == best.rank)
    found.file.releases += dict.fromkeys(names)
    open_ends = verdict.audit.not_checked if best.rank else verdict.audit.not_proven
    for other in outcomes:
        if other is not best:
            open_ends += other.sentences()
    open_ends += (f"whether others hold it: {one}" for one in found.damaged)


def _open(spec: str | None, open_store: OpenStore | None) -> ReadableStore | None:
    if spec is None:
        return None
    if open_store is None:
        msg = "--store: stores cannot be opened here"
        raise CannotCheck(msg)
    return open_store(spec)


def _verify_folder(
    folder: Path, options: argparse.Namespace, store: ReadableStore | None, audit: Audit
) -> None:
    entries = [] if store is None else list(store.entries())
    question = Question(
        key=_read_key(options.key, folder),
        expect=_expected(options.expect),
        revoked=_outside(options.revoked, folder, "--revoked"),
        artifacts=options.artifacts,
        needs_artifacts=options.target.is_dir(),
        images=options.images,
        withdrawals=None if store is None else list(store.withdrawals()),
        published=None if store is None else {_name(one): one.digest for one in entries},
        withdrawn={_name(one): one.withdrawn for one in entries if one.withdrawn is not None},
    )
    audit_release(folder, question, audit)


def _read_key(path: Path | None, folder: Path) -> bytes | None:
    """The key's bytes; one that comes with the release vouches for nothing.

    Raises:
        CannotCheck: It lies in the release, or cannot be read.
    """
    outside = _outside(path, folder, "--key")
    if outside is None:
        return None
    try:
        return outside.read_bytes()
    except OSError as error:
        msg = f"--key {outside}: cannot be read: {error.strerror}"
        raise CannotCheck(msg) from error


def _outside(path: Path | None, folder: Path, option: str) -> Path | None:
    try:
        inside = path is not None and path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        msg = f"{option} {path}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    if inside:
        msg = f"{option} {path}: lies in the release itself. Give one that you got elsewhere."
        raise CannotCheck(msg)
    return path


def _expected(text: str | None) -> str | None:
    if text is None:
        return None
    model, at, version = text.partition("@")
    if not model or not at or not version:
        msg = f"--expect: not MODEL@VERSION, got {text!r}"
        raise CannotCheck(msg)
    return text


def _name(entry: StoreEntry) -> str:
    return f"{entry.model}@{entry.version}"
