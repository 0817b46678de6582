"""Each way to cheat is refused, by its own name."""

import shutil
from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.publish.sign import sign_release
from dinov3.release.audit import Question, audit_release
from dinov3.release.refusals import Refused
from tests.audit import cheats_on_chain, cheats_on_claims, cheats_on_files, cheats_on_training
from tests.audit.changes import Cheat
from tests.audit.insider import forge, sign_again

CHEATS = [
    *cheats_on_files.CHEATS,
    *cheats_on_chain.CHEATS,
    *cheats_on_training.CHEATS,
    *cheats_on_claims.CHEATS,
]


def _refusal(cheat: Cheat, release: Path, target: Path, key: PrivateKey) -> str:
    """What the cheat is refused by."""
    if cheat.signs:
        forge(release, target, cheat.change, key, settled=cheat.settles)
    else:
        shutil.copytree(release, target)
        cheat.change(target)
    with pytest.raises(Refused, match=r".") as caught:
        audit_release(target, Question(key=key.public))
    return caught.value.name


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.what)
def test_cheat_is_refused_by_name(
    cheat: Cheat, release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    assert _refusal(cheat, release, tmp_path / "release", key) == cheat.refusal


@pytest.mark.parametrize("cheat", cheats_on_chain.OUTSIDE_CHEATS, ids=lambda cheat: cheat.what)
def test_cheat_below_outside_weights_is_refused_by_name(
    cheat: Cheat, outside_release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    assert _refusal(cheat, outside_release, tmp_path / "release", key) == cheat.refusal


def test_unchanged_release_signed_by_the_forger_has_the_signature_of_the_signer(
    release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    """Else the cheats would be refused for the forger's mistakes."""
    ours = tmp_path / "ours" / release.name
    shutil.copytree(release, ours)
    sign_again(ours, key)
    genuine = tmp_path / "genuine" / release.name
    shutil.copytree(release, genuine)
    (genuine / "model.sig").unlink()
    sign_release(genuine, key)
    assert (ours / "model.sig").read_bytes() == (genuine / "model.sig").read_bytes()


def test_consistent_lie_of_an_insider_is_not_found(
    release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    """Consistency is not truth: a record changed with all that names it still verifies."""
    kinder = Cheat("", cheats_on_chain.TELL_MORE_ROWS, "", signs=True, settles=True)
    forged = forge(release, tmp_path / "release", kinder.change, key, settled=True)
    assert audit_release(forged, Question(key=key.public)).not_checked == []
