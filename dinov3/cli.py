"""The command line: verb -> module, each imported when called.

Stages (their command lines stand in dvc.yaml): manifest, embeddings, curate, train, report.
For people: config, stamps, calibrate, eval, embed, summary; `lineage` and `source` in __main__.
Exit codes: 0 done, 1 lineage broken, 2 cannot be done as asked, 3 refused by its own checks,
130 interrupted and resumable.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dinov3.config import Section, TrainConfig, config_digest, dump
from dinov3.errors import ConfigError, DataError, DinoError
from dinov3.recipe import load_recipe

app = typer.Typer(
    name="dinov3",
    help="DINOv3 as a system: curate, train, evaluate, and say what a weight file is made of.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[str, typer.Option(help="Recipe family (demo), family/phase, or a YAML file.")]
Source = Annotated[str, typer.Option(help="Images: folder:, list:, parquet:, wds: or stamps:PATH.")]
Output = Annotated[Path, typer.Option(help="Folder for the result.")]
Manifest = Annotated[Path, typer.Option(help="manifest.parquet of image_manifest.")]
Dataset = Annotated[Path, typer.Option(help="curated.parquet of curated_dataset.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value laid over the recipe.", show_default=False)
]


def run(arguments: list[str]) -> int:
    """Runs one verb and turns our errors into a sentence and an exit code."""
    try:
        app(arguments, standalone_mode=False)
    except DinoError as error:
        sys.stderr.write(f"dinov3: {error}\n")
        return error.exit_code
    except typer.Exit as leave:
        return leave.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("dinov3: interrupted; run the same command again to go on\n")
        return 130
    return 0


@app.command()
def config(
    recipe: Annotated[str, typer.Argument(help="Recipe family, family/phase, or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Print a resolved recipe, its digest, the effective batch, the peak LR and the steps."""
    import yaml

    tree = load_recipe(recipe, overrides or ())
    print(yaml.safe_dump(tree.model_dump(mode="json"), sort_keys=False).rstrip())
    print(f"# digest {config_digest(tree)} (without run)")
    if isinstance(tree, TrainConfig):
        from dinov3.train.schedules import scaled_lr

        size, peak = tree.optim.batch_size, tree.schedules.lr.peak
        print(f"# effective batch {size} images per step")
        print(
            f"# peak learning rate {scaled_lr(tree.optim.lr_scaling, peak, size):.6g} after scaling"
        )
        print(f"# {tree.schedules.num_steps} steps, {size * tree.schedules.num_steps} samples")


@app.command()
def stamps(
    destination: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
) -> None:
    """Fetch the demo's pictures (Debian's tuxpaint-stamps-default) without root."""
    from dinov3.data.sources.stamps import fetch_stamps

    fetch_stamps(destination)


@app.command()
def manifest(
    source: Source,
    output: Output,
    recipe: Recipe = "default",
    fingerprint: Annotated[Path | None, typer.Option(help="What dvc saw of the source.")] = None,
    overrides: Overrides = None,
) -> None:
    """Stage image_manifest: one row per image, judged."""
    from dinov3.curation.manifest import make_manifest

    tree = _recipe(recipe, overrides, "manifest")
    make_manifest(source=source, output=output, config=tree, fingerprint=fingerprint)


@app.command()
def embeddings(
    source: Source,
    manifest: Manifest,
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage image_embeddings: one unit vector per image."""
    from dinov3.curation.embed import make_embeddings

    tree = _recipe(recipe, overrides, "embeddings")
    make_embeddings(source=source, manifest=manifest, output=output, config=tree)


@app.command()
def curate(
    manifest: Manifest,
    embeddings: Annotated[Path, typer.Option(help="embeddings.parquet of image_embeddings.")],
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage curated_dataset: deduplicated, clustered, balanced."""
    from dinov3.curation.curate import make_curated

    tree = _recipe(recipe, overrides, "curation")
    make_curated(manifest=manifest, embeddings=embeddings, output=output, config=tree)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="Key of the stage, e.g. pretrained_checkpoint.")],
    source: Source,
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    recipe: Recipe = "default",
    resume: Annotated[
        Path | None, typer.Option(help="A state to go on from; a finished one is extended.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Stages of training; stopped by Ctrl-C or a kill, the same command goes on."""
    from dinov3.train.pretrain import pretrain

    pretrain(
        stage_name=_stage_key(stage),
        source=source,
        manifest=manifest,
        dataset=dataset,
        output=output,
        config=_recipe(recipe, overrides, "pretrain"),
        resume=resume,
    )


@app.command()
def report(
    stage: Annotated[str, typer.Argument(help="Key of the stage, e.g. eval_reports_pretrained.")],
    source: Source,
    model: Annotated[Path, typer.Option(help="Folder of a trained model.")],
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stages of evaluation: JSON and one HTML page, baselines beside the model."""
    from dinov3.evals.report import make_report

    tree = _recipe(recipe, overrides, "evals")
    make_report(
        _stage_key(stage),
        source=source,
        model=model,
        manifest=manifest,
        dataset=dataset,
        output=output,
        config=tree,
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a trained model, or a hub name.")],
    train: Annotated[str, typer.Option(help="Labelled pictures to look at: folder or kind:path.")],
    weights: Annotated[Path | None, typer.Option(help="File of a hub model's weights.")] = None,
    test: Annotated[str | None, typer.Option(help="Pictures to judge; else half of train.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.json and .html.")] = None,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Judge any weights on any labelled folder, baselines beside them."""
    from dinov3.evals.folder import evaluate_folder
    from dinov3.evals.report import knn_summary

    found = evaluate_folder(
        model=model,
        weights=weights,
        train=_spec(train),
        test=_spec(test) if test else None,
        output=output,
        config=_recipe(recipe, overrides, "evals"),
    )
    print(knn_summary(found))
    if output is not None:
        print(f"report {output / 'report.html'}")


@app.command()
def embed(
    source: Annotated[str, typer.Argument(help="Pictures: a folder or kind:path.")],
    model: Annotated[str, typer.Option(help="Folder of a trained model, or a hub name.")],
    output: Annotated[Path, typer.Option(help="The parquet file.")] = Path("features.parquet"),
    weights: Annotated[Path | None, typer.Option(help="File of a hub model's weights.")] = None,
    size: Annotated[
        int, typer.Option(min=1, help="Side of the square the model sees, pixels.")
    ] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Write the CLS features of every picture to parquet."""
    from dinov3.evals.embed import embed_source

    done = embed_source(
        source=_spec(source),
        model=model,
        weights=weights,
        output=output,
        size=size,
        batch_size=batch_size,
        device=device,
    )
    print(f"{done['num_images']} images, features in {output}")


@app.command()
def calibrate(
    source: Source, manifest: Manifest, recipe: Recipe = "default", overrides: Overrides = None
) -> None:
    """Find an embedder's similarity thresholds on planted copies; write them into the recipe."""
    import yaml

    from dinov3.curation.calibrate import run_calibration

    tree = _recipe(recipe, overrides, "embeddings")
    print(yaml.safe_dump(run_calibration(source, manifest, tree), sort_keys=False).rstrip())


@app.command()
def summary(
    report: Annotated[Path, typer.Argument(help="report.json of an eval_reports stage.")],
) -> None:
    """Print a report's k-NN beside its baselines, and where to look."""
    from dinov3.evals.report import summarise_file

    print(summarise_file(report))
    print(f"\nreport       {report.with_suffix('.html')}")
    print("TensorBoard  make board   Dagster  make ui")
    print("lineage      python -m dinov3 lineage data/pretrained_checkpoint")


def _stage_key(text: str) -> str:
    """The key as a record may hold it."""
    if not re.fullmatch(r"[a-z0-9_@]+", text):
        msg = f"stage: not a key of lower-case letters, digits, _ and @, got {text!r}. Rename it."
        raise ConfigError(msg)
    return text


def _spec(text: str) -> str:
    """A bare path means a folder."""
    return text if ":" in text.partition("/")[0] else f"folder:{text}"


def _recipe(name: str, overrides: list[str] | None, phase: str) -> Any:
    tree: Section = load_recipe(name, overrides or (), phase=phase)
    if dump(tree)["phase"] != phase:
        msg = f"recipe: wrong phase for this verb, got {dump(tree)['phase']!r}. Use {phase}."
        raise DataError(msg)
    _tie_to_parent()
    return tree


def _tie_to_parent() -> None:
    """A killed orchestrator must not leave a stage behind."""
    from dinov3.launch import die_with_parent

    die_with_parent()
