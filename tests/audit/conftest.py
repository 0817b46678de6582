"""Genuine releases, the key that signed them, and the key of somebody else."""

from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey, load_key, new_key
from tests.released import make_chain, make_release


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PrivateKey]:
    """The publisher's key, and an attacker's."""
    folder = tmp_path_factory.mktemp("keys") / "private"
    for name in ("publisher", "attacker"):
        new_key(name, folder, None)
    return {name: load_key(name, folder) for name in ("publisher", "attacker")}


@pytest.fixture(scope="session")
def key(keys: dict[str, PrivateKey]) -> PrivateKey:
    """The publisher's."""
    return keys["publisher"]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `data/` holds a chain of artifacts."""
    folder = tmp_path_factory.mktemp("project")
    make_chain(folder / "data")
    return folder


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey) -> Path:
    """A genuine release `vits@0.1.0`, signed; never to be changed in place."""
    return make_release(tmp_path_factory.mktemp("vits"), key=key)


@pytest.fixture(scope="session")
def teacher_release(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey) -> Path:
    """A genuine release `pretrained@0.1.0` by the same key."""
    return make_release(tmp_path_factory.mktemp("pretrained"), model="pretrained", key=key)


@pytest.fixture(scope="session")
def outside_release(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey) -> Path:
    """A genuine release below weights from outside."""
    folder = tmp_path_factory.mktemp("outside")
    return make_release(folder, key=key, outside="Apache-2.0")
