"""Re-evaluation of published releases: outside `dvc.yaml`, one partition per release.

dvc would find nothing changed and skip it; and what is judged are the bytes in the store, not those
of the workspace. The work itself is `python -m dinov3 reevaluate`, run as stages are run.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from dinov3.data.sources.fingerprint import RELATIVE_CACHE, refresh
from dinov3.errors import ConfigError, DataError, JudgementFailed
from dinov3.launch import DEFAULT_GRACE, start, stop
from dinov3.publish.history import draw_history, history_of, read_reports
from dinov3.publish.store import Entry, entries_if_made, open_store
from dinov3.release.record import RECORD_NAME, RecordError, parse_json, read_record
from orchestration.metadata import picture_markdown
from orchestration.output import LINES_SHOWN, follow
from orchestration.stages import CHECKOUT

KEY = "reevaluations"
CHECK = "no_regression"
FOLDER = Path("data") / KEY
RELEASES = dg.DynamicPartitionsDefinition(name="releases")

_MANIFEST, _TABLE = Path("data/image_manifest"), "manifest.parquet"
_DATASET = Path("data/curated_dataset/curated.parquet")
_KEYS = Path("data/release_log/keys")
_FINGERPRINT = Path(".cache/benchmark.json")
_REPORT = re.compile(r"^report (.+\.json)$", re.MULTILINE)
_LOG_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """What `params.yaml` says of releases and of the benchmark.

    Attributes:
        root: Folder of `params.yaml`.
        recipe: Family of recipes.
        store: Where releases are published.
        key: Name of the public key in the log of releases.
        source: The pipeline's pictures.
        benchmark: Labelled pictures of their own; empty: the held-out half of the pipeline's.
    """

    root: Path
    recipe: str
    store: str
    key: str
    source: str
    benchmark: str

    def command(self, release: str) -> list[str]:
        """The command line that re-evaluates `MODEL@VERSION`."""
        pictures = ["--source", self.benchmark or self.source]
        if not self.benchmark:
            pictures += ["--manifest", str(_MANIFEST / _TABLE)]
            pictures += ["--dataset", str(_DATASET)]
        return [
            *(sys.executable, "-m", "dinov3", "reevaluate", release, "--recipe", self.recipe),
            *("--store", self.store, "--key", str(_KEYS / f"{self.key}.pub")),
            *(*pictures, "--output", str(FOLDER)),
        ]

    def entries(self) -> list[Entry]:
        """Published releases that were not withdrawn; none while there is no store yet.

        Raises:
            StoreError: The store cannot be used.
        """
        kind, _, place = self.store.partition(":")
        is_folder = kind == "directory"
        store = open_store(f"directory:{self.root / place}" if is_folder else self.store)
        return [entry for entry in entries_if_made(store) if entry.withdrawn is None]

    def fingerprint(self) -> str | None:
        """What identifies the pictures now; None while the pipeline has made none.

        Of the pipeline's own it is the digest of their table, once the dataset is made from it:
        one that was made again by other code, of the same pictures, is nothing new.

        Raises:
            DataError: The benchmark cannot be used, or a record of the pictures is unreadable.
        """
        if self.benchmark:
            cache = self.root / RELATIVE_CACHE
            value = refresh(self._benchmark_from_root(), self.root / _FINGERPRINT, cache)
            return str(value["sha256"])
        table, dataset = (
            self.root / folder / RECORD_NAME for folder in (_MANIFEST, _DATASET.parent)
        )
        if not (table.is_file() and dataset.is_file()):
            return None
        try:
            sha256 = read_record(table).outputs[_TABLE].sha256
            used = {edge.sha256 for edge in read_record(dataset).inputs if edge.name == _TABLE}
        except (RecordError, KeyError) as error:
            msg = f"{table}: no record of a table, got {error}. Make it again: dvc repro."
            raise DataError(msg) from error
        return sha256 if sha256 in used else None

    def _benchmark_from_root(self) -> str:
        """As the command finds it, which runs in `root`, from whatever folder we run in."""
        kind, _, place = self.benchmark.partition(":")
        is_server = place.startswith("//")
        path = self.root / Path(place).expanduser()
        return self.benchmark if is_server else f"{kind}:{path}"


def read_settings(root: Path) -> Settings:
    """Reads `params.yaml`.

    Raises:
        ConfigError: It says nothing of releases.
    """
    path = root / "params.yaml"
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
        return Settings(
            root=root,
            recipe=tree["recipe"],
            store=tree["release"]["store"],
            key=tree["release"]["key"],
            source=tree["source"],
            benchmark=tree["release"]["benchmark"],
        )
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        msg = f"{path}: says not how to re-evaluate releases, got {error!r}. Restore it from git."
        raise ConfigError(msg) from error


def reevaluation_asset(
    *, group: str, deps: Sequence[str], root: Path = CHECKOUT
) -> dg.AssetsDefinition:
    """The asset of dated reports, a partition per release, with its check.

    Args:
        group: Chapter of the graph.
        deps: Keys of the releases as the pipeline builds them.
        root: Folder of `params.yaml`.
    """

    @dg.asset(
        name=KEY,
        group_name=group,
        kinds={"pytorch", "html"},
        deps=deps,
        partitions_def=RELEASES,
        description=(
            "Published weights judged again on benchmark pictures; a dated report each time. "
            "Not a stage of dvc."
        ),
        check_specs=[
            dg.AssetCheckSpec(
                CHECK, asset=KEY, description="No metric fell beyond its stated tolerance."
            )
        ],
    )
    def reevaluations(context: dg.AssetExecutionContext) -> Iterator[Any]:
        settings = read_settings(root)
        command = settings.command(context.partition_key)
        code, said = _run(command, root, context.log.info)
        report = _REPORT.search(said)
        if report is None or code not in (0, JudgementFailed.exit_code):
            last = "\n".join(said.splitlines()[-LINES_SHOWN:])
            msg = f"{context.partition_key}: could not be re-evaluated\n{last}"
            raise dg.Failure(msg, metadata={"exit_code": code}, allow_retries=False)
        yield _result(root / report[1])

    return reevaluations


def _run(command: Sequence[str], root: Path, log: Callable[[str], None]) -> tuple[int, str]:
    """Runs it to its end and passes on its output; stops the whole tree on any exception."""
    with tempfile.TemporaryFile() as output:
        process = start(command, output=output, cwd=root, grace=DEFAULT_GRACE)
        try:
            text = follow(process, output, log, _LOG_SECONDS)
        finally:
            stop(process, DEFAULT_GRACE)
    return process.returncode, text


def _result(path: Path) -> dg.MaterializeResult[Any]:
    report = parse_json(path.read_bytes())
    release, benchmark, metrics = (report[name] for name in ("release", "benchmark", "metrics"))
    history = history_of(read_reports(path.parent.parent))
    fallen = [row for row in metrics if row["regressed"]]
    words = f"{len(fallen)} of {len(metrics)} figures fell beyond their tolerance."
    table = dg.MetadataValue.md(_table(metrics))
    page = dg.MetadataValue.path(str(path.with_suffix(".html")))
    return dg.MaterializeResult(
        metadata={
            "date": report["date"],
            "history": picture_markdown(
                "history", "svg+xml", draw_history(release["model"], history)
            ),
            "figures": table,
            "page": page,
            "report": dg.MetadataValue.path(str(path)),
            "release_digest": release["digest"],
            "signer": release["signer"],
            "benchmark": benchmark["sha256"],
            "contamination": benchmark["contamination"],
        },
        check_results=[
            dg.AssetCheckResult(
                asset_key=KEY,
                check_name=CHECK,
                passed=not fallen,
                description=words if fallen else f"All {len(metrics)} figures hold.",
                metadata={"figures": table, "page": page},
            )
        ],
    )


def _table(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {row['protocol']} {row['metric']}{', k = ' + str(row['k']) if 'k' in row else ''} "
        f"| {row['released']:.3f} | {row['value']:.3f} | {row['value'] - row['released']:+.3f} "
        f"| {row['tolerance']:.3f} | {'**regression**' if row['regressed'] else 'holds'} |"
        for row in metrics
    ]
    head = "| metric | released | now | change | may fall by | |\n|---|---|---|---|---|---|"
    return "\n".join([head, *rows])
