"""The verbs that hold a release to its word: judge its weights again, make it again."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli_options import Overrides, Recipe, Source, resolve

app = typer.Typer()

ALERT_SCHEMA = "dinov3.alert/1"


@app.command()
def reevaluate(
    release: Annotated[str, typer.Argument(help="MODEL@VERSION.")],
    store: Annotated[
        str, typer.Option(help="Where it is published: directory:PATH, lakefs://REPO.")
    ],
    key: Annotated[Path, typer.Option(help="Public key that must have signed it.")],
    source: Source,
    manifest: Annotated[
        Path | None, typer.Option(help="Table of the pictures with splits; else one is made.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="curated.parquet of the same pictures.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the dated reports.")] = Path(
        "data/reevaluations"
    ),
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Judge released weights again; exits with 3 where a metric fell beyond its tolerance."""
    tree = resolve(recipe, overrides, "reevaluation")
    from dinov3.errors import JudgementFailed
    from dinov3.publish.alert import send_alert
    from dinov3.publish.benchmark import Benchmark
    from dinov3.publish.comparison import describe
    from dinov3.publish.reevaluate import reevaluate

    found = reevaluate(
        release,
        store=store,
        key=key,
        benchmark=Benchmark(source, manifest, dataset),
        output=output,
        config=tree,
    )
    finding = {
        "schema": ALERT_SCHEMA,
        "release": release,
        "digest": found.content["release"]["digest"],
        "date": found.content["date"],
        "report": str(found.report),
        "regressions": found.regressions,
    }
    alert = tree.run.alert.model_dump()
    failures = send_alert(finding, **alert) if found.regressions else []  # before any output fails
    for row in found.content["metrics"]:
        print(("REGRESSION  " if row["regressed"] else "holds       ") + describe(row))
    print(f"report {found.report}", flush=True)
    for failure in failures:
        sys.stderr.write(f"dinov3: {failure}\n")
    if not found.regressions:
        return
    msg = (
        f"{release}: {len(found.regressions)} of {len(found.content['metrics'])} figures fell "
        f"beyond their tolerance, got first {describe(found.regressions[0])}. "
        f"Read {found.page}."
    )
    raise JudgementFailed(msg)


@app.command()
def reproduce(
    release: Annotated[str, typer.Argument(help="Folder of a release, or MODEL@VERSION.")],
    store: Annotated[
        str | None, typer.Option(help="Where it is published: directory:PATH, lakefs://REPO.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Public key that must have signed it; without, no code of its own runs."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Its pictures, kind:path; else that of params.yaml.")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Empty folder to work in and to leave; else a passing one.")
    ] = None,
) -> None:
    """Make a release again from its records; exits with 0 the same, 1 different, 2 could not."""
    from dinov3.errors import DataError, LineageBroken
    from dinov3.publish.remake import remake
    from dinov3.release.record import RecordError

    try:
        found = remake(release, store=store, key=key, source=source, scratch=scratch, say=_say)
    except (LineageBroken, RecordError, OSError) as error:  # no verdict on what was made again
        raise DataError(str(error)) from error
    for note in (*found.notes, found.reason):
        if note:
            print(f"note: {note}")
    for finding in found.findings:
        word = "same     " if finding.agrees else "DIFFERENT"
        print(f"{word} {finding.name}: released {finding.released}, made {finding.made}")
    verdict = f"compared by {found.compared}"
    if found.is_same:
        print(f"{release}: made again the same, {verdict}")
        return
    first = f", the first stage that differs is {found.drifted[0]}" if found.drifted else ""
    msg = f"{release}: made again it is different, {verdict}{first}. Read the lines above."
    raise LineageBroken(msg)


def _say(line: str) -> None:
    sys.stderr.write(f"reproduce: {line}\n")
