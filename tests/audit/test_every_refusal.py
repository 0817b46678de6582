"""No name of the fixed list without an attack that earns it."""

from dinov3.release.refusals import REFUSALS
from tests.audit import cheats_on_chain, cheats_on_claims, cheats_on_files, cheats_on_training
from tests.audit.test_signer import STATEMENTS

ELSEWHERE = {  # not by a change of the files alone; tests that end in this name
    "artifact-changed": "tests/unit/test_verify.py",
    "receipts-broken": "tests/unit/test_receipts.py",
    "key-revoked": "tests/audit/test_signer.py",
    "wrong-release": "tests/audit/test_signer.py",
    "withdrawn": "tests/audit/test_signer.py",
}


def test_every_refusal_is_earned_by_an_attack() -> None:
    tables = (
        cheats_on_files.CHEATS,
        cheats_on_chain.CHEATS,
        cheats_on_chain.OUTSIDE_CHEATS,
        cheats_on_training.CHEATS,
        cheats_on_claims.CHEATS,
    )
    earned = {cheat.refusal for table in tables for cheat in table}
    earned |= {name for _, name in STATEMENTS.values()}
    assert earned | ELSEWHERE.keys() == set(REFUSALS)
