"""One released directory per schema version: whatever changes in the code, it verifies for ever."""

import shutil
from pathlib import Path

import pytest

from dinov3.release.audit import Question, audit_release
from dinov3.release.head import SCHEMA
from dinov3.release.verify import main
from tests.released import make_key, make_release

GOLDEN = Path(__file__).with_name("golden")
SCHEMAS = ("1",)  # a new schema is added here, an old one never leaves


@pytest.fixture(scope="module", autouse=True)
def _update(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes the newest one anew on demand; its private key is thrown away."""
    if not request.config.getoption("--update-goldens"):
        return
    folder = tmp_path_factory.mktemp("golden")
    key = make_key(folder / "private")
    place = GOLDEN / f"release-{SCHEMAS[-1]}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(make_release(folder, key=key), place)
    place.with_suffix(".pub").write_bytes(key.public)


@pytest.mark.parametrize("version", SCHEMAS)
def test_release_of_every_schema_verifies(version: str) -> None:
    place = GOLDEN / f"release-{version}"
    arguments = ["--key", str(place.with_suffix(".pub")), "--expect", "vits@0.1.0"]
    assert main([str(place), *arguments]) == 0


def test_newest_schema_has_a_golden_release() -> None:
    key = (GOLDEN / f"release-{SCHEMAS[-1]}.pub").read_bytes()
    assert f"dinov3.release/{SCHEMAS[-1]}" == SCHEMA
    audit = audit_release(GOLDEN / f"release-{SCHEMAS[-1]}", Question(key=key))
    assert audit.name == "vits@0.1.0"
