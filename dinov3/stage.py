"""A stage's frame: checked inputs, whole outputs or none, `record.json` and `run.json`.

    with open_stage("image_embeddings", output, config=config) as stage:
        manifest = stage.read("manifest", Path("data/image_manifest/manifest.parquet"))
        table.write_parquet(stage.path("embeddings.parquet"))

dvc trusts modification times, so every input is hashed against the record beside it before use.
"""

import contextlib
import fcntl
import glob
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from dinov3.errors import DataError, LineageBroken
from dinov3.release.atomic import atomic_write
from dinov3.release.policy_terms import NO_WEIGHTS
from dinov3.release.record import (
    RECORD_NAME,
    RUN_NAME,
    Edge,
    Output,
    Record,
    RecordError,
    canonical_json,
    digest_of,
    file_sha256,
    read_record,
)
from dinov3.release.tensors import hash_stream

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
EVENTS_NAME = "events.jsonl"
BOARD_NAME = "tensorboard"
TRAINING_DATA, UNKNOWN = "training_data", "unknown"  # a fact that everything below inherits
_BESIDE_RECORD = {EVENTS_NAME, BOARD_NAME}  # they hold times, which the inputs do not determine


class Stage:
    """One run of a stage; made by `open_stage`."""

    def __init__(self, name: str, output: Path, config: Mapping[str, Any]) -> None:
        self.name = name
        self.output = output
        self.config = dict(config)
        self.seeds: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.facts: dict[str, Any] = {}
        self.run_facts: dict[str, Any] = {}
        self._edges: list[Edge] = []
        self._licences: set[str] = set()
        self._has_unknown_data = False
        self._started = time.time()
        self._partial = output.with_name(f".{output.name}.partial-{os.getpid()}")

    def path(self, name: str) -> Path:
        """Where to write an output file; it reaches the output folder when the stage succeeds."""
        return self._partial / name

    def read(self, role: str, path: Path) -> Path:
        """Checks an input file against its record and adds the edge; returns the path.

        The record stands beside the file, or one folder up for a file in a sub-folder of its stage.

        Raises:
            DataError: The file or its record is missing.
            LineageBroken: The bytes differ from the record.
        """
        folder = path.parent
        if not (folder / RECORD_NAME).is_file() and (folder.parent / RECORD_NAME).is_file():
            folder = folder.parent
        record_path = folder / RECORD_NAME
        for needed in (path, record_path):
            if not needed.is_file():
                msg = f"{needed}: missing. Make it first: dvc repro {folder.name}."
                raise DataError(msg)
        try:
            record = read_record(record_path)
        except RecordError as error:
            raise LineageBroken(str(error)) from error
        sha256 = file_sha256(path)
        name = path.relative_to(folder).as_posix()
        named = record.outputs.get(name)
        if named is None or named.sha256 != sha256:
            msg = (
                f"{path}: its bytes differ from the record of its stage, got sha256 {sha256}. "
                f"Restore it with dvc checkout --force, or make it anew."
            )
            raise LineageBroken(msg)
        self.add_edge(Edge(role, name, sha256, file_sha256(record_path)), record)
        return path

    def read_root(self, role: str, name: str, sha256: str, licences: set[str]) -> None:
        """Adds the edge to something outside the graph: here the chain begins.

        Outside weights were trained on nobody here knows what.
        """
        self._edges.append(Edge(role, name, sha256, None))
        self._licences.update(licences)
        self._has_unknown_data |= role not in NO_WEIGHTS

    def add_edge(self, edge: Edge, record: Record) -> None:
        """Adds an input whose bytes are vouched for, with what its record passes on.

        That is its licences, and that somewhere above stand weights of unknown training data.
        """
        self._edges.append(edge)
        self._licences.update(record.licences.get("out", ()))
        self._has_unknown_data |= record.facts.get(TRAINING_DATA) == UNKNOWN

    def adopt(self, other: "Stage") -> None:
        """Takes over inputs, licences and facts of a stage that is made by the same run."""
        if other is not self:
            self._edges, self._licences = list(other._edges), set(other._licences)
            self._has_unknown_data = other._has_unknown_data
            self.facts = dict(other.facts)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The inputs read so far."""
        return tuple(self._edges)

    def _finish(self) -> None:
        files = {
            path.relative_to(self._partial): path
            for path in sorted(self._partial.rglob("*"))
            if path.is_file()
        }
        beside = {name for name in files if name.parts[0] in _BESIDE_RECORD}
        outputs = {
            name.as_posix(): describe_file(path)
            for name, path in files.items()
            if name not in beside
        }
        licences = tuple(sorted(self._licences))
        record = Record(
            stage=self.name,
            inputs=tuple(sorted(self._edges, key=lambda edge: (edge.role, edge.name))),
            config=self.config,
            config_digest=digest_of(self.config),
            code=code_digest(),
            environment=environment_digest(),
            outputs=outputs,
            seeds=self.seeds,
            steps=self.steps,
            licences={"in": licences, "out": licences},
            facts={**self.facts, **self._inherited_facts()},
        ).to_bytes()
        atomic_write(self._partial / RECORD_NAME, record)
        run = {
            "record": file_sha256(self._partial / RECORD_NAME),
            "started": round(self._started, 3),
            "finished": round(time.time(), 3),
            "versions": {"python": platform.python_version(), **_versions()},
            "host_class": f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu".lower(),
            "beside": {name.as_posix(): file_sha256(files[name]) for name in sorted(beside)},
            **_working_tree(),
            **self.run_facts,
        }
        atomic_write(self._partial / RUN_NAME, canonical_json(run))
        self._publish()

    @property
    def contamination(self) -> str:
        """Of training and evaluation: "none", or "unknown" below outside weights."""
        return UNKNOWN if self._has_unknown_data else "none"

    def _inherited_facts(self) -> dict[str, str]:
        return {TRAINING_DATA: UNKNOWN} if self._has_unknown_data else {}

    def _publish(self) -> None:
        """Moves all to its place, the record last: a record never names missing bytes.

        A folder takes the place of the one before it, so that nothing of that one stays.
        """
        for path in self._partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        self.output.mkdir(exist_ok=True)
        (self.output / RECORD_NAME).unlink(missing_ok=True)
        made = sorted(self._partial.iterdir(), key=lambda path: path.name == RECORD_NAME)
        for path in made:
            target = self.output / path.name
            if path.is_dir() and target.exists():
                target.rename(self._partial / f".{path.name}.before")
            path.replace(target)


@contextlib.contextmanager
def open_stage(name: str, output: Path, *, config: Mapping[str, Any]) -> Iterator[Stage]:
    """Runs a stage: on success its files and record stand in `output`, on failure nothing does.

    Args:
        name: Key of the stage in `dvc.yaml` and of the asset.
        output: Folder of the stage's files.
        config: The resolved part of the recipe that determines the result (JSON values).

    Raises:
        DataError: The output cannot be written (disk full, read-only).
    """
    stage = Stage(name, output, config)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _refuse_another(name, output)
        with _own_folder(stage.path("")):
            yield stage
            stage._finish()
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(output.parent)):
            raise
        msg = f"{output}: cannot be written: {error}. Free the disk or choose another folder."
        raise DataError(msg) from error


def _refuse_another(name: str, output: Path) -> None:
    """One wrong --output must not destroy the artifact of another stage."""
    try:
        there = read_record(output / RECORD_NAME).stage
    except (OSError, RecordError):  # none, or a broken one, which is made anew
        return
    if there != name:
        msg = (
            f"{output}: holds the artifact of {there}, got {name} to write. Choose another folder."
        )
        raise DataError(msg)


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Makes `.NAME.partial-PID` for this run and removes it after; those of dead runs go first.

    A run holds a lock on its folder, which the system lifts whenever and however the run ends.
    """
    beginning = folder.name.removesuffix(str(os.getpid()))
    with contextlib.ExitStack() as own:
        with _locked(folder.parent, fcntl.LOCK_EX):  # nobody clears a folder before it is locked
            for left in folder.parent.glob(f"{glob.escape(beginning)}*"):
                _clear(left, is_ours=left == folder)
            folder.mkdir()
            own.enter_context(_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            own.callback(shutil.rmtree, folder, ignore_errors=True)
        yield


def _clear(left: Path, *, is_ours: bool) -> None:
    """Removes a folder that nobody holds; without locks only our own name is surely nobody's."""
    with (
        contextlib.suppress(OSError),  # its run has just ended, or it is another user's
        _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_held,
    ):
        if is_held or (is_held is None and is_ours):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool | None]:
    """Whether the folder's lock is held: None where the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_held: bool | None = True
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            is_held = False
        except OSError:
            is_held = None
        yield is_held
    finally:
        os.close(descriptor)


def describe_file(path: Path) -> Output:
    """Identity of a file; weights also get their tensor digest."""
    with path.open("rb", buffering=0) as stream:
        found = hash_stream(stream, weights=path.suffix == ".safetensors")
    return Output(found.sha256, found.bytes, found.tensors)


def code_digest() -> str:
    """Digest of the code that makes artifacts: the package, `dvc.yaml` and the lock file."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".yaml"}]
    files += [path for path in _beside_package() if path.is_file()]
    return digest_of(sorted([_relative(path), file_sha256(path)] for path in files))


def environment_digest() -> str:
    """sha256 of the lock file, or of the installed versions where the package stands alone."""
    lock = CHECKOUT / "requirements.lock"
    if lock.is_file():
        return file_sha256(lock)
    return digest_of(sorted([dist.name, dist.version] for dist in distributions()))


def _beside_package() -> tuple[Path, ...]:
    return CHECKOUT / "dvc.yaml", CHECKOUT / "requirements.lock"


def _relative(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def _working_tree() -> dict[str, Any]:
    """Commit and, where the code differs from it, the difference: a dirty run carries its diff."""
    tracked = ["dinov3", "dvc.yaml", "requirements.lock"]
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "diff": None}
    difference = _git("diff", "HEAD", "--", *tracked) or ""
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", *tracked) or ""
    dirty = bool(difference.strip() or untracked.strip())
    diff = difference + "".join(f"untracked: {name}\n" for name in untracked.splitlines())
    return {"commit": commit.strip(), "dirty": dirty, "diff": diff if dirty else None}


def _versions() -> dict[str, str]:
    """Of the libraries that decide bits, where they are installed."""
    found = {}
    for name in ("torch", "torchvision", "polars"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
