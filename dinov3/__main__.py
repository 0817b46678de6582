"""Entry: `python -m dinov3 VERB …`; light verbs load neither torch nor the command line library."""

import sys


def main() -> int:
    """Sends the verb to its module; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["lineage"]:
        from dinov3.release.lineage import main as lineage

        return lineage(arguments[1:])
    if arguments[:1] == ["source"]:
        from dinov3.data.sources.verb import main as source

        return source(arguments[1:])
    from dinov3.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
