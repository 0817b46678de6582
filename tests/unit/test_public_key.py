"""Public keys: named by what they are, and never a crash on what they are not."""

import base64
import hashlib
import random

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from dinov3.release.public_key import (
    ORDERS,
    algorithm_of,
    check_bytes,
    fingerprint,
    load_public_key,
    lower_form,
    pae,
    public_pem,
)
from dinov3.release.refusals import CannotCheck, Refused


@pytest.fixture(scope="module")
def key():
    return ec.generate_private_key(ec.SECP256R1()).public_key()


def test_signed_bytes_are_those_of_the_dsse_specification():
    signed = pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_fingerprint_is_the_digest_of_what_the_pem_wraps(key):
    body = b"".join(public_pem(key).splitlines()[1:-1])
    printed = "sha256:" + hashlib.sha256(base64.b64decode(body)).hexdigest()
    assert fingerprint(public_pem(key)) == printed


def test_fingerprint_is_of_the_key_and_not_of_the_text_around_it(key):
    pem = public_pem(key)
    assert fingerprint(pem.replace(b"\n", b"\r\n")) == fingerprint(b"a note\n" + pem + b"\n\n")


def test_changed_key_is_another_one_or_none(key):
    pem, chance = public_pem(key), random.Random(0)
    for place in range(len(pem)):
        changed = bytearray(pem)
        changed[place] ^= 1 << chance.randrange(8)
        try:
            found = load_public_key(bytes(changed))
        except (CannotCheck, Refused):
            continue
        assert found.curve.name == "secp256r1"


def test_key_of_another_algorithm_is_named():
    secret = rsa.generate_private_key(65537, 2048)
    pem = secret.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with pytest.raises(Refused, match="RSA signs no releases"):
        load_public_key(pem)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_of_two_equal_values_only_the_lower_is_taken(curve):
    secret = ec.generate_private_key(curve)
    public = secret.public_key()
    raw = secret.sign(pae("kind", b"text"), ec.ECDSA(algorithm_of(public)))
    lower = lower_form(public, raw)
    check_bytes(public, "kind", b"text", lower, "it")
    r, s = decode_dss_signature(lower)
    other = encode_dss_signature(r, ORDERS[curve.name] - s)
    public.verify(other, pae("kind", b"text"), ec.ECDSA(algorithm_of(public)))
    with pytest.raises(Refused, match="the higher of two equal values"):
        check_bytes(public, "kind", b"text", other, "it")
