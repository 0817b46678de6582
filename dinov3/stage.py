"""A stage's frame: checked inputs, whole outputs or none, `record.json` and `run.json`.

    with open_stage("image_embeddings", output, config=config) as stage:
        manifest = stage.read("manifest", Path("data/image_manifest/manifest.parquet"))
        table.write_parquet(stage.path("embeddings.parquet"))

dvc trusts modification times, so every input is hashed against the record beside it before use.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov3.errors import DataError, LineageBroken
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
from dinov3.release.tensors import tensor_digest

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
EVENTS_NAME = "events.jsonl"
BOARD_NAME = "tensorboard"
_BESIDE_RECORD = {EVENTS_NAME, BOARD_NAME}  # they hold times, which the inputs do not determine


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file whole: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        self._edges.append(Edge(role, name, sha256, file_sha256(record_path)))
        self._licences.update(record.licences.get("out", ()))
        return path

    def read_root(self, role: str, name: str, sha256: str, licences: set[str]) -> None:
        """Adds the edge to something outside the graph: here the chain begins."""
        self._edges.append(Edge(role, name, sha256, None))
        self._licences.update(licences)

    def add_edge(self, edge: Edge, licences: Iterable[str]) -> None:
        """Adds an input whose bytes are vouched for elsewhere, with its licences."""
        self._edges.append(edge)
        self._licences.update(licences)

    def adopt(self, other: "Stage") -> None:
        """Takes over inputs, licences and facts of a stage that is made by the same run."""
        if other is not self:
            self._edges, self._licences = list(other._edges), set(other._licences)
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
            facts=self.facts,
        ).to_bytes()
        atomic_write(self._partial / RECORD_NAME, record)
        run = {
            "record": file_sha256(self._partial / RECORD_NAME),
            "started": round(self._started, 3),
            "finished": round(time.time(), 3),
            "host_class": f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu".lower(),
            "beside": {name.as_posix(): file_sha256(files[name]) for name in sorted(beside)},
            **_working_tree(),
            **self.run_facts,
        }
        atomic_write(self._partial / RUN_NAME, canonical_json(run))
        self._publish()

    def _publish(self) -> None:
        """Moves the files to their place, the record last: a record never names missing bytes."""
        files = [path for path in self._partial.rglob("*") if path.is_file()]
        (self.output / RECORD_NAME).unlink(missing_ok=True)
        for path in sorted(files, key=lambda path: path.name == RECORD_NAME):
            target = self.output / path.relative_to(self._partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
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
        shutil.rmtree(stage.path(""), ignore_errors=True)
        stage.path("").mkdir()
        yield stage
        stage._finish()
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(output.parent)):
            raise
        msg = f"{output}: cannot be written: {error}. Free the disk or choose another folder."
        raise DataError(msg) from error
    finally:
        shutil.rmtree(stage.path(""), ignore_errors=True)


def describe_file(path: Path) -> Output:
    """Identity of a file; weights also get their tensor digest."""
    tensors = tensor_digest(path) if path.suffix == ".safetensors" else None
    return Output(file_sha256(path), path.stat().st_size, tensors)


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
    from importlib.metadata import distributions

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


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
