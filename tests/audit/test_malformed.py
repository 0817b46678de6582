"""A signer who writes nonsense gets a verdict, never a crash of the verifier."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.release.audit import Question, audit_release
from dinov3.release.record import canonical_json
from dinov3.release.refusals import CannotCheck, Refused
from tests.audit.insider import forge, sign_again

SEED = 5
ODD: tuple[Any, ...] = (None, True, -1, 0.5, 10**17, "", "\x1b[2J\u202e", "x" * 300, [], [[]], {})


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _places(below, (*path, name))
    elif isinstance(value, list):
        for number, below in enumerate(value[:3]):
            yield from _places(below, (*path, number))


def _broken(content: Any, rng: random.Random) -> Any:
    """The value with one place replaced, removed or doubled."""
    path = rng.choice([place for place in _places(content) if place])
    above = content
    for step in path[:-1]:
        above = above[step]
    kind = rng.randrange(4)
    if kind == 0:
        del above[path[-1]]
    elif kind == 1 and isinstance(above, list):
        above.append(above[path[-1]])
    else:
        above[path[-1]] = rng.choice(ODD)
    return content


def _verdict(folder: Path, key: PrivateKey) -> str | None:
    """The name of a refusal; None where it verifies or cannot be checked."""
    try:
        audit_release(folder, Question(key=key.public))
    except Refused as refused:
        return refused.name
    except CannotCheck:
        return None
    return None


@pytest.mark.parametrize(
    "name",
    ["release.json", "checks.json", "evals.json", "provenance.intoto.json", "mlbom.cdx.json"],
)
def test_signed_nonsense_in_a_document_is_no_crash(
    name: str, release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED}{name}")
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    genuine = (release / name).read_bytes()
    names = set()
    for _ in range(25):
        (folder / name).write_bytes(canonical_json(_broken(json.loads(genuine), rng)))
        sign_again(folder, key)
        names.add(_verdict(folder, key))
    assert names - {None}


@pytest.mark.parametrize("part", ["records", "runs"])
def test_signed_nonsense_in_a_record_that_all_agree_with_is_no_crash(
    part: str, release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED}{part}")
    names = set()
    for number, path in enumerate(sorted((release / part).iterdir()) * 4):
        name = path.relative_to(release).as_posix()
        broken = canonical_json(_broken(json.loads(path.read_bytes()), rng))

        def write(folder: Path, name: str = name, broken: bytes = broken) -> None:
            (folder / name).write_bytes(broken)

        names.add(_verdict(forge(release, tmp_path / f"{number}", write, key, settled=True), key))
    assert names - {None}
