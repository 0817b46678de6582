"""What is signed about a store: receipts left in the log, withdrawals, and both held against it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov3.errors import StoreError
from dinov3.publish.entry import Entry
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.signed_log import append_receipt
from dinov3.release.envelope import read_unchecked
from dinov3.release.receipts import RECEIPTS_NAME, Receipt, read_keys, read_receipts
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible

WITHDRAWALS = "withdrawals/"  # in every store
UNREADABLE = "a withdrawal that says nothing"  # in place of the reason, where that is unreadable


@dataclass(frozen=True)
class Withdrawal:
    """The content of a withdrawal's envelope; its signature is checked by who holds a key."""

    model: str
    version: str
    digest: str
    reason: str


def read_withdrawal(envelope: bytes) -> Withdrawal:
    """What a withdrawal claims, its signature unchecked.

    Raises:
        StoreError: It is no withdrawal.
    """
    try:
        said = read_unchecked(envelope, "withdraw")
    except Refused as error:
        msg = f"withdrawal: not readable: {visible(str(error))}. Restore the store."
        raise StoreError(msg) from error
    return Withdrawal(said["model"], said["version"], said["release"], said["reason"])


def reason_in(entry: Entry, envelope: bytes) -> str:
    """The reason that a withdrawal of this very release gives.

    Raises:
        StoreError: It is none, or of another release.
    """
    said = read_withdrawal(envelope)
    if (said.model, said.version, said.digest) != (entry.model, entry.version, entry.digest):
        named = visible(f"{said.model}@{said.version} {said.digest}")
        msg = f"{entry.name}: the withdrawal names {named}. Sign one of this release."
        raise StoreError(msg)
    return said.reason


def stored_reason(entry: Entry, envelope: bytes | StoreError) -> str:
    """Why a store says that a release was withdrawn; what cannot be read counts as a withdrawal.

    Args:
        entry: The release.
        envelope: What stands in the store in its name, or why it cannot be read.
    """
    try:
        if isinstance(envelope, StoreError):
            raise envelope
        return reason_in(entry, envelope)
    except StoreError as error:
        return f"{UNREADABLE}: {error}"


def check_withdrawn(entry: Entry, reason: str) -> None:
    """Refuses a second withdrawal for another reason.

    Raises:
        StoreError: The store gives another one.
    """
    if entry.withdrawn != reason:
        first = visible(str(entry.withdrawn))
        msg = f"{entry.name}: already withdrawn, because: {first}. Leave it so."
        raise StoreError(msg)


def odd_withdrawals(entries: Iterable[Entry], names: Iterable[str]) -> Iterator[str]:
    """What is wrong with a store's withdrawals.

    Args:
        entries: Its visible releases.
        names: Of all its withdrawals, `withdrawals/MODEL@VERSION.json`.
    """
    known: set[str] = set()
    for entry in entries:
        known.add(withdrawal_name(entry.model, entry.version))
        if entry.withdrawn is not None and entry.withdrawn.startswith(UNREADABLE):
            yield f"{entry.name}: {entry.withdrawn}"
    for name in names:
        if name not in known:
            yield f"{name}: withdraws nothing that is visible here"


def withdrawal_name(model: str, version: str) -> str:
    """Where a store keeps the withdrawal of a release."""
    return f"{WITHDRAWALS}{model}@{version}.json"


def leave_receipt(entry: Entry, *, log: Path, key: PrivateKey) -> None:
    """Appends the signed receipt of a visible release, unless the log has it.

    Raises:
        StoreError: The log cannot be trusted or written.
    """
    receipt = Receipt(
        "publish",
        entry.model,
        entry.version,
        entry.digest,
        audited=entry.audited,
        merged=entry.merged,
    )
    read_log(log, [key.public])  # a forged line that says the same must not stand in for ours
    append_receipt(log, receipt, key)


def read_log(log: Path, keys: Iterable[bytes] | None = ()) -> list[Receipt]:
    """The receipts of a log, each signed by one of the log's own keys or a further one.

    Args:
        log: Folder of the log of releases.
        keys: Further public keys in PEM; None leaves all signers unchecked.

    Raises:
        StoreError: A line is not signed by one of them or not in its place.
    """
    known = None if keys is None else [*log_keys(log), *keys]
    try:
        return read_receipts(log / RECEIPTS_NAME, known)
    except (Refused, CannotCheck) as error:
        why = visible(str(error))
        msg = f"{log / RECEIPTS_NAME}: {why}. Restore it from git, or add the key that signed."
        raise StoreError(msg) from error


def log_keys(log: Path) -> list[bytes]:
    """The public keys that a log trusts, in PEM.

    Raises:
        StoreError: One cannot be read.
    """
    try:
        return read_keys(log)
    except CannotCheck as error:
        msg = f"{visible(str(error))}. Restore it from git."
        raise StoreError(msg) from error


def compare_receipts(
    identity: str, entries: Sequence[Entry], receipts: Sequence[Receipt]
) -> Iterator[str]:
    """What receipts of this store and its visible releases say against each other."""
    published = [one for one in receipts if one.kind == "publish"]
    mine = [one for one in published if is_of(identity, one)]
    if not mine and (published or entries):
        yield f"{identity}: no receipt of this log speaks of this store"
    visible = {entry.name: entry for entry in entries}
    for receipt in mine:
        name = f"{receipt.model}@{receipt.version}"
        found = visible.get(name)
        if found is None:
            yield f"{name}: a receipt names it, the store does not: rolled back or removed"
        elif found.digest != receipt.release:
            yield f"{name}: made again with other bytes, {found.digest}, receipt {receipt.release}"
        elif (found.audited, found.merged) != (receipt.audited, receipt.merged):
            yield f"{name}: history rewritten, now {found.merged}, receipt {receipt.merged}"
    with_receipt = {f"{receipt.model}@{receipt.version}" for receipt in mine}
    for name in sorted(visible.keys() - with_receipt):
        yield f"{name}: visible without a receipt"
    yield from _lost_withdrawals(identity, visible, receipts)


def _lost_withdrawals(
    identity: str, visible: Mapping[str, Entry], receipts: Sequence[Receipt]
) -> Iterator[str]:
    reasons: dict[str, set[str | None]] = {}  # of two who withdraw at once the store takes one's
    for receipt in receipts:
        if receipt.kind == "withdraw" and is_of(identity, receipt):
            reasons.setdefault(f"{receipt.model}@{receipt.version}", set()).add(receipt.reason)
    for name in sorted(reasons.keys() & visible.keys()):
        if visible[name].withdrawn not in reasons[name]:
            yield f"{name}: withdrawn in the log, the store says otherwise"


def is_of(identity: str, receipt: Receipt) -> bool:
    """Whether a receipt is of this store."""
    return receipt.merged is not None and receipt.merged.rpartition("#")[0] == identity
