"""`python -m dinov3 source`: which source the pipeline reads, and what it holds, on one line.

python -m dinov3 source --set folder:/my/pictures
python -m dinov3 source --refresh        what the dvc wrapper runs before dvc looks around
"""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

from dinov3.data.sources.fingerprint import RELATIVE_PATH, refresh_from_params
from dinov3.errors import ConfigError, DataError, DinoError, StoreError
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json

_SOURCE_LINE = re.compile(r'(?m)^source: (?:"[^"]*"|\S+)')


def main(arguments: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3 source", description="Which source the pipeline reads."
    )
    parser.add_argument("--refresh", action="store_true", help=f"write {RELATIVE_PATH}")
    parser.add_argument(
        "--keep", action="store_true", help="with --refresh: without the source, as last seen"
    )
    parser.add_argument("--set", metavar="SPEC", help="write the source into params.yaml")
    parser.add_argument("--source", metavar="SPEC", help="in place of the one in params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="where it stands")
    options = parser.parse_args(arguments)
    try:
        if options.set is not None:
            set_source(options.params, options.set)
        elif options.refresh:
            sys.stdout.write(_refresh(options.params, options.source, keep=options.keep))
        else:
            sys.stdout.write(f"{current_source(options.params)}\n")
    except DinoError as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return error.exit_code
    return 0


def current_source(params: Path) -> str:
    """The source that the pipeline's parameter file names."""
    return str(yaml.safe_load(params.read_text(encoding="utf-8"))["source"])


def _refresh(params: Path, spec: str | None, *, keep: bool) -> str:
    """The fingerprint, brought up to date; `keep` takes the last one where the source is away."""
    last = params.parent / RELATIVE_PATH
    try:
        return canonical_json(refresh_from_params(params, spec)).decode()
    except (DataError, StoreError) as error:
        if not keep or not last.is_file():
            raise
        sys.stderr.write(f"dinov3: {error}\ndinov3: {last}: taken as it was last seen\n")
        return last.read_text("utf-8")


def set_source(params: Path, spec: str) -> None:
    """Names another source, after a look at it; comments and other parameters stay.

    Raises:
        ConfigError: The path cannot stand in a command line, or the file names no source.
        DataError: Nothing usable is there.
    """
    refresh_from_params(params, spec)
    text = params.read_text(encoding="utf-8")
    line = f"source: {json.dumps(spec, ensure_ascii=False)}"
    changed, count = _SOURCE_LINE.subn(lambda _: line, text, count=1)
    if count != 1:
        msg = f"{params}: has no line `source: …`, got {text[:60]!r}. Restore it from git."
        raise ConfigError(msg)
    atomic_write(params, changed.encode())
