"""The code that a record names: what is installed, or a clone of the recorded commit."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3.errors import DataError
from dinov3.stage import CHECKOUT, code_digest

_UNTRACKED = (
    "untracked: "  # begins a line of a recorded diff: a file of which only the name is known
)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_DIGEST = "from dinov3.stage import code_digest; print(code_digest())"
_RUNS = """
import json
from dinov3.config import type_of_phase
from dinov3.recipe import load_recipe
trees = {phase: load_recipe("default", phase=phase).model_dump(mode="json")
         for phase in type_of_phase}
print(json.dumps({phase: tree["run"] for phase, tree in trees.items() if "run" in tree}))
"""


def environment_of(code: Path) -> dict[str, str]:
    """The environment in which commands run the code of a checkout, whatever their folder holds."""
    python = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(code),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def find_code(digest: str, run: Mapping[str, Any], scratch: Path, *, is_trusted: bool) -> Path:
    """A checkout whose code has this digest.

    Args:
        digest: `code` of the record.
        run: Content of the run.json beside it: commit and, of a dirty run, the difference.
        scratch: Where a clone is put, by the digest of its code.
        is_trusted: Whether a difference may be laid over a commit: it comes with the release, and
            what it changes is run.

    Raises:
        DataError: Neither this checkout nor its history holds that code, or it must not be run.
    """
    if code_digest() == digest:
        return CHECKOUT
    commit = run.get("commit")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):  # git would take an option
        msg = f"code {digest[:12]}: its run names no commit, got {commit!r}. Install that version."
        raise DataError(msg)
    diff = str(run.get("diff") or "")
    if diff and not is_trusted:
        msg = (
            f"code {digest[:12]}: changed after its commit by a difference that comes with the "
            "release, got no key that vouches for it. Give --key."
        )
        raise DataError(msg)
    clone = scratch / digest[:12]
    if not clone.exists():
        _clone(clone, commit, diff)
    found = _run([sys.executable, "-c", _DIGEST], "code", env=environment_of(clone)).strip()
    if found != digest:
        msg = (
            f"code {digest[:12]}: commit {commit[:12]} has other code, got {found[:12]}. "
            "Install the version that made the release."
        )
        raise DataError(msg)
    return clone


def default_runs(code: Path) -> dict[str, dict[str, Any]]:
    """What cannot change a result, by phase: the `run` of the default recipes of a checkout."""
    said = _run([sys.executable, "-c", _RUNS], "code", env=environment_of(code))
    found: dict[str, dict[str, Any]] = json.loads(said)
    return found


def _clone(clone: Path, commit: str, diff: str) -> None:
    """Without a trace in the repository it is made from."""
    clone.parent.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(clone)]
    _run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(CHECKOUT), str(clone)], "git")
    _run([*git, "checkout", "--quiet", "--detach", commit], "git")
    lines = [line for line in diff.splitlines(keepends=True) if not line.startswith(_UNTRACKED)]
    if lines:
        _run([*git, "apply", "--whitespace=nowarn", "-"], "git", given="".join(lines))


def _run(
    command: list[str], what: str, *, env: Mapping[str, str] | None = None, given: str | None = None
) -> str:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, env=env, check=False
        )
    except OSError as error:
        msg = f"{what}: {command[0]} cannot be run, got {error.strerror}. Install it."
        raise DataError(msg) from error
    if done.returncode:
        said = " ".join(done.stderr.split()[-40:])
        msg = f"{what}: the recorded code cannot be restored, got {said!r}. Fetch its history."
        raise DataError(msg)
    return done.stdout
