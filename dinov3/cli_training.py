"""The verbs of training: train, distill, align, and the choice of the Gram teacher."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli_options import (
    Dataset,
    Manifest,
    Output,
    Overrides,
    Recipe,
    Resume,
    Source,
    Stage,
    resolve,
    stage_key,
    start_ranks,
)

app = typer.Typer()


class Phase(StrEnum):
    """The phases of self-distillation."""

    PRETRAIN = "pretrain"
    GRAM = "gram"
    HIGHRES = "highres"


@app.command()
def train(
    stage: Stage,
    source: Source,
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    recipe: Recipe = "default",
    phase: Annotated[Phase, typer.Option(help="Which file of the recipe.")] = Phase.PRETRAIN,
    init_from: Annotated[
        Path | None, typer.Option(help="Artifact or published weights to start from.")
    ] = None,
    gram_teacher: Annotated[Path | None, typer.Option(help="Artifact of the Gram teacher.")] = None,
    resume: Resume = None,
    overrides: Overrides = None,
) -> None:
    """Stages of self-distillation; stopped by Ctrl-C or a kill, the same command goes on."""
    tree = resolve(recipe, overrides, phase.value)
    start_ranks(tree)
    from dinov3.train.frame import TrainingInputs
    from dinov3.train.phases import train_phase

    train_phase(
        stage_name=stage_key(stage),
        inputs=TrainingInputs(source, manifest, dataset),
        output=output,
        config=tree,
        init_from=init_from,
        gram_teacher=gram_teacher,
        resume=resume,
    )


@app.command()
def distill(
    stage: Stage,
    source: Source,
    manifest: Manifest,
    dataset: Dataset,
    teacher: Annotated[Path, typer.Option(help="Artifact or published weights of the teacher.")],
    output: Output,
    teacher_arch: Annotated[
        str | None, typer.Option(help="Of a published file: dinov3_vitl16, …")
    ] = None,
    recipe: Recipe = "default",
    resume: Resume = None,
    overrides: Overrides = None,
) -> None:
    """Stage distilled_students: several students on one frozen teacher, a folder for each."""
    tree = resolve(recipe, overrides, "distill")
    start_ranks(tree)
    from dinov3.train.distill import distill_students
    from dinov3.train.frame import TrainingInputs

    distill_students(
        stage_name=stage_key(stage),
        inputs=TrainingInputs(source, manifest, dataset),
        teacher=teacher,
        teacher_arch=teacher_arch,
        output=output,
        config=tree,
        resume=resume,
    )


@app.command()
def align(
    stage: Stage,
    source: Source,
    pairs: Annotated[Path, typer.Option(help="pairs.parquet of caption_pairs.")],
    backbone: Annotated[Path, typer.Option(help="Artifact of the frozen backbone.")],
    output: Output,
    recipe: Recipe = "default",
    resume: Resume = None,
    overrides: Overrides = None,
) -> None:
    """Stage dinotxt: a text tower and a vision head aligned over a frozen backbone."""
    tree = resolve(recipe, overrides, "dinotxt")
    start_ranks(tree)
    from dinov3.train.text_alignment import align_text

    align_text(
        stage_name=stage_key(stage),
        source=source,
        pairs=pairs,
        backbone=backbone,
        output=output,
        config=tree,
        resume=resume,
    )


@app.command("gram-teacher")
def gram_teacher(
    stage: Stage,
    source: Source,
    manifest: Manifest,
    checkpoint: Annotated[Path, typer.Option(help="Artifact with snapshots of its EMA.")],
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage gram_teacher: one snapshot of the EMA, by step or by its dense score."""
    from dinov3.evals.choose_teacher import choose_gram_teacher

    choose_gram_teacher(
        stage_name=stage_key(stage),
        source=source,
        manifest=manifest,
        checkpoint=checkpoint,
        output=output,
        config=resolve(recipe, overrides, "gram_teacher"),
    )


@app.command()
def captions(
    stage: Stage,
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    pairs: Annotated[
        Path | None, typer.Option(help="Your own parquet with columns image and caption.")
    ] = None,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage caption_pairs: pictures with a line of text each."""
    from dinov3.curation.captions import make_caption_pairs

    make_caption_pairs(
        stage_name=stage_key(stage),
        manifest=manifest,
        dataset=dataset,
        output=output,
        config=resolve(recipe, overrides, "captions"),
        pairs=pairs,
    )


@app.command("plan")
def plan_recipe(
    recipe: Annotated[str, typer.Argument(help="Family, family/phase, or a YAML file.")],
    arguments: Overrides = None,
) -> None:
    """Print memory, communication, operations and time; also world_size=256 teacher=RECIPE."""
    from dinov3 import plan

    print(plan.render(plan.plan_recipe(recipe, arguments or ())))
