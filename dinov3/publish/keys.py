"""Keys that sign releases: make one, list them, show a fingerprint, revoke a key.

    dinov3 keys new NAME [--no-passphrase] [--folder FOLDER] [--log data/release_log]
    dinov3 keys list [--format text|json] [--log data/release_log]
    dinov3 keys show NAME|FILE
    dinov3 keys revoke NAME|FILE|FINGERPRINT --reason "…" [--log data/release_log]

Private keys live outside every git checkout, readable by their owner alone. The fingerprint is
there to be compared by print or by voice before a key is trusted.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError, KeyUnusable
from dinov3.publish.private_key import (
    FOLDER_VARIABLE,
    MAX_BYTES,
    NAME,
    check_name,
    has_passphrase,
    keys_folder,
    new_key,
    new_passphrase,
    open_key_file,
    refuse_checkout,
)
from dinov3.publish.signed_log import locked, replace_whole
from dinov3.release.public_key import fingerprint
from dinov3.release.receipts import KEYS_NAME
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import printable, to_json
from dinov3.release.revoked import REVOKED_NAME, Revocation, read_revoked, revoked_bytes

LOG = Path("data/release_log")
LIST_SCHEMA = "dinov3.keys/1"

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


def public_key_of(name_or_path: str, *, folder: Path, log: Path) -> bytes:
    """The public key in PEM of a name (in the folder of keys, or in the log's) or a file.

    Raises:
        DinoError: There is none.
    """
    given = Path(name_or_path)
    if NAME.fullmatch(name_or_path):
        tried = [folder / f"{name_or_path}.pub", log / KEYS_NAME / f"{name_or_path}.pub"]
    else:
        tried = [given.with_suffix(".pub") if given.suffix == ".pem" else given]
    for path in tried:
        if path.is_file():
            with open_key_file(path) as stream:
                return stream.read(MAX_BYTES)
    msg = f"{name_or_path}: no public key in {tried[0]}. Name a key or a .pub file."
    raise KeyUnusable(msg)


def revoke(printed: str, reason: str, log: Path) -> bool:
    """Adds a key to the log's `revoked.json`; False when it stands there already.

    Args:
        printed: The key's fingerprint.
        reason: One line that says why.
        log: The folder of the release log.

    Raises:
        DinoError: The list is unreadable, or the reason is not one line.
    """
    path = log / REVOKED_NAME
    try:
        log.mkdir(parents=True, exist_ok=True)
        with locked(log):
            known = read_revoked(path) if path.exists() else {}
            if printed in known:
                return False
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            revocations = [*known.values(), Revocation(printed, reason, today)]
            replace_whole(path, revoked_bytes(revocations))
    except CannotCheck as error:
        msg = f"{error}. Restore it from git."
        raise KeyUnusable(msg) from error
    except ValueError as error:
        msg = f"--reason: {error}. Say why in one line."
        raise KeyUnusable(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}. Name another folder with --log."
        raise KeyUnusable(msg) from error
    return True


def list_keys(folder: Path, log: Path) -> list[dict[str, Any]]:
    """The private keys of a folder by name, as JSON values; none of them is opened.

    Each has its `fingerprint`, whether it has a `passphrase`, how the log says it is `revoked`, and
    what is its `problem`; null is what cannot be said, or nothing.

    Args:
        folder: The folder of keys; none has no keys.
        log: The folder of the release log; without a list there nothing is revoked.

    Raises:
        DinoError: The folder cannot be read.
        CannotCheck: The list of revoked keys is unreadable, which is no empty one.
    """
    path = log / REVOKED_NAME
    revoked = read_revoked(path) if path.exists() else {}
    try:
        names = sorted(one.stem for one in folder.iterdir() if one.suffix == ".pem")
    except FileNotFoundError:
        return []
    except OSError as error:
        msg = f"{folder}: cannot be read: {error.strerror}. Name another with --folder."
        raise KeyUnusable(msg) from error
    return [_entry(name, folder, log, revoked) for name in names if NAME.fullmatch(name)]


def _entry(name: str, folder: Path, log: Path, revoked: Mapping[str, Revocation]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "fingerprint": None,
        "passphrase": None,
        "revoked": None,
        "problem": None,
    }
    try:
        entry["passphrase"] = has_passphrase(folder / f"{name}.pem")
        # the one beside it alone: a log may hold another key of that name
        own = public_key_of(str(folder / f"{name}.pub"), folder=folder, log=log)
        printed = fingerprint(own)
    except (DinoError, CannotCheck, Refused) as error:
        return entry | {"problem": str(error)}
    found = revoked.get(printed)
    return entry | {"fingerprint": printed, "revoked": None if found is None else asdict(found)}


def in_groups(printed: str) -> str:
    """A fingerprint as people compare it: two rows of eight groups of four."""
    digits = printed.removeprefix("sha256:")
    groups = [digits[at : at + 4] for at in range(0, len(digits), 4)]
    return "\n".join("  " + " ".join(groups[at : at + 8]) for at in range(0, len(groups), 8))


def main(argv: Sequence[str]) -> int:
    """The verb `keys`; returns the exit code."""
    try:
        options = _parser().parse_args(list(argv))
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 2
    options.folder = options.folder or keys_folder()
    try:
        verbs = {"new": _new, "list": _list, "show": _show, "revoke": _revoke}
        verbs[options.verb](options)
    except DinoError as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return error.exit_code
    except (CannotCheck, Refused) as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return 2
    except OSError as error:
        where = error.filename or "output"
        sys.stderr.write(f"dinov3: {where}: {error.strerror}. Name another key or folder.\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov3 keys", description="Keys that sign releases.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("new", help="Make a key outside the checkout.")
    make.add_argument("name", metavar="NAME", help="Of the key: a-z, 0-9, - and _.")
    make.add_argument("--no-passphrase", action="store_true", help="Leave it open on the disk.")
    every = verbs.add_parser("list", help="Print the private keys that are here.")
    every.add_argument("--format", choices=("text", "json"), default="text", help="Of the output.")
    show = verbs.add_parser("show", help="Print a key's fingerprint, to be compared.")
    show.add_argument("key", metavar="NAME|FILE", help="Its name here, or a public key.")
    end = verbs.add_parser("revoke", help="Add a key to the list that is no longer trusted.")
    end.add_argument("key", metavar="NAME|FILE|FINGERPRINT", help="Which key.")
    end.add_argument("--reason", required=True, help="One line.")
    for verb in (make, every, show, end):
        verb.add_argument("--folder", type=Path, help=f"Of the keys; default ${FOLDER_VARIABLE}.")
    make.add_argument("--log", type=Path, help="Also put the public key into this release log.")
    for verb in (every, show, end):
        verb.add_argument("--log", type=Path, default=LOG, help="Folder of the release log.")
    return parser


def _new(options: argparse.Namespace) -> None:
    check_name(options.name)
    refuse_checkout(options.folder)
    published = options.log / KEYS_NAME if options.log else None
    passphrase = None if options.no_passphrase else new_passphrase()
    public = new_key(options.name, options.folder, passphrase, published)
    say = sys.stdout.write
    say(f"private  {public.with_suffix('.pem')}  (keep it; there is no copy)\n")
    say(f"public   {published / public.name if published else public}  (give it away)\n")
    _print_fingerprint(public.read_bytes())


def _list(options: argparse.Namespace) -> None:
    keys = list_keys(options.folder, options.log)
    log = options.log if options.log.is_dir() else None  # else nobody knows what is revoked
    if options.format == "json":
        said = {"schema": LIST_SCHEMA, "log": None if log is None else str(log), "keys": keys}
        sys.stdout.write(f"{to_json(said)}\n")
    elif keys:
        width = max(len(key["name"]) for key in keys)
        sys.stdout.writelines(f"{line}\n" for key in keys for line in _described(key, width, log))
    else:
        sys.stdout.write(f"{options.folder}: no key. Make one: dinov3 keys new NAME\n")


def _described(key: Mapping[str, Any], width: int, log: Path | None) -> Iterator[str]:
    name, gap, revoked = key["name"].ljust(width), " " * width, key["revoked"]
    if key["problem"] is not None:
        yield f"{name}  cannot be used here: {printable(key['problem'])}"
        return
    lock = "passphrase" if key["passphrase"] else "no passphrase"
    yield f"{name}  {lock:13}  {key['fingerprint']}"
    if revoked is not None:
        yield f"{gap}  REVOKED {revoked['date']}: {printable(revoked['reason'])}"
    else:
        yield f"{gap}  " + (f"not revoked in {log}" if log else "no log here that could revoke it")


def _show(options: argparse.Namespace) -> None:
    _print_fingerprint(public_key_of(options.key, folder=options.folder, log=options.log))


def _revoke(options: argparse.Namespace) -> None:
    printed = options.key
    if not _FINGERPRINT.fullmatch(printed):
        printed = fingerprint(public_key_of(options.key, folder=options.folder, log=options.log))
    added = revoke(printed, options.reason, options.log)
    how = "revoked in" if added else "already revoked in"
    sys.stdout.write(f"{printed} {how} {options.log / REVOKED_NAME}; commit and push it\n")


def _print_fingerprint(pem: bytes) -> None:
    printed = fingerprint(pem)
    sys.stdout.write(f"{printed}\n{in_groups(printed)}\n")
