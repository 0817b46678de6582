"""Print the chain of records from an artifact to the roots, re-hashing what is there.

    dinov3 lineage data/pretrained_checkpoint
    dinov3 lineage 3b5d… --root data --format html > chain.html
    dinov3 lineage GPL-2.0-or-later --reverse --store directory:.dinov3/store

TARGET is a folder, a file, a picture, or a digest of one, of tensors, of a record or a release;
with --reverse also a licence or NAME==VERSION. Standard library only: an auditor needs neither
torch nor an orchestrator.
"""

import argparse
import os
import sys
from pathlib import Path

from dinov3.release.index import add_store, read_index
from dinov3.release.index import collect as collect
from dinov3.release.lineage_forms import FORMS
from dinov3.release.render import plain
from dinov3.release.reverse import find_users
from dinov3.release.trace import Findings, audit


def main(arguments: list[str] | None = None) -> int:
    """Entry of `dinov3 lineage`.

    Returns:
        0 when everything holds, 1 when something differs, 2 when it could not be checked.
    """
    options = _parser().parse_args(arguments)
    findings = trace(options.target, options.root, options.store, reverse=options.reverse)
    text = FORMS[options.format](findings)
    try:
        if text:
            print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; what is wrong is still said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk: half a chain is no answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        findings.unchecked.append(f"the answer cannot be written: {error.strerror}")
    for fault in dict.fromkeys([*findings.wrong, *findings.unchecked]):
        print(f"lineage: {plain(fault)}", file=sys.stderr)
    return findings.exit_code


def trace(target: str, root: Path, store: str | None = None, *, reverse: bool = False) -> Findings:
    """What a target is made of, or in reverse what used it.

    Args:
        target: A path, a digest; in reverse also a licence or NAME==VERSION.
        root: Folder that holds the folders of all stages.
        store: Of releases, such as `directory:PATH`.
        reverse: Whether to look for users instead of sources.
    """
    index = read_index(root)
    if store is not None:
        add_store(index, store)
    return (find_users if reverse else audit)(target, root, index)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov3 lineage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", help="a path or a digest; with --reverse also a licence, a pin")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        help="folder that holds the folders of all stages",
    )
    parser.add_argument("--store", help="also look in a store: directory:PATH or lakefs://REPO")
    parser.add_argument("--reverse", action="store_true", help="what used it, not what it is of")
    parser.add_argument("--format", choices=sorted(FORMS), default="text", help="of the output")
    return parser
