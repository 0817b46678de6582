"""A published student and teacher to be traced: from any end of their chain to the other."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinov3.publish.publishing import withdraw_release
from dinov3.publish.store import open_store
from dinov3.release.lineage import main
from tests.released import make_chain, make_key, make_release

Found = dict[str, Any]
Ask = Callable[..., tuple[int, Found]]

TRAINED, CLUSTERED, EXCLUDED, EVALUATED = (
    hashlib.sha256(f"0/{number}".encode()).hexdigest() for number in (0, 8, 9, 12)
)
WHY = "wrong pictures"
WHOLE_CHAIN = {
    "curated_dataset",
    "distilled_students_vits",
    "image_embeddings",
    "image_manifest",
    "pretrained_checkpoint",
}


def publish(base: Path) -> None:
    """A chain in `data`, a student and its teacher published in `store`, the student withdrawn."""
    key = make_key(base / "keys")
    chain = make_chain(base / "data")
    store = open_store(f"directory:{base / 'store'}")
    for model in ("vits", "pretrained"):
        release = make_release(base, model=model, key=key, chain=chain)
        store.publish(release, log=chain.log, key=key)
    withdraw_release(("vits", "0.1.0"), WHY, store, log=chain.log, key=key)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was published; never to be changed in place."""
    base = tmp_path_factory.mktemp("published")
    publish(base)
    return base


@pytest.fixture
def base(written: Path, tmp_path: Path) -> Path:
    """What was published, to be tampered with."""
    return Path(shutil.copytree(written, tmp_path / "base", symlinks=True))


@pytest.fixture
def ask(base: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs the command on what was published; answers with its exit code and what it found."""

    def run(
        target: object, *options: str, root: str = "data", store: bool = False
    ) -> tuple[int, Found]:
        where = ["--store", f"directory:{base / 'store'}"] if store else []
        arguments = [str(target), "--root", str(base / root), *where, *options]
        code = main([*arguments, "--format", "json"])
        found: Found = json.loads(capsys.readouterr().out)
        assert found["exit_code"] == code
        return code, found

    return run


def titles(found: Found) -> list[str]:
    return [answer["title"] for answer in found["answers"]]


def facts(found: Found, title: str) -> dict[str, Any]:
    (answer,) = [answer for answer in found["answers"] if answer["title"] == title]
    return dict(answer["facts"])


def stages(found: Found) -> set[str]:
    return {record["stage"] for record in found["chain"]}


def used_by(found: Found) -> set[str]:
    told = (title for title in titles(found) if title.startswith("used by "))
    return {title.removeprefix("used by ") for title in told}
