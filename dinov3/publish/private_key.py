"""A private key: made, kept and opened, outside every git checkout and closed to others."""

import getpass
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dinov3.errors import KeyUnusable
from dinov3.release.opening import open_regular
from dinov3.release.public_key import (
    KINDS,
    algorithm_of,
    fingerprint_of,
    is_usable,
    kind_of,
    lower_form,
    pae,
    public_pem,
)
from dinov3.release.refusals import Refused

FOLDER_VARIABLE = "DINOV3_KEYS"
PASSPHRASE_VARIABLE = "DINOV3_PASSPHRASE"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
MAX_BYTES = 64 << 10  # of a key in PEM


@dataclass(frozen=True)
class PrivateKey:
    """A loaded private key; what is secret of it is never shown or written.

    `path` and `passphrase` let a library that only takes files open it again.
    """

    path: Path
    public: bytes  # PEM
    fingerprint: str
    secret: ec.EllipticCurvePrivateKey = field(repr=False)
    passphrase: bytes | None = field(repr=False)

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """The one signature of this key over this payload (RFC 6979: without chance; lower s)."""
        public = self.secret.public_key()
        rule = ec.ECDSA(algorithm_of(public), deterministic_signing=True)
        return lower_form(public, self.secret.sign(pae(payload_type, payload), rule))


def keys_folder() -> Path:
    """Where private keys live: `$DINOV3_KEYS`, else below the user's configuration folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "dinov3" / "keys"


def new_key(
    name: str, folder: Path, passphrase: bytes | None, published: Path | None = None
) -> Path:
    """Makes a P-256 key: `NAME.pem`, readable by its owner alone, and `NAME.pub`.

    Args:
        name: What the key is called.
        folder: Outside every git checkout; made when absent, closed to others.
        passphrase: Encrypts the private key; None leaves it open to whoever reads the disk.
        published: A second folder for the public key; made when absent.

    Returns:
        The public key's file.

    Raises:
        DinoError: The name is taken or malformed, the folder lies in a checkout, or a file cannot
            be written: then none was.
    """
    check_name(name)
    refuse_checkout(folder)
    pem, public = _new_pair(passphrase)
    files = [(folder / f"{name}.pem", pem, 0o600), (folder / f"{name}.pub", public, 0o644)]
    if published is not None:
        files.append((published / f"{name}.pub", public, 0o644))
    try:
        for path, _, _ in files:
            _refuse_taken(path)
        _make_closed(folder)
        _refuse_open(folder)
        _write_all_new(files)
    except OSError as error:
        where = error.filename or folder
        msg = f"{where}: cannot be written: {error.strerror}. Name another with --folder or --log."
        raise KeyUnusable(msg) from error
    return folder / f"{name}.pub"


def _new_pair(passphrase: bytes | None) -> tuple[bytes, bytes]:
    """A private key and its public one, in PEM."""
    secret = ec.generate_private_key(ec.SECP256R1())
    lock = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    pem = secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    return pem, public_pem(secret.public_key())


def load_key(name_or_path: str | Path, folder: Path | None = None) -> PrivateKey:
    """Opens a private key, asking for its passphrase where it has one.

    Args:
        name_or_path: A name in the folder of keys, or the path of a `.pem` file.
        folder: The folder of keys; None means `keys_folder()`.

    Raises:
        DinoError: It is missing, readable by others, in a checkout, of another kind, or the
            passphrase is wrong or was not given.
    """
    path = _private_path(str(name_or_path), folder or keys_folder())
    pem = _read_private(path)
    passphrase = _passphrase_of(path, pem)
    try:
        secret = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "the passphrase does not open it" if passphrase else "not a private key in PEM"
        msg = f"{path}: {what}. Check ${PASSPHRASE_VARIABLE}, or name another key."
        raise KeyUnusable(msg) from error
    if not isinstance(secret, ec.EllipticCurvePrivateKey) or not is_usable(secret.public_key()):
        msg = f"{path}: {kind_of(secret)} signs no releases, {KINDS} do. Make one: dinov3 keys new."
        raise KeyUnusable(msg)
    public = secret.public_key()
    return PrivateKey(path, public_pem(public), fingerprint_of(public), secret, passphrase)


def has_passphrase(path: Path) -> bool:
    """Whether a private key is encrypted; nothing is asked, and it is not opened.

    Raises:
        DinoError: It is missing, readable by others or in a checkout, as for `load_key`.
    """
    return _is_encrypted(_read_private(path))


def check_name(name: str) -> None:
    """Refuses what is no name of a key.

    Raises:
        DinoError: It is none.
    """
    if not NAME.fullmatch(name):
        msg = f"key: not a name of a-z, 0-9, _ and -, got {name!r}. Choose another."
        raise KeyUnusable(msg)


def refuse_checkout(folder: Path) -> None:
    """Refuses a folder below a `.git`: there a private key is one commit away from everybody.

    Raises:
        DinoError: It is one.
    """
    resolved = Path(os.path.realpath(folder))  # unlike resolve() it bears a loop of links
    for above in (resolved, *resolved.parents):
        if os.path.lexists(above / ".git"):
            msg = (
                f"{folder}: lies in the git checkout {above}, where private keys get committed. "
                f"Choose another folder with --folder or ${FOLDER_VARIABLE}."
            )
            raise KeyUnusable(msg)


def _refuse_open(folder: Path) -> None:
    """Who may write the folder may put another key in the place of ours."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        msg = f"{folder}: others may write into it, got mode {mode:04o}. Close it with chmod 700."
        raise KeyUnusable(msg)


def _private_path(named: str, folder: Path) -> Path:
    if NAME.fullmatch(named):
        return folder / f"{named}.pem"
    return Path(named)


def open_key_file(path: Path) -> FileIO:
    """Opens the file of a key; a link is followed, a pipe is not waited for.

    Raises:
        DinoError: It is not there, no regular file, or cannot be read.
    """
    try:
        return open_regular(Path(os.path.realpath(path)), shown=str(path))
    except Refused as error:
        msg = f"{error}. Name the file of a key."
        raise KeyUnusable(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}. Make one: dinov3 keys new NAME."
        raise KeyUnusable(msg) from error


def _read_private(path: Path) -> bytes:
    for place in (path.parent, Path(os.path.realpath(path)).parent):
        refuse_checkout(place)
    with open_key_file(path) as stream:
        _refuse_shared(path, os.fstat(stream.fileno()).st_mode)
        return stream.read(MAX_BYTES)


def _refuse_shared(path: Path, mode: int) -> None:
    if mode & _OTHERS:
        msg = (
            f"{path}: others may read this private key, got mode {stat.S_IMODE(mode):04o}. "
            f"Close it with chmod 600, and make a new one if anybody could have copied it."
        )
        raise KeyUnusable(msg)


def _is_encrypted(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem


def _passphrase_of(path: Path, pem: bytes) -> bytes | None:
    if not _is_encrypted(pem):
        return None
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is None:
        _need_terminal(f"{path}: encrypted, and no passphrase was given")
        given = _ask(f"Passphrase of {path.stem}: ")
    if not given:
        msg = f"{path}: encrypted, got an empty passphrase. Set ${PASSPHRASE_VARIABLE}."
        raise KeyUnusable(msg)
    return os.fsencode(given)


def new_passphrase() -> bytes:
    """The passphrase for a new key: from the environment, else typed twice.

    Raises:
        DinoError: It is empty, the two differ, or there is nobody to ask.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is None:
        _need_terminal("passphrase: none was given")
        given = _ask("Passphrase: ")
        if _ask("The same again: ") != given:
            msg = "passphrase: the two differ. Run it again."
            raise KeyUnusable(msg)
    if not given:
        msg = "passphrase: empty. Choose one, or say --no-passphrase."
        raise KeyUnusable(msg)
    return os.fsencode(given)


def _ask(prompt: str) -> str:
    try:
        return getpass.getpass(prompt)
    except EOFError as error:
        msg = f"passphrase: the input ended, got none. Type it, or set ${PASSPHRASE_VARIABLE}."
        raise KeyUnusable(msg) from error


def _need_terminal(what: str) -> None:
    if not sys.stdin.isatty():
        msg = f"{what}, and no terminal to ask at. Set ${PASSPHRASE_VARIABLE}."
        raise KeyUnusable(msg)


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        msg = f"{path}: already there, and never overwritten. Choose another name."
        raise KeyUnusable(msg)


def _make_closed(folder: Path) -> None:
    """Makes a folder and those above it; who may write one of them may move the rest away."""
    for place in reversed((folder, *folder.parents)):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)


def _write_all_new(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Writes files that were not there before, or none of them."""
    made: list[Path] = []
    try:
        for path, data, mode in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
    except BaseException:
        for path in made:
            path.unlink()
        raise
