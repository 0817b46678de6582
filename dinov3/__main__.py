"""Entry: `python -m dinov3 VERB …`; light verbs load neither torch nor the command line library."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3.publish.store import Store


def main() -> int:
    """Sends the verb to its module; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["verify"]:
        from dinov3.release.verify import main as verify

        return verify(arguments[1:], open_store=_open_store)
    if arguments[:1] == ["lineage"]:
        from dinov3.release.lineage import main as lineage

        return lineage(arguments[1:])
    if arguments[:1] == ["keys"]:
        from dinov3.publish.keys import main as keys

        return keys(arguments[1:])
    if arguments[:1] == ["lake"]:
        from dinov3.cli_lake import main as lake

        return lake(arguments[1:])
    if arguments[:1] == ["adopt"]:
        from dinov3.adopt import main as adopt

        return adopt(arguments[1:])
    if arguments[:1] == ["source"]:
        from dinov3.data.sources.verb import main as source

        return source(arguments[1:])
    from dinov3.cli import run

    return run(arguments)


def _open_store(spec: str) -> "Store":
    """Stores are of the writing side: loaded where one is asked for."""
    from dinov3.publish.store import open_store

    return open_store(spec)


if __name__ == "__main__":
    sys.exit(main())
