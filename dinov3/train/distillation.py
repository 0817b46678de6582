"""Multi-student distillation: one pass of a frozen teacher, a step of every student on it.

            teacher crops ──► frozen teacher ──► bottleneck features ──► prototypes ──► Sinkhorn
                                                                                          │
    student crops (the same cuts) ──► each student ──► its DINO + iBOT + KoLeo ◄── targets ┘

Students differ in family, width, heads, crops, optimizer, schedules and EMA. In one process they
take their steps one after the other; over ranks each has a group of its own. A student whose step
is not finite is passed over; the others go on.
"""

# B images, b of a micro-batch, G global crops (2), Z bottleneck width, m masked patches, D width

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.config import DistillConfig, StudentConfig
from dinov3.data.augment import Augmentation, Batch, View
from dinov3.data.loader import ImageSet, Pipeline
from dinov3.distributed import (
    Group,
    gather_objects,
    gather_uneven,
    rank,
    rows_of_rank,
    split_world,
    world_size,
)
from dinov3.losses.sinkhorn import sinkhorn_knopp
from dinov3.train.build import (
    build_augmentation,
    build_optimizer,
    build_pair,
    masks_of_step,
    micro_batches,
    place,
    schedule,
)
from dinov3.train.feature_matching import FeatureMatching, replace_heads
from dinov3.train.health import collapse_reason, measure
from dinov3.train.learner import Learner, Outcome
from dinov3.train.method import SelfDistillation, Share
from dinov3.train.network import Network
from dinov3.train.objective import NUM_GLOBAL, Objective, Targets, Weights
from dinov3.train.probe import gallery, load_probe, patch_colours
from dinov3.train.schedules import Schedule, scaled_lr
from dinov3.train.students import group_sizes, teacher_rows

_NUM_SHOWN = 8  # probe pictures in TensorBoard


class Students:
    """The students that this rank trains, and their common place in the global batch."""

    def __init__(self, config: DistillConfig) -> None:
        """Splits the world: a group of ranks per student, or all students on every rank.

        Raises:
            ConfigError: The ranks cannot be split as the recipe asks.
        """
        names = list(config.students)
        self.sizes = group_sizes(config, world_size())
        self.names = names
        self.group: Group = None
        self.shown: list[list[int]] = []  # by rank, where groups share the teacher's pass
        if len(self.sizes) > 1:
            self.shown = teacher_rows(self.sizes, config.batch_size)
            index, self.group = split_world(self.sizes)
            self.names = [names[index]]
        self.rows = rows_of_rank(config.batch_size, self.group)


class DistillationPhase:
    """A frozen teacher and the students of this rank, for the trainer."""

    def __init__(
        self,
        config: DistillConfig,
        images: ImageSet,
        device: torch.device,
        *,
        teacher: Network,
        teacher_patch: int,
    ) -> None:
        """Builds everything at step 0.

        Args:
            config: The resolved recipe.
            images: The training images; the probe is taken from them.
            device: Where to train.
            teacher: Frozen, with its heads where the objective needs them.
            teacher_patch: Pixels between the teacher's patches.
        """
        self.config = config
        self.device = device
        self.students = Students(config)
        self.rows = self.students.rows
        self.parts = micro_batches(self.rows, config.run.micro_batches)
        self.grid = config.crops.global_size // teacher_patch
        self.teacher: Any = teacher
        place(teacher, teacher.parts(), config.compute, device, trains=False)
        teacher.requires_grad_(False).eval()
        self.pipeline: Pipeline = self._build_pipeline()
        self.methods = {
            name: self._build_student(name, config.students[name]) for name in self.students.names
        }
        self.learners: Sequence[Learner] = [method.learner for method in self.methods.values()]
        self.shared = {
            name: schedule(part, config.schedules.num_steps)
            for name, part in config.schedules
            if name != "num_steps"
        }
        self._probes = {
            name: load_probe(
                images,
                config.health.num_images,
                config.students[name].crops.global_size,
                (config.crops.mean, config.crops.std),
            ).to(device)
            for name in self.students.names
        }

    def step(self, batch: Batch) -> dict[str, Outcome]:
        """One pass of the teacher, then every student's update by itself."""
        now = {name: part(batch.step) for name, part in self.shared.items()}
        masks = self._masks(batch.step)
        targets = self._targets(batch, masks, now["teacher_temperature"])
        weights = Weights(local=now["local_loss_weight"])
        return {
            name: method.learn(batch.step, self._shares(name, batch, masks), targets, weights)
            for name, method in self.methods.items()
        }

    def _build_pipeline(self) -> Augmentation:
        """The teacher's crops, and those of every student that this rank trains."""
        config = self.config
        first = config.students[self.students.names[0]].crops
        views = []
        for name in self.students.names:
            crops = config.students[name].crops
            if crops.global_size != config.crops.global_size:
                views.append(View("global", crops.global_size))
            if crops.local_size != first.local_size:
                views.append(View("local", crops.local_size))
        return build_augmentation(
            config.crops,
            config.crops.global_size,
            first.local_size,
            tuple(dict.fromkeys(views)),
        )

    def _build_student(self, name: str, student: StudentConfig) -> SelfDistillation:
        config, group = self.config, self.students.group
        network, ema = build_pair(student.model.model_dump(), student.heads, config.seed)
        if config.objective == "features":
            for one in (network, ema):
                replace_heads(one, self.teacher.backbone.embed_dim, config.seed)
        for one, trains in ((network, True), (ema, False)):
            place(one, one.parts(), config.compute, self.device, group, trains=trains)
        ema.requires_grad_(False).eval()
        learner = Learner(
            name=name,
            student=network,
            ema=ema,
            parts=network.parts(),
            optimizer=build_optimizer(network.parts(), student.optim),
            schedules=student_schedules(config, student),
            clip=student.optim.clip,
            group=group,
        )
        kind = SelfDistillation if config.objective == "heads" else FeatureMatching
        aims = Objective(**config.losses.model_dump())
        return kind(learner, aims, seed=config.seed, masks_input=False)

    def _masks(self, step: int) -> Tensor:
        """Where iBOT looks, of all images: bool [G, B, P]."""
        config = self.config
        masks = masks_of_step(
            config.masks,
            self.grid,
            batch_size=config.batch_size,
            rows=range(config.batch_size),
            seed=config.seed,
            step=step,
        )
        of_crops: Tensor = masks.unflatten(0, (NUM_GLOBAL, -1))
        return of_crops

    def _shares(self, name: str, batch: Batch, masks: Tensor) -> list[Share]:
        """A student's crops of this rank's images, one share per micro-batch."""
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        crops = self.config.students[name].crops
        own = masks[:, self.rows.start : self.rows.stop]
        shares = []
        for part in self.parts:
            rows = batch.rows(part.start, part.stop)
            shares.append(
                Share(
                    self._crops(pipeline, rows, View("global", crops.global_size)),
                    self._crops(pipeline, rows, View("local", crops.local_size)),
                    own[:, part.start : part.stop].flatten(0, 1).to(self.device),
                    position=self.rows.start + part.start,
                )
            )
        return shares

    def _crops(self, pipeline: Augmentation, batch: Batch, view: View) -> Tensor:
        if view in pipeline.views:
            return pipeline.apply_view(batch, view, self.device)
        return pipeline.apply_kind(batch, view.kind, self.device)

    @torch.no_grad()
    def _targets(self, batch: Batch, masks: Tensor, temperature: float) -> list[Any]:
        """What the teacher says of this rank's images, one entry per micro-batch."""
        cls, patches = self._teacher_features(batch, masks)  # [G, b, Z], [m, Z]
        own = masks[:, self.rows.start : self.rows.stop]
        counts = [int(own[:, part.start : part.stop].sum()) for part in self.parts]
        order = _order_by_part(own, self.parts).to(self.device)
        if self.config.objective == "heads":
            group = self.students.group
            logits = self.teacher.dino_head(cls, only_last_layer=True).flatten(0, 1)
            balanced = sinkhorn_knopp(logits, temperature=temperature, group=group)
            cls = balanced.unflatten(0, (NUM_GLOBAL, -1))
            logits = self.teacher.ibot_head(patches, only_last_layer=True)
            patches = sinkhorn_knopp(logits, temperature=temperature, group=group)
        parts = patches[order].split(counts)
        return [
            Targets(cls[:, part.start : part.stop], of_part)
            for part, of_part in zip(self.parts, parts, strict=True)
        ]

    def _teacher_features(self, batch: Batch, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features of this rank's images, before the prototypes.

        Returns:
            [G, b, Z] of CLS, and [m, Z] of masked patches in row-major order of [G, b, P].
        """
        if len(self.students.sizes) == 1:
            return self._look(batch, masks[:, self.rows.start : self.rows.stop])
        shown = self.students.shown
        places = [row - self.rows.start for row in shown[rank()]]
        picked = batch.pick(places)
        cls, patches = self._look(picked, masks[:, shown[rank()]])
        all_cls = [part.transpose(0, 1) for part in gather_uneven(cls.transpose(0, 1))]
        all_patches = gather_uneven(patches)
        return self._reassemble(shown, masks, all_cls, all_patches)

    def _look(self, batch: Batch, masks: Tensor) -> tuple[Tensor, Tensor]:
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        crops = pipeline.apply_kind(batch, "global", self.device)
        features = self.teacher.backbone.forward_features(crops)
        cls = features["x_norm_clstoken"]
        patches = features["x_norm_patchtokens"]
        if self.config.objective == "heads":
            chosen = patches[masks.flatten(0, 1).to(self.device)]
            cls = self.teacher.dino_head(cls, no_last_layer=True)
            patches = self.teacher.ibot_head(chosen, no_last_layer=True)
        else:
            patches = patches[masks.flatten(0, 1).to(self.device)]
        return cls.unflatten(0, (NUM_GLOBAL, -1)), patches

    def _reassemble(
        self,
        shown: Sequence[Sequence[int]],
        masks: Tensor,
        all_cls: Sequence[Tensor],
        all_patches: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """This rank's images out of what all ranks have shown to the teacher."""
        counts = masks.sum(dim=2)  # [G, B]
        pieces: dict[tuple[int, int], Tensor] = {}
        columns: dict[int, Tensor] = {}
        for rows, cls, patches in zip(shown, all_cls, all_patches, strict=True):
            sizes = counts[:, list(rows)].flatten().tolist()
            keys = [(crop, row) for crop in range(NUM_GLOBAL) for row in rows]
            pieces.update(zip(keys, patches.split(sizes), strict=True))
            columns.update(zip(rows, cls.unbind(dim=1), strict=True))
        own_cls = torch.stack([columns[row] for row in self.rows], dim=1)
        own = [pieces[crop, row] for crop in range(NUM_GLOBAL) for row in self.rows]
        return own_cls, torch.cat(own)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step of this rank's students depends on."""
        return {name: one for learner in self.learners for name, one in learner.tensors().items()}

    def snapshot(self) -> dict[str, Tensor]:
        """No snapshots are kept of students."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, of all students."""
        parts = gather_objects({learner.name: learner.facts() for learner in self.learners})
        return {"learners": {name: one for part in parts for name, one in part.items()}}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Takes back `facts`."""
        for learner in self.learners:
            learner.restore(facts["learners"][learner.name])

    def measure(self, learner: Learner) -> dict[str, float]:
        """Signs of collapse of a student's EMA."""
        ema: Any = learner.ema
        head = ema.dino_head
        return measure(ema.backbone, head, self._probes[learner.name])

    def judge(self, learner: Learner, step: int) -> str | None:
        """The first threshold of the recipe that is broken."""
        limits = self.config.health
        if step < limits.after_step:
            return None
        reason = collapse_reason(learner.health, limits.model_dump())
        return None if reason is None else f"{learner.name}: {reason}"

    def pictures(self, learner: Learner, batch: Batch) -> dict[str, Tensor]:
        """Patch features in colours, and a student's crops of this step."""
        ema: Any = learner.ema
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        size = self.config.students[learner.name].crops.global_size
        crops = self._crops(pipeline, batch, View("global", size))
        probe = self._probes[learner.name][:_NUM_SHOWN]
        return {
            "patches/pca": patch_colours(ema.backbone, probe, enlarge=1),
            "crops/global": gallery(crops, self.config.crops.mean, self.config.crops.std),
        }

    def rehearse(self) -> None:
        """Forward and backward of every student on empty crops and even targets."""
        masks = self._masks(0)[:, self.rows.start : self.rows.stop]
        for name, method in self.methods.items():
            crops = self.config.students[name].crops
            shares, targets = [], []
            for part in self.parts:
                chosen = masks[:, part.start : part.stop].flatten(0, 1).to(self.device)
                shares.append(self._empty_share(crops, len(part), chosen))
                targets.append(self._even_targets(len(part), int(chosen.sum())))
            method.backward(0, shares, targets, Weights())
            method.learner.optimizer.zero_grad(set_to_none=True)

    def _empty_share(self, crops: Any, num_images: int, masks: Tensor) -> Share:
        def empty(count: int, side: int) -> Tensor:
            return torch.zeros(count, 3, side, side, device=self.device)

        return Share(
            empty(NUM_GLOBAL * num_images, crops.global_size),
            empty(self.config.crops.num_local * num_images, crops.local_size),
            masks,
        )

    def _even_targets(self, num_images: int, num_masked: int) -> Targets:
        if self.config.objective == "heads":
            heads = next(iter(self.config.students.values())).heads
            widths = (heads.dino.num_prototypes, heads.ibot.num_prototypes)
        else:
            widths = (self.teacher.backbone.embed_dim,) * 2
        shape = (NUM_GLOBAL, num_images, widths[0])
        return Targets(
            torch.full(shape, 1 / widths[0], device=self.device),
            torch.full((num_masked, widths[1]), 1 / widths[1], device=self.device),
        )


def student_schedules(config: DistillConfig, student: StudentConfig) -> dict[str, Schedule]:
    """A student's own schedules; the scaling rule multiplies peak and end of its learning rate."""
    total, settings = config.schedules.num_steps, student.optim
    scale = scaled_lr(settings.lr_scaling, 1.0, config.batch_size)
    parts = student.schedules
    frozen = settings.freeze_last_layer_steps
    return {
        "lr": schedule(parts.lr, total, scale=scale),
        "last_layer_lr": schedule(parts.lr, total, scale=scale, freeze=frozen),
        "weight_decay": schedule(parts.weight_decay, total),
        "momentum": schedule(parts.momentum, total),
    }


def _order_by_part(masks: Tensor, parts: Sequence[range]) -> Tensor:
    """Masked patches of [G, b, P] in row-major order, sorted by micro-batch; indices [m]."""
    numbers = torch.arange(int(masks.sum()))
    places = torch.zeros_like(masks, dtype=torch.long)
    places[masks] = numbers
    chosen = [places[:, part.start : part.stop][masks[:, part.start : part.stop]] for part in parts]
    return torch.cat(chosen)
