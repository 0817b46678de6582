"""Does the history of a lakeFS store hold together? Each change must follow the one before it."""

from dinov3.errors import LineageBroken
from dinov3.lake import Commit
from dinov3.publish.lakefs_index import INDEX, Line, agrees, sha256_of
from dinov3.publish.lakefs_main import MAIN, Main

_OURS = ("setup", "publish", "withdraw")


def audit_history(main: Main) -> list[str]:
    """What stands on `main` that no publication made, and indexes that do not follow each other."""
    found: list[str] = []
    before: Line | None = None
    head = main.head()  # what is published meanwhile is no part of this audit
    for commit in reversed(list(main.lake.log(main.repo, head))):
        if not commit.parents:
            continue  # the server's own, when the repository was made
        if commit.metadata.get("kind") not in _OURS:
            found.append(f"{MAIN}: commit {commit.id} is no publication's")
            continue
        try:
            line = main.line(commit.id)
        except LineageBroken as error:
            found.append(str(error))
            continue
        found.extend(_contradictions(commit, before, line))
        before = line
    if before is not None and main.line(head) != before:
        found.append(f"{MAIN}: {INDEX} is not the one of the last change: rolled back")
    return found


def _contradictions(commit: Commit, before: Line | None, line: Line) -> list[str]:
    where = f"{MAIN}: {INDEX} at {commit.id}"
    if commit.metadata["kind"] == "setup":
        again = before is not None and line != before
        return [f"{where}: set up again over another index"] if again else []
    found = []
    if not agrees(line, commit.metadata):
        found.append(f"{where}: says another change than its commit")
    previous = None if before is None else sha256_of(before.to_bytes())
    if line.previous != previous or (before is not None and line.store != before.store):
        found.append(f"{where}: does not follow the index before it: rolled back or cut out")
    return found
