"""Public keys that sign releases: reading, naming, and checking one signature with them."""

import hashlib
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from dinov3.release.refusals import CannotCheck, Refused

KINDS = "elliptic curves P-256, P-384 and P-521"

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
ORDERS = {  # of each curve's group (FIPS 186-5); s and order - s verify equally
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": int(
        "ffffffffffffffffffffffffffffffffffffffffffffffff"
        "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
        16,
    ),
    "secp521r1": int(
        "01fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa"
        "51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409",
        16,
    ),
}


def load_public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Reads a public key of one of the three curves that sign releases.

    Raises:
        CannotCheck: It is no public key in PEM.
        Refused: It is of another kind: nothing it signed is a signature of ours.
    """
    if b"PRIVATE KEY-----" in pem:
        msg = "key: a private key, which belongs to its owner alone. Give the public one, NAME.pub."
        raise CannotCheck(msg)
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        msg = "key: not a public key in PEM. Give the publisher's NAME.pub."
        raise CannotCheck(msg) from error
    if not is_usable(key):
        raise Refused("signature-invalid", "key", f"{kind_of(key)} signs no releases, {KINDS} do")
    return key  # type: ignore[return-value]  # is_usable has seen to it


def is_usable(key: Any) -> bool:
    """Whether a public key is of a kind that signs releases."""
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES


def kind_of(key: Any) -> str:
    """What to call a key in a sentence: its curve, or its algorithm."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    return curve or type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey")


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """The key in PEM, as it is given away."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(pem: bytes) -> str:
    """`sha256:` and the sha256 of the key itself (DER), whatever text surrounds it.

    Raises:
        CannotCheck: It is no public key in PEM.
        Refused: It is a key of a kind that signs no releases.
    """
    return fingerprint_of(load_public_key(pem))


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """The fingerprint of a loaded key."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256:" + hashlib.sha256(der).hexdigest()


def key_hint(key: ec.EllipticCurvePublicKey) -> str:
    """What a bundle calls its key: sha256 of the PEM, in hexadecimal."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def algorithm_of(key: ec.EllipticCurvePublicKey) -> hashes.HashAlgorithm:
    """The hash that goes with the key's curve."""
    return _HASHES[key.curve.name]


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed (pre-authentication encoding of DSSE 1)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def lower_form(key: ec.EllipticCurvePublicKey, signature: bytes) -> bytes:
    """Of the two ECDSA values that verify equally, the one with the lower s.

    Raises:
        ValueError: It is no DER of two integers.
    """
    r, s = utils.decode_dss_signature(signature)
    return utils.encode_dss_signature(r, min(s, ORDERS[key.curve.name] - s))


def check_bytes(
    key: ec.EllipticCurvePublicKey, payload_type: str, payload: bytes, signature: bytes, where: str
) -> None:
    """Checks one signature over one payload.

    Args:
        key: Whose signature it should be.
        payload_type: Of the payload; it is signed too.
        payload: The bytes.
        signature: ECDSA in DER.
        where: What to call it in a refusal.

    Raises:
        Refused: It is not of this key over these bytes, or not in its one form.
    """
    try:
        key.verify(signature, pae(payload_type, payload), ec.ECDSA(algorithm_of(key)))
        is_lower = lower_form(key, signature) == signature
    except (InvalidSignature, ValueError, OverflowError) as error:
        raise Refused("signature-invalid", where, "not of this key over these bytes") from error
    if not is_lower:
        why = "the higher of two equal values, which anyone can make of a genuine one"
        raise Refused("signature-invalid", where, why)
