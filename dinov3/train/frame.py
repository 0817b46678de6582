"""The frame of every training stage: inputs, state, loop, verdict, export.

Resumable state lives in `<output's parent>/.state/<stage>/<key>/`, keyed by all that determines the
run; the same command continues, a changed key starts afresh and says so. Under torchrun every rank
comes through here; rank 0 alone writes the stage's files.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from dinov3.checkpoint import exclusive, save_tensors
from dinov3.config import Section, TrainingConfig, TrainRun, dump
from dinov3.data.loader import ImageSet
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.device import choose_device
from dinov3.distributed import from_first_rank, join_world, rank, world_size
from dinov3.errors import CheckpointError, DataError, TrainingDiverged
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, canonical_json, digest_of
from dinov3.stage import BOARD_NAME, EVENTS_NAME, Stage, open_stage
from dinov3.state import latest_state, read_tensors, state_path
from dinov3.train.ancestor import add_ancestor, is_finished, kept_record
from dinov3.train.replay import JOB_NAME
from dinov3.train.trainer import SNAPSHOTS, Course, Method, Trainer

BACKBONE_NAME = "backbone.safetensors"
HEADS_NAME = "heads.safetensors"
CONFIG_NAME = "config.json"
HEALTH_NAME = "health.json"
_FINISHED = "finished"


@dataclass(frozen=True)
class TrainingInputs:
    """Where training images come from: source, table of all images, table of those kept."""

    source: str
    manifest: Path
    dataset: Path

    def as_text(self) -> dict[str, str]:
        """As it is kept beside the state."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: Mapping[str, Any]) -> "TrainingInputs":
        """From what `as_text` gave, among other things."""
        return cls(text["source"], Path(text["manifest"]), Path(text["dataset"]))


@dataclass(frozen=True)
class TrainingStage:
    """What a phase tells the frame.

    Attributes:
        name: Key of the stage; its state lies under that name.
        outputs: Folder of each artifact by the name of its learner, with the artifact's own key.
        config: The resolved recipe.
        arguments: Of the command line, kept beside the state for a replay.
        build: Reads inputs through the stage; returns the training images and the method.
        export: Writes an artifact: its stage, the learner's name and the run, whose final state is
            on disk; called on rank 0.
        num_steps: Length of the run.
        batch_size: Images per step, over all ranks.
        snapshot_steps: After which the method's snapshot is kept.
        weights_name: The file an extended run names as its ancestor.
    """

    name: str
    outputs: Mapping[str, tuple[str, Path]]
    config: TrainingConfig
    arguments: Mapping[str, Any]
    build: Callable[[Stage, torch.device], tuple[ImageSet, Method]]
    export: Callable[[Stage, str, Trainer], None]
    num_steps: int
    batch_size: int
    snapshot_steps: Sequence[int] = ()
    weights_name: str = BACKBONE_NAME

    @property
    def run(self) -> TrainRun:
        """What cannot change the result."""
        return self.config.run

    @property
    def root(self) -> Path:
        """Where the states of all runs of this stage lie."""
        first = next(iter(self.outputs.values()))[1]
        parent = first.parent if len(self.outputs) == 1 else first.parent.parent
        return parent / ".state" / self.name


def run_training(job: TrainingStage, *, resume: Path | None = None) -> None:
    """Trains and writes the stage's files.

    Raises:
        Interrupted: Stopped by a signal; the same command goes on.
        TrainingDiverged: Non-finite or collapsed.
        DataError, CheckpointError, LineageBroken: Inputs or state that cannot be used.
    """
    device = choose_device(job.run.device)
    if job.run.threads is not None:
        torch.set_num_threads(job.run.threads)
    alone = job.config.compute.dtype == "bf16"
    with join_world(device, alone=alone):
        with _open_stages(job) as stages:
            folder, trainer = _train(job, stages, device, resume)
        if rank() == 0:
            _keep_final_state(job, folder, trainer)


def _train(
    job: TrainingStage, stages: Mapping[str, Stage], device: torch.device, resume: Path | None
) -> tuple[Path, Trainer]:
    first = next(iter(stages.values()))
    images, method = job.build(first, device)
    for stage in stages.values():
        stage.adopt(first)
        stage.seeds = {"seed": job.config.seed}
    extends = is_finished(resume)
    if resume is not None and extends:
        for name, stage in stages.items():
            add_ancestor(stage, kept_record(resume, name), job.config, job.weights_name)
    folder = (
        job.root / run_key(first, job.config, job.run.threads, device)[:16]
    )  # the ancestor belongs to the key
    with _held(folder):
        atomic_write(folder / JOB_NAME, canonical_json(_job_text(job)))
        course = Course(
            seed=job.config.seed,
            num_steps=job.num_steps,
            batch_size=job.batch_size,
            run=job.run,
            policy=job.config.health,
            snapshot_steps=job.snapshot_steps,
        )
        trainer = Trainer(method, images, folder, course)
        _continue(job, trainer, resume, extends=extends)
        try:
            trainer.run()
        except TrainingDiverged as error:
            _leave_verdicts(job, trainer, str(error))
            raise
        for name, stage in stages.items():
            _write_artifact(job, stage, name, trainer, device)
    return folder, trainer


@contextlib.contextmanager
def _open_stages(job: TrainingStage) -> Iterator[dict[str, Stage]]:
    """One stage per artifact; on other ranks than the first they write nothing."""
    config = dump(job.config)
    with contextlib.ExitStack() as stack:
        opened = {}
        for learner, (key, output) in job.outputs.items():
            if rank() == 0:
                opened[learner] = stack.enter_context(open_stage(key, output, config=config))
            else:
                opened[learner] = Stage(key, output, config)
        yield opened


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Rank 0 holds the state folder; the others wait until it does."""
    if rank() == 0:
        with exclusive(folder):
            from_first_rank(True)
            yield
    else:
        from_first_rank(None)
        yield


def _job_text(job: TrainingStage) -> dict[str, Any]:
    config = job.config.model_dump(mode="json")
    return {"stage": job.name, "config": config, "arguments": dict(job.arguments)}


def training_images(stage: Stage, inputs: TrainingInputs) -> ImageSet:
    """The kept images of a curated dataset.

    Raises:
        DataError: It is no curated dataset, or fewer than two images are kept.
    """
    source, dataset = inputs.source, inputs.dataset
    stage.read("manifest", inputs.manifest)
    table = pl.read_parquet(stage.read("dataset", dataset))
    if "kept" not in table.columns:
        msg = (
            f"{dataset}: not a curated dataset, got columns {table.columns}. Give curated.parquet."
        )
        raise DataError(msg)
    table = table.filter(pl.col("kept"))
    if table.height < 2:
        msg = (
            f"{dataset}: too few images are kept to train on, got {table.height}. Loosen curation."
        )
        raise DataError(msg)
    stage.facts["num_images"] = table.height
    return SourceImages(open_source(source), table["path"].to_list(), table["sha256"].to_list())


def run_key(stage: Stage, config: Section, threads: int | None, device: torch.device) -> str:
    """Digest of all that determines the bits: config, inputs, threads and the kind of device.

    The number of ranks and of micro-batches is left out: a run may go on with others, and differs
    then in the last bits and in the draws of stochastic depth.
    """
    return digest_of(
        {
            "config": dump(config),
            "edges": [asdict(edge) for edge in stage.edges],
            "threads": threads,  # null: torch's choice, which torchrun changes
            "device": device.type,
        }
    )


def _continue(job: TrainingStage, trainer: Trainer, resume: Path | None, *, extends: bool) -> None:
    begun = from_first_rank(latest_state(trainer.folder))
    if resume is not None and not (extends and begun):
        _resume_explicitly(job, trainer, resume, extends=extends)
    elif trainer.resume():
        _say(f"continuing at step {trainer.step} from {trainer.folder}")
    elif any(trainer.folder.parent.glob("*/step_*")):
        _say("recipe, inputs, threads or device changed: starting afresh at step 0")


def _resume_explicitly(
    job: TrainingStage, trainer: Trainer, resume: Path, *, extends: bool
) -> None:
    """The same run, or a finished one that only gets more steps."""
    if not extends and resume.resolve().parent != trainer.folder.resolve():
        msg = f"resume: state of another run, got {resume}. Choose one of {trainer.folder}."
        raise CheckpointError(msg)
    trainer.resume(resume)
    if not extends:
        return
    if trainer.step >= job.num_steps:
        msg = (
            f"resume: {resume.name} already has {trainer.step} steps, got schedules.num_steps="
            f"{job.num_steps}. Ask for more."
        )
        raise CheckpointError(msg)
    snapshots = resume.parent / SNAPSHOTS
    if rank() == 0 and snapshots.is_dir():
        shutil.copytree(snapshots, trainer.folder / SNAPSHOTS, dirs_exist_ok=True)
    _say(f"extending the finished run of {trainer.step} steps")


def _write_artifact(
    job: TrainingStage, stage: Stage, name: str, trainer: Trainer, device: torch.device
) -> None:
    """What every artifact has, and what its phase adds."""
    health = _health_of(trainer, name)  # all ranks
    if rank() != 0:
        return
    job.export(stage, name, trainer)
    stage.steps = {"planned": job.num_steps, "performed": trainer.step}
    atomic_write(stage.path(HEALTH_NAME), _verdict(job, trainer.step, health, None))
    copy_logs(trainer.folder / name, stage)
    stage.run_facts = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
        "interruptions": trainer.interruptions,
    }


def copy_logs(folder: Path, stage: Stage) -> None:
    """The event log and TensorBoard's files of a learner."""
    shutil.copyfile(folder / EVENTS_NAME, stage.path(EVENTS_NAME))
    board = stage.path(BOARD_NAME)
    board.mkdir()
    for number, path in enumerate(sorted((folder / BOARD_NAME).iterdir())):
        # the writer puts the host's name into the file's
        shutil.copyfile(path, board / f"events.out.tfevents.{number:06d}")


def _health_of(trainer: Trainer, name: str) -> dict[str, float]:
    found: dict[str, float] = trainer.method.facts()["learners"][name]["health"]
    return found


def _verdict(
    job: TrainingStage, step: int, metrics: Mapping[str, float], reason: str | None
) -> bytes:
    return canonical_json(
        {
            "passed": reason is None,
            "reason": reason,
            "step": step,
            "metrics": {
                name: round(value, 6) if math.isfinite(value) else None
                for name, value in metrics.items()
            },
            "thresholds": job.config.health.model_dump(mode="json"),
        }
    )


def _leave_verdicts(job: TrainingStage, trainer: Trainer, reason: str) -> None:
    """The only file a diverged run leaves in its output: why it was stopped."""
    for name, (_, output) in job.outputs.items():
        metrics = _health_of(trainer, name)
        if rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            atomic_write(output / HEALTH_NAME, _verdict(job, trainer.step, metrics, reason))
    from_first_rank(None)  # a rank that ends has torchrun end the others


def export_networks(stage: Stage, state: Path, learner: str = "") -> None:
    """Writes EMA teacher and student, named so, from a state: backbones and heads apart."""
    prefix = f"{learner}." if learner else ""
    backbone: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for role, kept in (("teacher", "ema"), ("student", "student")):
        for name, tensor in read_tensors(state, f"{prefix}{kept}.").items():
            part, _, rest = name.partition(".")
            if part == "backbone":
                backbone[f"{role}.{rest}"] = tensor
            else:
                heads[f"{role}.{name}"] = tensor
    save_tensors(stage.path(BACKBONE_NAME), backbone)
    save_tensors(stage.path(HEADS_NAME), heads)


def export_snapshots(stage: Stage, folder: Path, steps: Sequence[int]) -> None:
    """Writes the kept snapshots of the EMA's backbone, whole, one file per step."""
    target = stage.path("snapshots")
    target.mkdir()
    for step in steps:
        tensors = read_tensors(state_path(folder, step))
        named = {f"teacher.{name}": tensor for name, tensor in tensors.items()}
        save_tensors(target / f"step_{step:09d}.safetensors", named)


def _keep_final_state(job: TrainingStage, folder: Path, trainer: Trainer) -> None:
    """The last state stays for those who extend the run; the rest has done its duty."""
    finished = job.root / _FINISHED
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    final = trainer.final_state()
    kept = final.replace(finished / final.name)
    for name, (_, output) in job.outputs.items():
        shutil.copyfile(output / RECORD_NAME, kept_record(kept, name))
    if (folder / SNAPSHOTS).is_dir():  # a longer run exports them again
        (folder / SNAPSHOTS).replace(finished / SNAPSHOTS)
    shutil.rmtree(folder)


def _say(text: str) -> None:
    if rank() == 0:
        sys.stderr.write(text + "\n")
