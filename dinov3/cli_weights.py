"""The verbs around weights: export them to one file, replay a step that was not finite."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


class Role(StrEnum):
    """Whose weights."""

    TEACHER = "teacher"
    STUDENT = "student"


class Format(StrEnum):
    """What kind of file."""

    SAFETENSORS = "safetensors"
    PTH = "pth"


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of an artifact, a release, or a state step_….")
    ],
    to: Annotated[Path, typer.Option(help="The file, .safetensors or .pth.")],
    role: Annotated[Role, typer.Option(help="The EMA teacher or the student.")] = Role.TEACHER,
    file_format: Annotated[
        Format | None, typer.Option("--format", help="By the file's ending if left out.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Which of several students, in a state.")
    ] = None,
    backbone_only: Annotated[bool, typer.Option(help="Without the heads.")] = False,
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
    key: Annotated[
        Path | None, typer.Option(help="Public key that must have signed the release.")
    ] = None,
) -> None:
    """Write the weights of one network as a single file that other code can read."""
    from dinov3.export import ExportRequest, export_weights

    request = ExportRequest(
        source=source,
        target=to,
        role=role.value,
        kind=None if file_format is None else file_format.value,
        student=student or "",
        with_heads=not backbone_only,
        force=force,
        key=key,
    )
    for path in export_weights(request):
        print(path)


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(help="<state folder>/non_finite/step_….")],
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, …; the recipe's if left out.")
    ] = None,
) -> None:
    """Take a step that was not finite once more, and name what went wrong; exits with 3 then."""
    from dinov3.errors import TrainingDiverged
    from dinov3.train.lens import describe, verdict
    from dinov3.train.rebuild import replay_step

    findings = replay_step(dump, device=device)
    print(describe(findings))
    if not findings.is_finite:
        raise TrainingDiverged(verdict(findings))
    print(verdict(findings))
