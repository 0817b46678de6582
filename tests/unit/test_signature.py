"""The signature of a release: genuine ones pass, in one form only; all others by name."""

import base64
import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256

from dinov3.errors import DinoError
from dinov3.publish.private_key import load_key, new_key
from dinov3.publish.sign import check_with_library, sign_release
from dinov3.release.public_key import KINDS, ORDERS
from dinov3.release.record import canonical_json
from dinov3.release.refusals import REFUSALS, CannotCheck, Refused
from dinov3.release.signature import PAYLOAD_TYPE, Signer, fingerprint, verify_signature

FILES = {
    "model.safetensors": b"weights",
    "records/vits-0123456789ab.json": b"{}\n",
    "records.txt": b"sorts before records/ as text, after it as a path",
    ".gitattributes": b"* -text\n",
    "SHA256SUMS": b"",
    "licences/é.txt": b"text",
}


def hashes_of(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two keys of ours, and one of each other curve."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("demo", "other"):
        new_key(name, folder, None)
    for name, curve in (("p384", ec.SECP384R1()), ("p521", ec.SECP521R1())):
        write_private(folder / f"{name}.pem", ec.generate_private_key(curve))
    return {name: load_key(name, folder) for name in ("demo", "other", "p384", "p521")}


def write_private(path, secret):
    path.touch(mode=0o600)
    path.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.fixture(scope="module")
def signed(tmp_path_factory, keys):
    folder = write(tmp_path_factory.mktemp("signed") / "release", FILES)
    sign_release(folder, keys["demo"])
    return folder


@pytest.fixture
def release(signed, tmp_path):
    """A signed release, to be tampered with."""
    return shutil.copytree(signed, tmp_path / "release")


def read(folder):
    return json.loads((folder / "model.sig").read_bytes())


def put(folder, bundle):
    (folder / "model.sig").write_bytes(canonical_json(bundle))


def statement_of(folder):
    return json.loads(base64.b64decode(read(folder)["dsseEnvelope"]["payload"]))


def sign_statement(folder, key, statement, payload_type=PAYLOAD_TYPE):
    """Has the holder of the key sign something else in the same form."""
    payload = statement if isinstance(statement, bytes) else canonical_json(statement)
    bundle = read(folder)
    bundle["dsseEnvelope"] = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": "", "sig": text(key.sign(payload_type, payload))}],
    }
    put(folder, bundle)


def text(data):
    return base64.b64encode(data).decode()


def verify(folder, key):
    return verify_signature(folder, hashes_of(folder), key.public)


def refusal(folder, key):
    with pytest.raises(Refused, match=r"^(model\.sig|key): ") as caught:
        verify(folder, key)
    return caught.value.name


def test_genuine_release_names_its_signer(release, keys):
    signer = verify(release, keys["demo"])
    assert signer.fingerprint == fingerprint(keys["demo"].public) == keys["demo"].fingerprint
    assert signer.hint == hashlib.sha256(keys["demo"].public).hexdigest()


def test_without_a_key_everything_but_the_signer_is_checked(release, keys):
    assert verify_signature(release, hashes_of(release), None).fingerprint is None
    (release / "extra").write_bytes(b"")
    with pytest.raises(Refused, match="leaves out 'extra'"):
        verify_signature(release, hashes_of(release), None)


@pytest.mark.parametrize("curve", ["p384", "p521"])
def test_larger_curves_sign_with_their_own_hash(curve, keys, tmp_path):
    folder = write(tmp_path / "release", FILES)
    sign_release(folder, keys[curve])
    assert verify(folder, keys[curve]).fingerprint == keys[curve].fingerprint


def test_another_process_signing_the_same_files_gives_the_same_bytes(release, keys):
    before = (release / "model.sig").read_bytes()
    (release / "model.sig").unlink()
    code = (
        "from pathlib import Path; from dinov3.publish.private_key import load_key\n"
        "from dinov3.publish.sign import sign_release\n"
        f"sign_release(Path({str(release)!r}), load_key({str(keys['demo'].path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (release / "model.sig").read_bytes() == before


def test_unsigned_release_is_refused_only_where_a_key_was_given(release, keys):
    (release / "model.sig").unlink()
    assert refusal(release, keys["demo"]) == "signature-missing"
    assert verify_signature(release, hashes_of(release), None) == Signer(None, None)


def test_wrong_key_is_refused(release, keys):
    assert refusal(release, keys["other"]) == "signature-invalid"


def test_wrong_key_with_the_right_hint_is_refused(release, keys):
    bundle = read(release)
    hint = hashlib.sha256(keys["other"].public).hexdigest()
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint
    put(release, bundle)
    assert refusal(release, keys["other"]) == "signature-invalid"


def test_signature_of_another_release_is_refused(release, keys, tmp_path):
    elsewhere = write(tmp_path / "elsewhere", {**FILES, "model.safetensors": b"other weights"})
    sign_release(elsewhere, keys["demo"])
    shutil.copy(elsewhere / "model.sig", release / "model.sig")
    assert refusal(release, keys["demo"]) == "signature-invalid"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda files: files.update({"model.safetensors": "0" * 64}), "signature-invalid"),
        (lambda files: files.pop("model.safetensors"), "signature-invalid"),
        (lambda files: files.update({".gitignore": "0" * 64}), "signature-scope"),
    ],
)
def test_files_that_are_not_those_signed_are_refused(release, keys, change, name):
    files = hashes_of(release)
    change(files)
    with pytest.raises(Refused, match=r"model\.sig") as caught:
        verify_signature(release, files, keys["demo"].public)
    assert caught.value.name == name


def predicate(change):
    return lambda statement: change(statement["predicate"])


def resources(change):
    return lambda statement: change(statement["predicate"]["resources"])


def serialization_of(change):
    return lambda statement: change(statement["predicate"]["serialization"])


GENUINE_BUT_NOT_OURS = {
    "another statement": (lambda s: s.update(_type="https://in-toto.io/x"), "signature-type"),
    "another predicate": (lambda s: s.update(predicateType="https://x"), "signature-type"),
    "old predicate": (
        lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
        "signature-type",
    ),
    "unknown field": (lambda s: s.update(more=1), "signature-type"),
    "unknown field of the predicate": (predicate(lambda p: p.update(more=1)), "signature-type"),
    "no subject": (lambda s: s.update(subject=[]), "signature-scope"),
    "two subjects": (lambda s: s.update(subject=s["subject"] * 2), "signature-scope"),
    "subject of another digest": (
        lambda s: s["subject"][0].update(digest={"sha256": "0" * 64}),
        "signature-invalid",
    ),
    "subject without a digest": (lambda s: s["subject"][0].pop("digest"), "signature-type"),
    "no file": (predicate(lambda p: p.update(resources=[])), "signature-scope"),
    "files out of order": (resources(lambda files: files.reverse()), "signature-invalid"),
    "a file twice": (resources(lambda files: files.append(files[0])), "signature-scope"),
    "another algorithm": (
        resources(lambda files: files[0].update(algorithm="blake2b")),
        "signature-type",
    ),
    "a digest in capitals": (
        resources(lambda files: files[0].update(digest=files[0]["digest"].upper())),
        "signature-type",
    ),
    "files ignored": (
        serialization_of(lambda s: s.update(ignore_paths=["model.safetensors"])),
        "signature-scope",
    ),
    "none ignored, but a list": (
        serialization_of(lambda s: s.update(ignore_paths=[])),
        "signature-scope",
    ),
    "links followed": (serialization_of(lambda s: s.update(allow_symlinks=True)), "signature-type"),
    "zero for false": (serialization_of(lambda s: s.update(allow_symlinks=0)), "signature-type"),
    "shards": (serialization_of(lambda s: s.update(method="shards")), "signature-type"),
}


@pytest.mark.parametrize("case", GENUINE_BUT_NOT_OURS)
def test_what_the_right_key_signed_in_another_form_is_refused(case, release, keys):
    change, name = GENUINE_BUT_NOT_OURS[case]
    statement = statement_of(release)
    change(statement)
    sign_statement(release, keys["demo"], statement)
    assert refusal(release, keys["demo"]) == name


def test_files_left_out_of_the_list_are_refused(release, keys):
    statement = statement_of(release)
    left = [one for one in statement["predicate"]["resources"] if "model" not in one["name"]]
    digests = b"".join(bytes.fromhex(one["digest"]) for one in left)
    statement["predicate"]["resources"] = left
    statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()
    sign_statement(release, keys["demo"], statement)
    assert refusal(release, keys["demo"]) == "signature-scope"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b'{"_type":1,"_type":1}\n', b"\xff", b"[" * 100_000, b'{"a":1e999}\n', b"{} \n"],
)
def test_what_the_right_key_signed_that_is_no_canonical_json_is_refused(payload, release, keys):
    sign_statement(release, keys["demo"], payload)
    assert refusal(release, keys["demo"]) == "json-malformed"


@pytest.mark.parametrize("statement", [[], None, 1, "text", {}])
def test_what_the_right_key_signed_that_is_no_statement_is_refused(statement, release, keys):
    sign_statement(release, keys["demo"], statement)
    assert refusal(release, keys["demo"]) == "signature-type"


def envelope(change):
    return lambda bundle: change(bundle["dsseEnvelope"])


def material(change):
    return lambda bundle: change(bundle["verificationMaterial"])


def signatures(change):
    return lambda bundle: change(bundle["dsseEnvelope"]["signatures"])


FORGED = {
    "another media type": (lambda b: b.update(mediaType="x"), "signature-type"),
    "another payload type": (envelope(lambda e: e.update(payloadType="text/x")), "signature-type"),
    "payload type of no text": (envelope(lambda e: e.update(payloadType=[])), "signature-type"),
    "no signature": (envelope(lambda e: e.update(signatures=[])), "signature-invalid"),
    "two signatures": (signatures(lambda s: s.append(s[0])), "signature-invalid"),
    "empty signature": (signatures(lambda s: s[0].update(sig="")), "signature-invalid"),
    "garbage for DER": (signatures(lambda s: s[0].update(sig="AAAA")), "signature-invalid"),
    "no base64": (signatures(lambda s: s[0].update(sig="é")), "signature-invalid"),
    "spaced base64": (
        signatures(lambda s: s[0].update(sig=s[0]["sig"] + "\n")),
        "signature-invalid",
    ),
    "number for base64": (signatures(lambda s: s[0].update(sig=1)), "signature-invalid"),
    "null payload": (envelope(lambda e: e.update(payload=None)), "signature-invalid"),
    "a key id": (signatures(lambda s: s[0].update(keyid="x")), "signature-invalid"),
    "no key id": (signatures(lambda s: s[0].pop("keyid")), "signature-invalid"),
    "unknown field": (lambda b: b.update(more=1), "signature-invalid"),
    "a log entry": (material(lambda m: m.update(tlogEntries=[{}])), "signature-invalid"),
    "a certificate": (material(lambda m: m.update(certificate={})), "signature-invalid"),
    "no key": (material(lambda m: m.pop("publicKey")), "signature-invalid"),
    "a hint of no key": (material(lambda m: m["publicKey"].update(hint="x")), "signature-invalid"),
    "no envelope": (lambda b: b.update(dsseEnvelope=None), "signature-invalid"),
    "message signature": (lambda b: b.update(messageSignature={}), "signature-invalid"),
}


@pytest.mark.parametrize("case", FORGED)
def test_bundle_of_another_form_is_refused(case, release, keys):
    change, name = FORGED[case]
    bundle = read(release)
    change(bundle)
    put(release, bundle)
    assert refusal(release, keys["demo"]) == name


@pytest.mark.parametrize(
    "data", [b"", b"null\n", b"[]\n", b"\x00\xff", b'{"a":1,"a":1}\n', b"[" * 100_000, b"1" * 5000]
)
def test_signature_that_is_no_bundle_is_refused(data, release, keys):
    (release / "model.sig").write_bytes(data)
    assert refusal(release, keys["demo"]) in {"json-malformed", "signature-invalid"}


def test_same_bundle_in_another_writing_is_refused(release, keys):
    (release / "model.sig").write_text(json.dumps(read(release), indent=2))
    assert refusal(release, keys["demo"]) == "json-malformed"


def test_the_other_value_that_verifies_equally_is_refused(release, keys):
    bundle = read(release)
    signature = bundle["dsseEnvelope"]["signatures"][0]
    r, s = decode_dss_signature(base64.b64decode(signature["sig"]))
    signature["sig"] = text(encode_dss_signature(r, ORDERS["secp256r1"] - s))
    put(release, bundle)
    check_with_library(release, release / "model.sig", keys["demo"].public)
    assert refusal(release, keys["demo"]) == "signature-invalid"


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_signature_that_is_no_file_is_refused(kind, release, keys, tmp_path):
    here = release / "model.sig"
    if kind == "link":
        here.rename(tmp_path / "elsewhere.sig")
        here.symlink_to(tmp_path / "elsewhere.sig")
    else:
        here.unlink()
        here.mkdir()
    assert refusal(release, keys["demo"]) == "file-special"


def test_gigantic_signature_is_refused_unread(release, keys):
    with (release / "model.sig").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(Refused, match="larger than any bundle"):
        verify_signature(release, {}, keys["demo"].public)


def public_pem(secret):
    return secret.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.mark.parametrize(
    "secret", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())]
)
def test_key_of_another_kind_is_refused_with_a_sentence(secret, release):
    with pytest.raises(Refused, match=KINDS) as caught:
        verify_signature(release, hashes_of(release), public_pem(secret))
    assert caught.value.name == "signature-invalid"


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (b"", "not a public key"),
        (b"\xff\x00", "not a public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (b"-----BEGIN PRIVATE KEY-----\n", "a private key, which belongs to its owner"),
    ],
)
def test_unreadable_key_is_no_verdict_on_the_release(key, why, release):
    with pytest.raises(CannotCheck, match=why):
        verify_signature(release, hashes_of(release), key)


def test_any_flipped_bit_of_the_signature_file_is_refused_by_name(release, keys):
    path, files = release / "model.sig", hashes_of(release)
    genuine, chance = path.read_bytes(), random.Random(0)
    for place in chance.sample(range(len(genuine)), 600):
        changed = bytearray(genuine)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(Refused, match=r"^model\.sig: ") as caught:
            verify_signature(release, files, keys["demo"].public)
        assert caught.value.name in REFUSALS


def test_any_change_of_a_value_in_the_bundle_is_refused_by_name(release, keys):
    genuine, files = read(release), hashes_of(release)
    places = list(leaves(genuine))
    for odd in (None, 1, -1.5, True, "", "é", [], {}, [[]], "0" * 64, 10**400):
        for place in places:
            bundle = copy.deepcopy(genuine)
            replace(bundle, place, odd)
            if bundle == genuine:
                continue
            put(release, bundle)
            with pytest.raises(Refused, match=r"^model\.sig: "):
                verify_signature(release, files, keys["demo"].public)


def leaves(value, place=()):
    yield place
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    for step, below in steps if isinstance(value, dict | list) else ():
        yield from leaves(below, (*place, step))


def replace(bundle, place, value):
    if place:
        for step in place[:-1]:
            bundle = bundle[step]
        bundle[place[-1]] = value
    else:
        bundle.clear()


def test_what_ours_accepts_the_library_accepts(release, keys):
    verify(release, keys["demo"])
    check_with_library(release, release / "model.sig", keys["demo"].public)


def test_the_librarys_own_command_accepts_a_release(release, keys, tmp_path):
    (tmp_path / "key.pub").write_bytes(keys["demo"].public)
    options = ["--signature", release / "model.sig", "--public_key", tmp_path / "key.pub"]
    command = [sys.executable, "-m", "model_signing", "verify", "key", *options]
    subprocess.run([*command, "--no-ignore-git-paths", release], check=True)


def test_moved_release_is_accepted_by_both(release, keys, tmp_path):
    moved = release.rename(tmp_path / "another name")
    verify(moved, keys["demo"])
    check_with_library(moved, moved / "model.sig", keys["demo"].public)


def library(folder, public, tmp_path):
    """The library's verifier as its command line sets it up: git's files do not count."""
    from model_signing import hashing, verifying

    pem = tmp_path / "key.pub"
    pem.write_bytes(public)
    how = hashing.Config().set_ignored_paths(paths=[folder / "model.sig"], ignore_git_paths=True)
    config = verifying.Config().use_elliptic_key_verifier(public_key=pem).set_hashing_config(how)
    config.verify(folder, folder / "model.sig")


def test_added_git_file_is_accepted_by_the_library_and_refused_by_ours(keys, tmp_path):
    files = {name: data for name, data in FILES.items() if not name.startswith(".git")}
    folder = write(tmp_path / "release", files)
    sign_release(folder, keys["demo"])
    write(folder, {".gitattributes": b"planted", ".github/run.yaml": b"planted"})
    library(folder, keys["demo"].public, tmp_path)
    assert refusal(folder, keys["demo"]) == "signature-scope"


def test_signed_ignore_list_over_the_weights_passes_the_library_and_not_ours(keys, tmp_path):
    from model_signing import hashing, signing, verifying

    files = {name: data for name, data in FILES.items() if not name.startswith(".git")}
    folder = write(tmp_path / "release", files)
    how = hashing.Config().set_ignored_paths(
        paths=["model.safetensors", "model.sig"], ignore_git_paths=False
    )
    config = signing.Config().use_elliptic_key_signer(private_key=keys["demo"].path)
    config.set_hashing_config(how).sign(folder, folder / "model.sig")
    sign_statement(folder, keys["demo"], statement_of(folder))  # in the form that ours takes
    (folder / "model.safetensors").write_bytes(b"other weights")
    pem = tmp_path / "key.pub"
    pem.write_bytes(keys["demo"].public)
    verifying.Config().use_elliptic_key_verifier(public_key=pem).verify(
        folder, folder / "model.sig"
    )
    assert refusal(folder, keys["demo"]) == "signature-scope"


def test_signature_by_the_librarys_first_encoding_is_refused(release, keys):
    from model_signing._signing.sign_sigstore_pb import pae_compat

    bundle = read(release)
    dsse = bundle["dsseEnvelope"]
    old = pae_compat(base64.b64decode(dsse["payload"]))
    signature = keys["demo"].secret.sign(old, ec.ECDSA(SHA256()))
    dsse["signatures"][0]["sig"] = text(signature)
    put(release, bundle)
    check_with_library(release, release / "model.sig", keys["demo"].public)
    assert refusal(release, keys["demo"]) == "signature-invalid"


def test_folder_with_a_link_is_not_signed(keys, tmp_path):
    folder = write(tmp_path / "release", FILES)
    (folder / "link").symlink_to(folder / "SHA256SUMS")
    with pytest.raises(DinoError, match=r"cannot be signed: .* symlink"):
        sign_release(folder, keys["demo"])
    assert not (folder / "model.sig").exists()


def test_signed_folder_is_not_signed_again(release, keys):
    with pytest.raises(DinoError, match=r"model\.sig: already there"):
        sign_release(release, keys["demo"])
