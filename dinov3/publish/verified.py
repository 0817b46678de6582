"""A release that may be used: verified as `dinov3 verify` does it, or an error."""

from pathlib import Path

from dinov3.errors import DataError, LineageBroken
from dinov3.publish.store import Store
from dinov3.release.audit import Question
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible
from dinov3.release.verify import verify_release


def verified_signer(
    folder: Path, key: Path | None, expect: str | None, store: Store | None
) -> str | None:
    """The fingerprint of the key that signed a release which holds; None without a key.

    Args:
        folder: The release.
        key: File of the public key that must have signed it; None leaves the signer unchecked.
        expect: `MODEL@VERSION` that it must be; None takes any.
        store: It came from there, and must be what the store calls so and not be withdrawn.

    Raises:
        LineageBroken: It does not hold, or was withdrawn.
        DataError: It cannot be checked, or the key lies in the release.
    """
    where = expect or str(folder)
    if key is not None and key.resolve().is_relative_to(folder.resolve()):
        msg = f"key: lies in the release itself, got {key}. Give one that you got elsewhere."
        raise DataError(msg)
    entries = [] if store is None else store.entries()
    why = next((entry.withdrawn for entry in entries if entry.name == expect), None)
    if why is not None:
        msg = f"{where}: refused, withdrawn: {visible(why)}. Do not use it."
        raise LineageBroken(msg)
    try:
        question = Question(
            key=None if key is None else key.read_bytes(),
            expect=expect,
            withdrawals=None if store is None else store.withdrawals(),
            published=None if store is None else {one.name: one.digest for one in entries},
        )
        return verify_release(folder, question).signer.fingerprint
    except Refused as error:
        msg = f"{where}: refused, {error.name}: {error}. Do not use it."
        raise LineageBroken(msg) from error
    except (CannotCheck, OSError) as error:
        msg = f"{where}: cannot be verified: {error}. Give a readable key and release."
        raise DataError(msg) from error
