"""What the verbs of the command line share: options, recipes, and the ties of a stage's process."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dinov3.config import Section, dump
from dinov3.errors import ConfigError, DataError
from dinov3.recipe import load_recipe

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Recipe = Annotated[str, typer.Option(help="Recipe family (demo), family/phase, or a YAML file.")]
Source = Annotated[
    str,
    typer.Option(help="Images: folder:, list:, parquet:, wds:, stamps:PATH, lakefs://REPO/COMMIT."),
]
Output = Annotated[Path, typer.Option(help="Folder for the result.")]
Manifest = Annotated[Path, typer.Option(help="manifest.parquet of image_manifest.")]
Dataset = Annotated[Path, typer.Option(help="curated.parquet of curated_dataset.")]
Resume = Annotated[
    Path | None, typer.Option(help="A state to go on from; a finished one is extended.")
]
Stage = Annotated[str, typer.Argument(help="Key of the stage, as in dvc.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value laid over the recipe.", show_default=False)
]


def stage_key(text: str) -> str:
    """The key as a record may hold it."""
    if not re.fullmatch(r"[a-z0-9_@]+", text):
        msg = f"stage: not a key of lower-case letters, digits, _ and @, got {text!r}. Rename it."
        raise ConfigError(msg)
    return text


def source_spec(text: str) -> str:
    """A bare path means a folder."""
    return text if ":" in text.partition("/")[0] else f"folder:{text}"


def resolve(name: str, overrides: list[str] | None, phase: str) -> Any:
    """The recipe of a phase; a killed orchestrator leaves no stage behind from here on."""
    from dinov3.launch import die_with_parent

    tree: Section = load_recipe(name, overrides or (), phase=phase)
    if dump(tree)["phase"] != phase:
        msg = f"recipe: wrong phase for this verb, got {dump(tree)['phase']!r}. Use {phase}."
        raise DataError(msg)
    die_with_parent()
    _limit_threads(tree)
    return tree


def _limit_threads(tree: Any) -> None:
    """As many threads as the recipe says, in every library: each reads this when it is loaded.

    Threads that wait for each other by spinning make small work several times slower.
    """
    threads = getattr(getattr(tree, "run", None), "threads", None)
    if threads is not None:
        os.environ |= dict.fromkeys(_THREADS, str(threads))


def start_ranks(config: Any) -> None:
    """Runs this very command once per rank where the recipe asks for several; ends the process.

    It returns in a process that is to do the work itself.

    Raises:
        typer.Exit: The ranks have ended, with their exit code.
    """
    from dinov3.ranks import is_rank, join_ranks, run_ranks

    if is_rank() or config.run.processes == 1:
        join_ranks()
        return
    raise typer.Exit(run_ranks(config.run.processes, sys.argv[1:]))
