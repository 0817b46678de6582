"""Where the verifier runs: in an environment with next to nothing, in a hostile folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.stage import CHECKOUT

HEAVY = {
    "torch",
    "numpy",
    "polars",
    "pydantic",
    "typer",
    "rich",
    "yaml",
    "dagster",
    "model_signing",
}
NEEDED = ("cryptography", "cffi", "pycparser", "_cffi_backend")


@pytest.fixture
def public(key: PrivateKey, tmp_path: Path) -> Path:
    """The publisher's public key, got from elsewhere."""
    path = tmp_path / "publisher.pub"
    path.write_bytes(key.public)
    return path


@pytest.fixture(scope="session")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has `cryptography`, this package, and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_paths()["purelib"])
    for name in NEEDED:
        for path in installed.glob(f"{name}*"):
            if path.suffix != ".dist-info":
                (site / path.name).symlink_to(path)
    (site / "dinov3").symlink_to(CHECKOUT / "dinov3")
    return folder / "bin" / "python"


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_with_cryptography_alone_verifies(
    light_python: Path, release: Path, public: Path, tmp_path: Path
) -> None:
    verify = (light_python, "-P", "-m", "dinov3", "verify")
    done = _run(*verify, release, "--key", public, "--format", "json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdict"] == "verified"


def test_light_environment_is_light(light_python: Path, tmp_path: Path) -> None:
    tried = "; ".join(
        f"print(importlib.util.find_spec({name!r}))" for name in sorted(HEAVY | {"pip"})
    )
    done = _run(light_python, "-P", "-c", f"import importlib.util; {tried}", cwd=tmp_path)
    assert set(done.stdout.split()) == {"None"}


def test_verifying_loads_nothing_heavy(release: Path, public: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['dinov3', 'verify', *sys.argv[1:]]\n"
        "from dinov3.__main__ import main; code = main()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = _run(sys.executable, "-P", "-c", program, release, "--key", public, cwd=tmp_path)
    assert done.returncode == 0
    loaded = set(done.stderr.split())
    assert "cryptography" in loaded
    assert not loaded & HEAVY


def test_missing_library_is_no_verdict(
    light_python: Path, release: Path, public: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None; sys.argv = ['dinov3', *sys.argv[1:]]\n"
        "from dinov3.__main__ import main; sys.exit(main())"
    )
    done = _run(light_python, "-P", "-c", program, "verify", release, "--key", public, cwd=tmp_path)
    assert done.returncode == 2
    assert "UNDECIDED: the verifier itself failed, ModuleNotFoundError" in done.stderr


def test_reader_who_leaves_early_gets_no_verdict(
    release: Path, public: Path, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-P", "-m", "dinov3", "verify", str(release), "--key", str(public)]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


def _plant(folder: Path, marker: Path) -> None:
    """Modules that a careless interpreter would run."""
    program = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    for name in ("json.py", "sitecustomize.py", "argparse.py", "dinov3/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(program)


SCRIPT = Path(sys.executable).with_name("dinov3")
MODULE = (Path(sys.executable), "-P", "-m", "dinov3")


@pytest.mark.parametrize("command", [(SCRIPT,), MODULE], ids=["console script", "python -P -m"])
def test_code_planted_in_the_folder_we_stand_in_does_not_run(
    command: tuple[Path, ...], release: Path, public: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    _plant(hostile, tmp_path / "ran")
    done = _run(*command, "verify", release, "--key", public, cwd=hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [(SCRIPT,), MODULE], ids=["console script", "python -P -m"])
def test_code_planted_in_the_release_does_not_run_and_is_refused(
    command: tuple[Path, ...], release: Path, public: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    _plant(copy, tmp_path / "ran")
    done = _run(*command, "verify", ".", "--key", public, cwd=copy)
    assert done.returncode == 1
    assert "REFUSED file-unlisted" in done.stdout
    assert not (tmp_path / "ran").exists()
