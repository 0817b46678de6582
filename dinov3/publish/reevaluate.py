"""Released weights judged again, on benchmark pictures of today, against what was released.

    store ──► fetched, verified ──► the protocols of its own evaluation ──► dated report
                                     released figure - tolerance ──────────► regression or not

The weights come from the store and never from the workspace, and the settings of the protocols
from the release's own record: figures made otherwise could not be compared. It is no stage: dvc
would find nothing changed and skip it.
"""

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dinov3.config import EvalsConfig, config_digest
from dinov3.config.reevaluation import ReevaluationConfig, ReevaluationRun
from dinov3.device import choose_device
from dinov3.errors import DataError, StoreError
from dinov3.evals.candidate import BACKBONE_NAME, CONFIG_NAME, Candidate, open_candidate
from dinov3.evals.report import rounded
from dinov3.evals.study import Scope, Study, run_study
from dinov3.publish.benchmark import Benchmark, Collection, contamination, open_benchmark
from dinov3.publish.comparison import Row, compare, require_judged, require_known
from dinov3.publish.history import SCHEMA, draw_history, history_of, read_reports
from dinov3.publish.reevaluation_page import render_reevaluation
from dinov3.publish.signed_log import locked
from dinov3.publish.store import Entry, open_store, split_name
from dinov3.publish.verified import verified_signer
from dinov3.release.atomic import atomic_write
from dinov3.release.contents import EVALS_NAME, MODEL_NAME, RELEASE_NAME
from dinov3.release.record import canonical_json, parse_json, read_record
from dinov3.stage import code_digest

_SCRATCH = ".fetched-"
_OF_DISK = (errno.ENOSPC, errno.ENOLCK, errno.ENOTSUP)  # such an error names no file
_DATE = "%Y-%m-%dT%H-%M-%SZ"


@dataclass(frozen=True)
class Reevaluation:
    """A finished re-evaluation: where its report lies and what it says."""

    report: Path
    page: Path
    content: Mapping[str, Any]

    @property
    def regressions(self) -> list[Row]:
        """The metrics that fell by more than their tolerance."""
        return [row for row in self.content["metrics"] if row["regressed"]]


def reevaluate(
    release: str,
    *,
    store: str,
    key: Path,
    benchmark: Benchmark,
    output: Path,
    config: ReevaluationConfig,
) -> Reevaluation:
    """Fetches, verifies and judges a release, and writes a report that nothing overwrites.

    Args:
        release: `MODEL@VERSION`.
        store: Where it is published.
        key: File of the public key that must have signed it.
        benchmark: Pictures to judge it on.
        output: Folder of the reports; each lies in `MODEL/VERSION/` there.
        config: The recipe.

    Raises:
        StoreError: The release is not there, or was withdrawn.
        LineageBroken: It is not what its signature says.
        DataError: The pictures cannot be used, a metric of the recipe is unknown or cannot be
            judged on them, or the reports cannot be read or written.
    """
    require_known(config)
    model, version = split_name(release)
    with _scratch(output) as scratch:
        read_reports(output / model)  # what they lack is said before hours are spent
        place = open_store(store)
        entry = place.fetch(model, version, scratch / "release")
        if entry.withdrawn is not None:
            msg = f"{release}: withdrawn, because: {entry.withdrawn}. Re-evaluate another version."
            raise StoreError(msg)
        signer = verified_signer(scratch / "release", key, release, place)
        content = _content(scratch, entry, signer, benchmark, config)
        return _write(output / model, version, rounded(content))


def _content(
    scratch: Path,
    entry: Entry,
    signer: str | None,
    benchmark: Benchmark,
    config: ReevaluationConfig,
) -> dict[str, Any]:
    """The report: figures of today beside those of the verified release in `scratch`."""
    folder = scratch / "release"
    head, released = _read(folder / RELEASE_NAME), _read(folder / EVALS_NAME)
    settings = _settings(folder, head, config.run)
    collection = open_benchmark(benchmark, settings)
    proof = contamination(folder, head, collection.table)
    candidate = _candidate(folder, scratch, config.run)
    wanted = {protocol for protocol, _ in config.tolerances}
    study = _judge(candidate, collection, settings, wanted)
    metrics, uncompared = compare(released["rows"], study.rows, config.tolerances)
    require_judged(metrics, uncompared, study.missing)
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime(_DATE),
        "release": _identity(entry, head, signer),
        "benchmark": _identify(benchmark, collection, released, proof),
        "metrics": metrics,
        "uncompared": [row for row in uncompared if row["released"] is None],
        "settings": config_digest(settings),
        "recipe": config_digest(config),
        "code": code_digest(),
    }


def _settings(folder: Path, head: Row, run: ReevaluationRun) -> EvalsConfig:
    """The protocols' settings of the release's own evaluation, run as the recipe says."""
    digest = head["evaluation"]
    (path,) = (folder / "records").glob(f"*-{digest[:12]}.json")
    inference = run.model_dump(mode="json", exclude={"alert"})
    tree = {**read_record(path).config, "run": inference}
    try:
        return EvalsConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        msg = (
            f"{path.name}: settings of another version of the evaluation, got {fields}. "
            "Re-evaluate with the version that made the release."
        )
        raise DataError(msg) from error


def _candidate(folder: Path, scratch: Path, run: ReevaluationRun) -> Candidate:
    """The release's weights under the names that artifacts have."""
    artifact = scratch / "artifact"
    artifact.mkdir()
    for name, released in ((BACKBONE_NAME, MODEL_NAME), (CONFIG_NAME, CONFIG_NAME)):
        (artifact / name).symlink_to(folder.resolve() / released)
    return open_candidate(artifact, None, choose_device(run.device))


def _judge(
    candidate: Candidate, collection: Collection, settings: EvalsConfig, protocols: Set[str]
) -> Study:
    """Without baselines: those of the release stand in its own report."""
    return run_study(
        candidate,
        collection.table,
        collection.pictures,
        collection.halves,
        settings,
        choose_device(settings.run.device),
        scope=Scope(protocols, baselines={}),
    )


def _identity(entry: Entry, head: Row, signer: str | None) -> dict[str, Any]:
    return {
        "model": entry.model,
        "version": entry.version,
        "digest": entry.digest,
        "tensors": head["tensors"][MODEL_NAME],
        "signer": signer,
    }


def _identify(
    benchmark: Benchmark, collection: Collection, released: Row, proof: str
) -> dict[str, Any]:
    halves = collection.halves
    return {
        "source": benchmark.source.partition(":")[0],
        "sha256": collection.sha256,
        "as_released": collection.sha256 == released["dataset"]["sha256"],
        "contamination": proof,
        "num_train": len(halves.train),
        "num_test": len(halves.test),
        "classes": list(halves.classes),
    }


def _write(folder: Path, version: str, content: Row) -> Reevaluation:
    """The page first, then the report: a report that is there is whole."""
    place = folder / version
    place.mkdir(parents=True, exist_ok=True)
    history = history_of([*read_reports(folder), content])
    picture = draw_history(content["release"]["model"], history)
    page = render_reevaluation(content, picture)
    name = f"{content['date']}-{content['benchmark']['sha256'][:12]}"
    for number in itertools.count(1):
        stem = name if number == 1 else f"{name}-{number}"
        pair = place / f"{stem}.json", place / f"{stem}.html"
        if not pair[0].exists() and _write_new(pair[1], page):
            _write_new(pair[0], canonical_json(content))
            return Reevaluation(*pair, content)
    raise AssertionError


def _write_new(path: Path, data: bytes) -> bool:
    """Writes a file whole under a name that was free; False where it was not."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    atomic_write(draft, data)
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the reports, where there is room for weights; those of the dead are removed.

    A run holds a lock on its folder, which the system lifts whenever and however the run ends.

    Raises:
        DataError: Nothing can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as own:
            with locked(output):  # nobody clears a folder before it is locked
                for left in output.glob(f"{_SCRATCH}*"):
                    _clear(left)
                made = own.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=output))
                own.enter_context(locked(Path(made)))
            yield Path(made)
    except OSError as error:
        if error.errno not in _OF_DISK and not str(error.filename).startswith(str(output)):
            raise
        msg = f"{output}: cannot be written: {error}. Free the disk or choose another folder."
        raise DataError(msg) from error


def _clear(left: Path) -> None:
    """Removes a folder that no run holds."""
    with suppress(BlockingIOError), locked(left, wait=False):
        shutil.rmtree(left, ignore_errors=True)


def _read(path: Path) -> Any:
    return parse_json(path.read_bytes())
