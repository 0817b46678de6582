"""Verify a release, offline: `dinov3 verify DIR --key PUBLISHER.pub --expect MODEL@VERSION`.

    0  signed by that key, and everything holds
    1  refused, with one name of a fixed list
    2  not decided: no key was given, or something could not be read

Standard library and `cryptography` only. Nothing in the release is run or imported.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3.release.audit import Audit, Question
    from dinov3.release.verification import OpenStore

UNDECIDED = 2


def main(arguments: list[str] | None = None, *, open_store: "OpenStore | None" = None) -> int:
    """Entry of `dinov3 verify`.

    Args:
        arguments: Of the command line.
        open_store: Opens what `--store` names; without it there is no store to ask.

    Returns:
        0 verified, 1 refused, 2 not decided.
    """
    options = _parser().parse_args(arguments)
    try:
        # only here: where the library is missing, that too must end with 2
        from dinov3.release.verification import answer

        return _say(*answer(options, open_store))
    except Exception as error:  # noqa: BLE001 - a crash of ours must never look like a verdict
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"UNDECIDED: the verifier itself failed, {type(error).__name__}: {error} "
            f"({Path(last.filename).name}:{last.lineno})"
        )
        print(text.encode("unicode_escape", "surrogatepass").decode("ascii"), file=sys.stderr)
        return UNDECIDED


def _say(text: str, code: int) -> int:
    """Prints the answer; half an answer is none."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else whoever read the answer has left
            print(f"UNDECIDED: the answer cannot be written: {error.strerror}", file=sys.stderr)
        return UNDECIDED
    return code


def verify_release(folder: Path, question: "Question | None" = None) -> "Audit":
    """Holds a release directory against itself and against what is asked.

    Args:
        folder: The release.
        question: The key, the name, and what else must hold.

    Returns:
        What holds; `not_checked` names what was left open, such as the signer without a key.

    Raises:
        Refused: With one name of the fixed list.
        CannotCheck: Something cannot be read, or is of a newer schema.
    """
    from dinov3.release.audit import Question, audit_release

    return audit_release(folder, question or Question())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov3 verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", type=Path, help="a release directory, or one file of weights")
    parser.add_argument("--key", type=Path, help="the publisher's public key, got from elsewhere")
    parser.add_argument("--expect", metavar="MODEL@VERSION", help="what it must be")
    parser.add_argument("--revoked", type=Path, metavar="FILE", help="list of revoked keys")
    parser.add_argument(
        "--artifacts", type=Path, metavar="ROOT", help="folder of artifacts, hashed again"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE", help="images.bin, where the release holds its digest"
    )
    parser.add_argument("--store", help="asked whether it was withdrawn, and for lone files")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser
