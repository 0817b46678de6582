"""Where a release is written: over nothing that it is made of, and untold in its files."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dinov3.errors import ConfigError, ReleaseRefused
from dinov3.release.checks import Node, load
from dinov3.release.index import is_release
from dinov3.release.record import RUN_NAME, RecordError
from dinov3.stage import CHECKOUT

FOLDER = "release"  # of the release, in its stage's folder

_TEXT_ENDINGS = {".json", ".jsonl", ".md"}
# not the `/data` of `my/data/x` or `/database`; in JSON a line of text may begin after `\n`
_WHOLE_PATH = rb"(?:(?<![\w.-])|(?<=\\[nrt]))(%b)(?![\w.-])"


def refuse_occupied(
    output: Path, stage: str, *, artifacts: Path, log: Path, nodes: Iterable[Node]
) -> None:
    """Refuses a folder whose files would be replaced by those of the release, or mixed with them.

    Args:
        output: Folder of the stage.
        stage: Its key; what an earlier run of it left there may be replaced.
        artifacts: Folder of all artifacts, which may hold the output.
        log: Folder of the log of releases.
        nodes: Every record below `artifacts`, and those of weights and report.

    Raises:
        ConfigError: It is one.
    """
    place = output.resolve()
    taken = next(_taken(place, stage, artifacts, log, nodes), None) or _leftover(output, stage)
    if taken is not None:
        msg = f"output: {taken}, got {output}. Choose a folder of its own."
        raise ConfigError(msg)


def _taken(
    place: Path, stage: str, artifacts: Path, log: Path, nodes: Iterable[Node]
) -> Iterator[str]:
    if artifacts.resolve().is_relative_to(place):
        yield f"holds all artifacts ({artifacts})"
    if _overlap(place, log.resolve()):
        yield f"overlaps the log of releases ({log})"
    for node in nodes:
        folder = node.folder.resolve()
        is_own = folder == place and node.record.stage == stage
        if not is_own and _overlap(place, folder):
            yield f"overlaps the artifacts of {node.record.stage} ({node.folder})"


def _leftover(output: Path, stage: str) -> str | None:
    """What stands in the folder that no run of this stage left there."""
    try:
        node = load(output)
    except RecordError as error:
        return f"holds a record that cannot be read ({error})"
    if node is not None:
        return None if node.record.stage == stage else f"is that of {node.record.stage}"
    if is_release(output / FOLDER):  # a killed run may have left it without its record
        return None
    held = [name for name in (FOLDER, RUN_NAME) if os.path.lexists(output / name)]
    return f"holds {held[0]}, which no release left there" if held else None


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def refuse_traces(folder: Path, places: Iterable[Path]) -> None:
    """Refuses a release in which a file names where it was made.

    Args:
        folder: The release.
        places: Folders of this machine, whole; home and checkout need not be named.

    Raises:
        ReleaseRefused: A file does; the record that says so was made from an absolute path.
    """
    known = sorted({f"{place}" for place in (Path.home(), CHECKOUT, *places)} - {"/"})
    needle = re.compile(_WHOLE_PATH % b"|".join(re.escape(name.encode()) for name in known))
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXT_ENDINGS and path.is_file():
            found = needle.search(path.read_bytes())
            if found is not None:
                msg = (
                    f"{path.relative_to(folder)}: names a folder of this machine, got "
                    f"{found[1].decode()}. Make that stage again with relative paths."
                )
                raise ReleaseRefused(msg)
