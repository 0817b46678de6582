"""Recipe of multi-student distillation: one frozen teacher, several students."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov3.config.base import Count, Positive, Section, Seed, require
from dinov3.config.models import AnyModel, HeadsConfig
from dinov3.config.schedules import (
    ComputeConfig,
    HealthConfig,
    ScheduleConfig,
    TrainRun,
    check_lengths,
)
from dinov3.config.train import LossesConfig, MasksConfig, MultiCropConfig

StudentName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class StudentCrops(Section):
    """Sides of a student's crops: the same cuts as the teacher's, in the student's pixels."""

    global_size: Count
    local_size: Count


class StudentOptim(Section):
    """AdamW of one student; its batch is the teacher's."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    clip: Positive
    layerwise_decay: Positive
    patch_embed_lr_mult: Positive
    lr_scaling: Literal["none", "sqrt_wrt_1024", "linear_wrt_256"]
    freeze_last_layer_steps: Annotated[int, Field(ge=0)]


class StudentSchedules(Section):
    """What each student schedules for itself; num_steps is the run's."""

    lr: ScheduleConfig
    weight_decay: ScheduleConfig
    momentum: ScheduleConfig  # of the student's EMA, which is what is published


class StudentConfig(Section):
    """One student: its network, heads, crops, optimizer, schedules and share of the ranks."""

    model: AnyModel
    heads: HeadsConfig
    crops: StudentCrops
    optim: StudentOptim
    schedules: StudentSchedules
    ranks: Count | None  # None: shared out by cost


class TeacherCrops(MultiCropConfig):
    """The teacher's global crops; students see the same cuts at sizes of their own."""

    global_size: Count


class DistillSchedules(Section):
    """What all students share."""

    num_steps: Count
    teacher_temperature: ScheduleConfig
    local_loss_weight: ScheduleConfig


class DistillConfig(Section):
    """`distilled_students`: the pre-training objective with a frozen teacher in the EMA's place.

    `objective`: `heads` takes the teacher's own prototypes; `features` is for a teacher that comes
    without heads: each student gets linear maps onto the teacher's features and follows their
    direction.
    """

    phase: Literal["distill"]
    seed: Seed
    objective: Literal["heads", "features"]
    batch_size: Annotated[int, Field(ge=2)]
    crops: TeacherCrops
    masks: MasksConfig
    losses: LossesConfig
    schedules: DistillSchedules
    students: Annotated[dict[StudentName, StudentConfig], Field(min_length=1)]
    compute: ComputeConfig
    health: HealthConfig
    run: TrainRun

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        shared = self.schedules
        parts = {
            "schedules.teacher_temperature": shared.teacher_temperature,
            "schedules.local_loss_weight": shared.local_loss_weight,
        }
        for name, student in self.students.items():
            for kind, part in student.schedules:
                parts[f"students.{name}.schedules.{kind}"] = part
        check_lengths(parts, shared.num_steps)
        return self

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        for name, student in self.students.items():
            stride = student.model.stride
            for kind, size in student.crops:
                require(
                    size % stride == 0,
                    f"students.{name}.crops.{kind}: must be a multiple of the network's stride "
                    f"{stride}, got {size}. Round it.",
                )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        group = self.losses.koleo_group_size
        require(
            group is None or self.batch_size % group == 0,
            f"losses.koleo_group_size: must divide the batch of {self.batch_size}, got {group}. "
            "Change one.",
        )
        return self
