"""Envelopes of receipts and withdrawals: of one key, one kind, one form."""

import base64
import copy
import json
import random

import pytest

from dinov3.publish.private_key import load_key, new_key
from dinov3.publish.signed_log import sign_envelope
from dinov3.release.envelope import MAX_BYTES, open_among, open_envelope, read_unchecked
from dinov3.release.record import canonical_json
from dinov3.release.refusals import REFUSALS, Refused

PUBLISH = {
    "kind": "publish",
    "model": "vits",
    "version": "0.1.0",
    "release": "a" * 64,
    "audited": "c1",
    "merged": "c2",
}
WITHDRAW = {
    "kind": "withdraw",
    "model": "vits",
    "version": "0.1.0",
    "release": "a" * 64,
    "reason": "a picture of a person was in it",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("demo", "other"):
        new_key(name, folder, None)
    return {name: load_key(name, folder) for name in ("demo", "other")}


@pytest.fixture(scope="module")
def signed(keys):
    return sign_envelope(PUBLISH, keys["demo"])


def test_payload_comes_back_with_its_signer(keys, signed):
    payload = open_envelope(signed, keys["demo"].public, "publish")
    signer = keys["demo"].fingerprint
    assert payload == {**PUBLISH, "reason": None, "previous": None, "signer": signer}


def test_withdrawal_says_why(keys):
    data = sign_envelope(WITHDRAW, keys["demo"])
    assert open_envelope(data, keys["demo"].public, "withdraw")["reason"] == WITHDRAW["reason"]


def test_envelope_of_one_kind_is_none_of_the_other(keys, signed):
    with pytest.raises(Refused, match="not of kind withdraw") as caught:
        open_envelope(signed, keys["demo"].public, "withdraw")
    assert caught.value.name == "signature-type"


def test_another_key_is_refused_and_found_among_several(keys, signed):
    with pytest.raises(Refused, match="no key that was given") as caught:
        open_envelope(signed, keys["other"].public)
    assert caught.value.name == "signature-invalid"
    both = [keys["other"].public, keys["demo"].public]
    assert open_among(signed, both)["signer"] == keys["demo"].fingerprint
    with pytest.raises(Refused, match="no key that was given"):
        open_among(signed, [])


def test_content_is_readable_without_a_key(keys, signed):
    assert read_unchecked(signed) == open_envelope(signed, keys["demo"].public)


def in_payload(change):
    def apply(envelope):
        payload = json.loads(base64.b64decode(envelope["payload"]))
        change(payload)
        envelope["payload"] = base64.b64encode(canonical_json(payload)).decode()

    return apply


FORGED = {
    "other content": (in_payload(lambda p: p.update(release="b" * 64)), "signature-invalid"),
    "other kind": (in_payload(lambda p: p.update(kind="withdraw", reason="x")), "signature-type"),
    "unknown kind": (in_payload(lambda p: p.update(kind="x")), "json-malformed"),
    "no version": (in_payload(lambda p: p.pop("version")), "json-malformed"),
    "more fields": (in_payload(lambda p: p.update(more=1)), "json-malformed"),
    "signer of another name": (
        in_payload(lambda p: p.update(signer="sha256:" + "0" * 64)),
        "signature-invalid",
    ),
    "a list for a field": (in_payload(lambda p: p.update(kind=[])), "json-malformed"),
    "no signature": (lambda e: e.update(signatures=[]), "signature-invalid"),
    "two signatures": (lambda e: e.update(signatures=e["signatures"] * 2), "signature-invalid"),
    "another key id": (lambda e: e["signatures"][0].update(keyid="x"), "signature-invalid"),
    "no key id": (lambda e: e["signatures"][0].update(keyid=None), "signature-invalid"),
    "type of a release": (
        lambda e: e.update(payloadType="application/vnd.in-toto+json"),
        "signature-type",
    ),
    "type of no text": (lambda e: e.update(payloadType=[]), "signature-type"),
    "payload of no JSON": (lambda e: e.update(payload="AAAA"), "json-malformed"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_envelope_is_refused_by_name(case, keys, signed):
    change, name = FORGED[case]
    envelope = copy.deepcopy(json.loads(signed))
    change(envelope)
    with pytest.raises(Refused, match=r"^envelope: ") as caught:
        open_envelope(canonical_json(envelope), keys["demo"].public)
    assert caught.value.name == name


@pytest.mark.parametrize("data", [b"", b"{}", b"[]\n", b"null\n", b"\xff", b"[" * 100_000])
def test_what_is_no_envelope_is_refused(data, keys):
    with pytest.raises(Refused, match=r"^envelope: "):
        open_envelope(data, keys["demo"].public)


def test_gigantic_envelope_is_refused_unparsed(keys):
    with pytest.raises(Refused, match="longer than any envelope"):
        open_envelope(b" " * (MAX_BYTES + 1), keys["demo"].public)


def test_any_flipped_bit_is_refused_by_name(keys, signed):
    chance = random.Random(0)
    for place in range(len(signed)):
        changed = bytearray(signed)
        changed[place] ^= 1 << chance.randrange(8)
        with pytest.raises(Refused, match=r"^envelope: ") as caught:
            open_envelope(bytes(changed), keys["demo"].public)
        assert caught.value.name in REFUSALS
