"""The list of revoked keys: read whole or not at all."""

import pytest

from dinov3.release.record import canonical_json
from dinov3.release.refusals import CannotCheck
from dinov3.release.revoked import SCHEMA, Revocation, read_revoked, revoked_bytes

ONE = Revocation("sha256:" + "a" * 64, "lost", "2026-11-21")
TWO = Revocation("sha256:" + "b" * 64, "stolen, see the note", "2026-11-22")


def test_list_survives_writing_and_reading(tmp_path):
    path = tmp_path / "revoked.json"
    path.write_bytes(revoked_bytes([TWO, ONE]))
    assert read_revoked(path) == {ONE.fingerprint: ONE, TWO.fingerprint: TWO}
    assert revoked_bytes([ONE, TWO]) == path.read_bytes()


ENTRY = {"fingerprint": ONE.fingerprint, "reason": "lost", "date": "2026-11-21"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"schema":"dinov3.revoked/1"}',
        canonical_json({"schema": "dinov3.revoked/2", "revoked": []}),
        canonical_json({"schema": SCHEMA, "revoked": {}}),
        canonical_json({"schema": SCHEMA, "revoked": [ENTRY, ENTRY]}),
        canonical_json({"schema": SCHEMA, "revoked": [{**ENTRY, "fingerprint": "a" * 64}]}),
        canonical_json({"schema": SCHEMA, "revoked": [{**ENTRY, "reason": "two\nlines"}]}),
        canonical_json({"schema": SCHEMA, "revoked": [{**ENTRY, "date": None}]}),
        canonical_json({"schema": SCHEMA, "revoked": [{**ENTRY, "more": 1}]}),
        canonical_json({"schema": SCHEMA, "revoked": [1]}),
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_list_of_another_form_never_counts_as_empty(content, tmp_path):
    path = tmp_path / "revoked.json"
    path.write_bytes(content)
    with pytest.raises(CannotCheck, match=r"revoked\.json: "):
        read_revoked(path)


def test_missing_list_never_counts_as_empty(tmp_path):
    with pytest.raises(CannotCheck, match="cannot be read: No such file"):
        read_revoked(tmp_path / "revoked.json")


def test_field_of_another_form_is_not_written():
    with pytest.raises(ValueError, match="date: not of its form, got 'today'"):
        revoked_bytes([Revocation(ONE.fingerprint, "lost", "today")])
