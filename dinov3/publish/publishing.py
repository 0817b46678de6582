"""Publishing, fetching, withdrawing and auditing releases, around any store.

    publish:  verify DIR ─► store: upload, read back, make visible ─► signed receipt in the log
    get:      store ─► hidden folder ─► verify ─► DIR appears

Nothing is published that the verifier would refuse, and nothing fetched appears unverified.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov3.errors import AlreadyPublished, LineageBroken, ReleaseRefused, StoreError, StoreMissing
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.releases import View
from dinov3.publish.signed_log import append_receipt
from dinov3.publish.store import (
    Entry,
    OnBytes,
    OnStep,
    Release,
    Store,
    appearing,
    find_entry,
    ignore,
    is_of,
    log_keys,
    read_log,
    read_release,
)
from dinov3.release.audit import Audit, Question, audit_release
from dinov3.release.envelope import open_among
from dinov3.release.files import SIGNATURE_NAME, read_file
from dinov3.release.public_key import key_hint, load_public_key
from dinov3.release.receipts import Receipt
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible
from dinov3.release.revoked import REVOKED_NAME
from dinov3.release.signature import verify_signature

_MAX_BUNDLE = 32 << 20  # bytes of model.sig


@dataclass(frozen=True)
class Fetched:
    """A release that was fetched; `signer` is a fingerprint, None where no key was there to ask."""

    entry: Entry
    signer: str | None


def publish_release(
    folder: Path,
    store: Store,
    *,
    log: Path,
    key: PrivateKey,
    on_step: OnStep = ignore,
    on_bytes: OnBytes = ignore,
) -> Entry:
    """Publishes a release that its own verifier accepts; the same release again is no change.

    Args:
        folder: A release directory, signed with the key.
        store: Where to.
        log: Folder of the log of releases.
        key: The key that signed it; it signs the receipt.
        on_step: Told each step once it is durable.
        on_bytes: Told how many more bytes have been copied.

    Raises:
        ReleaseRefused: The verifier refuses it.
        AlreadyPublished: The version was published with other bytes, here or by the log's word.
        StoreError: The store cannot be used.
    """
    verified = verify_release(folder, keys=[key.public], log=log)
    _refuse_other_bytes(verified, read_log(log, [key.public]))
    return store.publish(folder, log=log, key=key, on_step=on_step, on_bytes=on_bytes)


def is_made(store: Store) -> bool:
    """Whether the store is there; the first publication makes it, also under a misspelt name."""
    try:
        return bool(store.identity)
    except StoreMissing:
        return False


def verify_release(
    folder: Path,
    *,
    keys: Sequence[bytes],
    log: Path,
    expect: str | None = None,
    where: str | None = None,
) -> Audit:
    """Lets the verifier judge a folder.

    Args:
        folder: A release directory.
        keys: Public keys in PEM, one of which must have signed it; none leaves the signer open.
        log: Folder of the log of releases, whose revoked keys sign nothing.
        expect: `MODEL@VERSION` it must be.
        where: What to call it in an error; by default the folder.

    Raises:
        ReleaseRefused: It does not hold.
        StoreError: It cannot be checked.
    """
    revoked = log / REVOKED_NAME
    question = Question(
        key=_named_by(folder, keys), expect=expect, revoked=revoked if revoked.exists() else None
    )
    try:
        return audit_release(folder, question)
    except Refused as error:
        why = visible(str(error)).rstrip(".")
        raise ReleaseRefused(f"{where or folder}: refused, {error.name}: {why}.") from error
    except CannotCheck as error:
        why = visible(str(error)).rstrip(".")
        raise StoreError(f"{where or folder}: cannot be checked: {why}.") from error


def read_built(folder: Path, model: str) -> Release:
    """A release directory's name and digest.

    Raises:
        StoreError: It is no release of this model.
    """
    try:
        release = read_release(folder)
    except Refused as error:
        msg = f"{folder}: no release: {visible(str(error))}. Build it again."
        raise StoreError(msg) from error
    if release.model != model:
        msg = f"{folder}: a release of another model, got {release.model}. Name that model."
        raise StoreError(msg)
    return release


def _named_by(folder: Path, keys: Sequence[bytes]) -> bytes | None:
    """The key that a signature names, else the first: the verifier then says what is wrong."""
    try:
        bundle = parse_json(read_file(folder, SIGNATURE_NAME, limit=_MAX_BUNDLE))
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        named = [key for key in keys if key_hint(load_public_key(key)) == hint]
    except (Refused, CannotCheck, RecordError, KeyError, TypeError):
        named = []
    return next(iter([*named, *keys]), None)


def fetch_release(
    name: tuple[str, str],
    target: Path,
    store: Store,
    *,
    keys: Sequence[bytes],
    log: Path,
    with_withdrawn: bool = False,
    on_bytes: OnBytes = ignore,
) -> Fetched:
    """Fetches a release to a folder that appears once the verifier has accepted it.

    Args:
        name: Model and version.
        target: A folder that is not there.
        store: Where from.
        keys: Public keys in PEM, one of which signed it; none leaves the signer unchecked.
        log: Folder of the log of releases: keys it revokes, releases it withdraws.
        with_withdrawn: Take one that was withdrawn.
        on_bytes: Told how many more bytes have been copied.

    Raises:
        LineageBroken: The verifier refuses it.
        StoreError: It is not in the store, withdrawn, or the target is there.
    """
    entry = find_entry(store.entries(), *name)
    reason = withdrawn_because(entry, read_log(log, keys))
    if reason is not None and not with_withdrawn:
        msg = f"{entry.name}: withdrawn, because: {visible(reason)}. Say --withdrawn to have it."
        raise StoreError(msg)
    try:
        with appearing(target) as hidden:
            store.fetch(*name, hidden, on_bytes=on_bytes)
            where = f"{entry.name}: the store's copy"
            verified = verify_release(hidden, keys=keys, log=log, expect=entry.name, where=where)
    except ReleaseRefused as error:
        msg = f"{error} Do not use it."
        raise LineageBroken(msg) from error
    return Fetched(entry, verified.signer.fingerprint)


def withdraw_release(
    name: tuple[str, str], reason: str, store: Store, *, log: Path, key: PrivateKey
) -> Entry:
    """Takes a release back: a signed withdrawal in the log, then in the store.

    Args:
        name: Model and version.
        reason: One line that says why.
        store: Where it is published.
        log: Folder of the log of releases.
        key: The key that signed the release.

    Raises:
        StoreError: It is not in the store, withdrawn already, or signed by another key.
    """
    entry = find_entry(store.entries(), *name)
    if not reason.isprintable() or not reason.strip():
        msg = f"--reason: not one line of text, got {reason!r}. Say why in one line."
        raise StoreError(msg)
    before = withdrawn_because(entry, read_log(log, [key.public]))
    if before not in (None, reason):
        msg = f"{entry.name}: already withdrawn, because: {visible(before or '')}. Leave it so."
        raise StoreError(msg)
    if signer_of(View(store, entry), [key.public]) is None:
        msg = f"{entry.name}: not signed with {key.fingerprint}. Use the key that signed it."
        raise StoreError(msg)
    receipt = Receipt(
        "withdraw",
        entry.model,
        entry.version,
        entry.digest,
        audited=entry.audited,
        merged=entry.merged,
        reason=reason,
    )
    store.withdraw(*name, append_receipt(log, receipt, key).envelope)
    return find_entry(store.entries(), *name)


def withdrawn_because(entry: Entry, receipts: Iterable[Receipt]) -> str | None:
    """Why a release was withdrawn, by the store's word or the log's; None when it was not."""
    for receipt in receipts:
        if receipt.kind == "withdraw" and receipt.release == entry.digest:
            return receipt.reason
    return entry.withdrawn


def signer_of(view: View, keys: Iterable[bytes]) -> str | None:
    """Fingerprint of the key, among several, that signed a stored release; None when none did.

    Raises:
        StoreError: One is no public key.
    """
    if view.signature is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / SIGNATURE_NAME).write_bytes(view.signature)
        for key in keys:
            try:
                return verify_signature(Path(scratch), view.digests, key).fingerprint
            except Refused:
                continue
            except CannotCheck as error:
                raise StoreError(visible(str(error))) from error
    return None


def receipt_state(entry: Entry, receipts: Iterable[Receipt], identity: str) -> str:
    """What the log says of a release, in a few words."""
    name = (entry.model, entry.version)
    spoken = [one for one in receipts if one.kind == "publish" and (one.model, one.version) == name]
    for receipt in spoken:
        if receipt.release != entry.digest:
            return f"CONTRADICTED: the log has release digest {receipt.release}"
    here = [one for one in spoken if is_of(identity, one)]
    if not here:
        return "none for this store"
    if any((one.audited, one.merged) != (entry.audited, entry.merged) for one in here):
        return "CONTRADICTED: the store's history was rewritten"
    return f"in the log, signed by {here[0].signer}"


def audit_store(
    store: Store, *, log: Path, keys: Sequence[bytes], with_bytes: bool = False
) -> list[str]:
    """How store and log contradict each other, and withdrawals that no known key signed.

    Args:
        store: The store.
        log: Folder of the log of releases.
        keys: Public keys in PEM beside those of the log.
        with_bytes: Also read every stored byte again.
    """
    try:
        receipts = read_log(log, keys)
    except StoreError as error:
        return [str(error)]
    known = [*log_keys(log), *keys]
    findings = store.audit(receipts)
    while findings and (later := read_log(log, keys)) != receipts:
        receipts = later  # what was published meanwhile has left its receipt
        findings = store.audit(receipts)
    for envelope in store.withdrawals():
        try:
            open_among(envelope, known, "withdraw")
        except (Refused, CannotCheck) as error:
            findings.append(f"a withdrawal in the store: {error}")
    return [*findings, *(_damage(store, findings) if with_bytes else ())]


def _damage(store: Store, findings: Sequence[str]) -> Iterator[str]:
    try:
        entries = store.entries()
    except StoreError as error:
        if str(error) not in findings:
            yield str(error)
        return
    for entry in entries:
        try:
            yield from View(store, entry).damage()
        except (LineageBroken, StoreError) as error:
            yield str(error)


def _refuse_other_bytes(release: Audit, receipts: Iterable[Receipt]) -> None:
    """A version means one release in every store: a store that forgot it must not take another."""
    for receipt in receipts:
        named = f"{receipt.model}@{receipt.version}"
        same = receipt.kind == "publish" and named == release.name
        if same and receipt.release != release.digest:
            msg = (
                f"{named}: the log has a receipt for other bytes, got release digest "
                f"{release.digest}, the receipt {receipt.release}. Publish under the next "
                f"version (dinov3 releases next {receipt.model})."
            )
            raise AlreadyPublished(msg)
