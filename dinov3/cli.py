"""The command line: verb -> module, each imported when called.

Stages (their command lines stand in dvc.yaml): manifest, embeddings, curate, report, text-report,
compare; those of training in `cli_training`; export and replay in `cli_weights`.
For people: config, plan, stamps, calibrate, eval, embed, summary; releases and their stores in
`cli_release`, `cli_store` and `cli_reevaluate`; verify, lineage, keys, adopt, lake in `__main__`.
Exit codes: 0 done, 1 lineage broken, 2 cannot be done as asked, 3 refused by its own checks,
130 interrupted and resumable.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinov3 import cli_reevaluate, cli_release, cli_store, cli_training, cli_weights
from dinov3.cli_options import (
    Dataset,
    Manifest,
    Output,
    Overrides,
    Recipe,
    Source,
    Stage,
    resolve,
    source_spec,
    stage_key,
)
from dinov3.config import TrainConfig, config_digest
from dinov3.errors import DinoError
from dinov3.recipe import load_recipe
from dinov3.release.render import printable

app = typer.Typer(
    name="dinov3",
    help="DINOv3 as a system: curate, train, release, and say what a weight file is made of.",
    epilog="Also, each with --help: verify, lineage, keys, adopt, lake, source.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verbs in (cli_training, cli_weights, cli_release, cli_store, cli_reevaluate):
    app.registered_commands += _verbs.app.registered_commands
app.add_typer(cli_store.releases, name="releases")


def run(arguments: list[str]) -> int:
    """Runs one verb and turns our errors into a sentence and an exit code."""
    try:
        returned = app(arguments, standalone_mode=False)
    except DinoError as error:
        from dinov3.ranks import report_end

        report_end(error.exit_code, str(error))
        # a foreign name in it must not steer the terminal
        said = "\n".join(printable(line) for line in str(error).splitlines())
        sys.stderr.write(f"dinov3: {said}\n")
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
    return returned if isinstance(returned, int) else 0  # what a typer.Exit carries


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

    tree = resolve(recipe, overrides, "manifest")
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

    tree = resolve(recipe, overrides, "embeddings")
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

    tree = resolve(recipe, overrides, "curation")
    make_curated(manifest=manifest, embeddings=embeddings, output=output, config=tree)


@app.command()
def report(
    stage: Stage,
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

    tree = resolve(recipe, overrides, "evals")
    make_report(
        stage_key(stage),
        source=source,
        model=model,
        manifest=manifest,
        dataset=dataset,
        output=output,
        config=tree,
    )


@app.command("text-report")
def text_report(
    stage: Stage,
    source: Source,
    model: Annotated[Path, typer.Option(help="Folder of dinotxt.")],
    backbone: Annotated[Path, typer.Option(help="Folder of the backbone it was trained over.")],
    pairs: Annotated[Path, typer.Option(help="pairs.parquet of caption_pairs.")],
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage of text evaluation: zero-shot, retrieval, open-vocabulary segmentation."""
    from dinov3.evals.text_report import TextInputs, make_text_report

    make_text_report(
        stage_key(stage),
        inputs=TextInputs(source, model, backbone, manifest, dataset, pairs),
        output=output,
        config=resolve(recipe, overrides, "evals"),
    )


@app.command()
def compare(
    stage: Stage,
    source: Source,
    model: Annotated[
        list[str], typer.Option(help="name=folder, in the order of training; say it once each.")
    ],
    manifest: Manifest,
    dataset: Dataset,
    output: Output,
    recipe: Recipe = "default",
    overrides: Overrides = None,
) -> None:
    """Stage of comparison: what each phase did to each metric, with pictures side by side."""
    from dinov3.evals.phases import compare_phases

    named = [text.partition("=") for text in model]
    compare_phases(
        stage_key(stage),
        source=source,
        models=[(name, Path(folder)) for name, _, folder in named],
        manifest=manifest,
        dataset=dataset,
        output=output,
        config=resolve(recipe, overrides, "evals"),
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
        train=source_spec(train),
        test=source_spec(test) if test else None,
        output=output,
        config=resolve(recipe, overrides, "evals"),
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
        source=source_spec(source),
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

    tree = resolve(recipe, overrides, "embeddings")
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
    print(f"lineage      python -m dinov3 lineage {report.parent}")
