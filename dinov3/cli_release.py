"""The verb `release`: builds, gates and signs one release."""

from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli_options import Output, Overrides, Recipe, resolve, stage_key

app = typer.Typer()

_PREFIX = "release_"


@app.command()
def release(
    stage_name: Annotated[str, typer.Argument(help="Key of the stage: release_<model>.")],
    recipe: Recipe,
    model: Annotated[Path, typer.Option(help="Folder of the weights.")],
    report: Annotated[Path, typer.Option(help="Folder of their evaluation.")],
    artifacts: Annotated[Path, typer.Option(help="Folder of all artifacts of the chain.")],
    log: Annotated[Path, typer.Option(help="Log of releases: waivers, attempts, receipts.")],
    version: Annotated[str, typer.Option(help="MAJOR.MINOR.PATCH.")],
    key: Annotated[str, typer.Option(help="Name of the key that signs, or its .pem file.")],
    output: Output,
    licences: Annotated[
        Path | None, typer.Option(help="Folder of <SPDX id>.txt, for texts we do not ship.")
    ] = None,
    images_salt: Annotated[
        Path | None, typer.Option(help="Secret file that keys the list of images: images=keyed.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Build, gate and sign a release of a model; exits with 3 when a gate refuses it."""
    config = resolve(recipe, overrides, "release")
    from dinov3.publish.build import ReleaseRequest, build_release, read_salt
    from dinov3.publish.private_key import load_key

    request = ReleaseRequest(
        stage=stage_key(stage_name),
        model=stage_name.removeprefix(_PREFIX),
        version=version,
        weights=model,
        report=report,
        artifacts=artifacts,
        log=log,
        output=output,
        config=config,
        key=load_key(key),
        recipe=recipe,
        overrides=tuple(overrides or ()),
        texts=licences,
        salt=None if images_salt is None else read_salt(images_salt),
    )
    print(build_release(request))
