"""`python -m dinov3 replay DUMP`: the step that was not finite, once more in a single process.

Weights, moments and crops come from the dump. Beyond it a distillation needs its teacher, and an
alignment its backbone and its table of pairs, where the run found them; pictures are never read.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dinov3.config import DinotxtConfig, DistillConfig, Section, TrainConfig, type_of_phase
from dinov3.data.augment import Batch
from dinov3.device import choose_device
from dinov3.distributed import join_world
from dinov3.errors import CheckpointError
from dinov3.models.backbone import build_backbone
from dinov3.stage import Stage
from dinov3.state import load_state, read_facts
from dinov3.train.build import needs_gram_backbone
from dinov3.train.distill import open_teacher
from dinov3.train.distillation import DistillationPhase
from dinov3.train.lens import Findings, look_at_step
from dinov3.train.replay import JOB_NAME, dumped_batches, groups_of, merged, with_local_size
from dinov3.train.self_distillation import SelfDistillationPhase
from dinov3.train.trainer import Method

_NO_FILE = io.BytesIO()
Image.new("RGB", (8, 8)).save(_NO_FILE, "PNG")


class _Blanks:
    """In the place of the training images, which a replay does not look at."""

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> bytes:
        return _NO_FILE.getvalue()

    def name(self, index: int) -> str:
        return "blank"


@dataclass(frozen=True)
class _Rebuilt:
    """A phase as it was, and its networks by the names that findings give them."""

    method: Method
    watched: Mapping[str, nn.Module]


def replay_step(dump: Path, *, device: str | None = None) -> Findings:
    """Takes a dumped step again, all ranks' rows in one process, and changes nothing on disk.

    Blocks run uncompiled, so that every module can be listened to.

    Args:
        dump: `<state folder>/non_finite/step_…`.
        device: Where; the recipe's if None.

    Raises:
        CheckpointError: The dump is not whole.
        DataError, LineageBroken: Teacher, backbone or pairs are no longer what they were.
    """
    job = _read_job(dump.parent.parent / JOB_NAME)
    facts = read_facts(dump)
    batches = dumped_batches(dump.parent, step=facts["step"], num_ranks=facts["world_size"])
    groups = groups_of(batches, _batch_size(job))
    config: Any = _in_one_process(job, num_parts=len(groups[0]))
    place = choose_device(device or config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with join_world(place, alone=config.compute.dtype == "bf16"):
        rebuilt = _rebuild(config, job["arguments"], place)
        load_state(dump, rebuilt.method.tensors())
        rebuilt.method.restore(facts["method"])
        batch = _as_wanted(rebuilt.method, merged(groups), config.seed)
        return look_at_step(rebuilt.method, rebuilt.watched, batch)


def _read_job(path: Path) -> dict[str, Any]:
    try:
        job: dict[str, Any] = json.loads(path.read_bytes())
        config = type_of_phase[job["config"]["phase"]].model_validate_json(
            json.dumps(job["config"])
        )
        return {"config": config, "arguments": dict(job["arguments"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = (
            f"{path}: not the description of a run, got {error!r}. "
            "Give <state folder>/non_finite/step_…, inside the folder of its run."
        )
        raise CheckpointError(msg) from error


def _batch_size(job: Mapping[str, Any]) -> int:
    config = job["config"]
    size: int = config.batch_size if isinstance(config, DistillConfig) else config.optim.batch_size
    return size


def _in_one_process(job: Mapping[str, Any], *, num_parts: int) -> Section:
    """The recipe with each rank's micro-batches one after the other, and nothing compiled."""
    config: Any = job["config"]
    run, health = config.run, config.health
    changed = {
        "run": run.model_copy(update={"micro_batches": run.micro_batches * num_parts}),
        "compute": config.compute.model_copy(update={"compile": False}),
    }
    if "num_images" in type(health).model_fields:
        changed["health"] = health.model_copy(update={"num_images": len(_Blanks())})
    copy: Section = config.model_copy(update=changed)
    return copy


def _as_wanted(method: Method, batch: Batch, seed: int) -> Batch:
    """Students come in another order from `job.json`, and the first one's local crops are first."""
    local_crops = method.pipeline.of_step(seed, batch.step).local_crops
    return with_local_size(batch, local_crops[0].size) if local_crops else batch


def _rebuild(config: Section, arguments: dict[str, Any], device: torch.device) -> _Rebuilt:
    if isinstance(config, TrainConfig):
        return _self_distillation(config, device)
    if isinstance(config, DistillConfig):
        return _distillation(config, arguments, device)
    if isinstance(config, DinotxtConfig):
        return _alignment(config, arguments, device)
    msg = f"{JOB_NAME}: no training phase, got {type(config).__name__}. Give the dump of a run."
    raise CheckpointError(msg)


def _self_distillation(config: TrainConfig, device: torch.device) -> _Rebuilt:
    own = needs_gram_backbone(config.gram)
    gram = build_backbone(config.model.model_dump()) if own else None
    phase = SelfDistillationPhase(config, _Blanks(), device, gram_backbone=gram)
    watched = {"student": phase.learner.student, "teacher": phase.method.teacher}
    return _Rebuilt(phase, watched if gram is None else {**watched, "gram_teacher": gram})


def _distillation(
    config: DistillConfig, arguments: Mapping[str, Any], device: torch.device
) -> _Rebuilt:
    teacher = open_teacher(
        _reader(), Path(arguments["teacher"]), config, arguments.get("teacher_arch")
    )
    patch = teacher.backbone.stride
    phase = DistillationPhase(config, _Blanks(), device, teacher=teacher, teacher_patch=patch)
    students = {learner.name: learner.student for learner in phase.learners}
    return _Rebuilt(phase, {"teacher": teacher, **students})


def _alignment(
    config: DinotxtConfig, arguments: Mapping[str, Any], device: torch.device
) -> _Rebuilt:
    from dinov3 import hub
    from dinov3.train.alignment_phase import AlignmentPhase
    from dinov3.train.text_alignment import AlignmentInputs, read_pairs

    inputs = AlignmentInputs.from_text(arguments)
    pairs = replace(read_pairs(_reader(), inputs.source, inputs.pairs), images=_Blanks())
    backbone = hub.load(inputs.backbone, role="teacher")
    phase = AlignmentPhase(config, pairs, backbone, device)
    return _Rebuilt(phase, {"": phase.model})


def _reader() -> Stage:
    """Checks inputs against their records; writes nothing."""
    return Stage("replay", Path("replay"), {})
