"""Self-distillation for the trainer: pre-training, Gram anchoring, high resolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.config import TrainConfig
from dinov3.data.augment import Augmentation, Batch
from dinov3.data.loader import ImageSet, Pipeline
from dinov3.distributed import rows_of_rank
from dinov3.train.build import (
    build_optimizer,
    build_pair,
    build_pipeline,
    build_schedules,
    gram_views,
    masks_of_step,
    micro_batches,
    place,
)
from dinov3.train.gram_teacher import GramTeacher
from dinov3.train.health import collapse_reason, gram_distance, measure
from dinov3.train.learner import Learner, Outcome
from dinov3.train.method import SelfDistillation, Share
from dinov3.train.network import Network
from dinov3.train.objective import Objective
from dinov3.train.probe import gallery, load_probe, patch_colours

_NUM_SHOWN = 8  # probe pictures in TensorBoard


class SelfDistillationPhase:
    """Student, EMA teacher and perhaps a Gram teacher, as a recipe asks for them."""

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet,
        device: torch.device,
        *,
        networks: tuple[Network, Network] | None = None,
        gram_backbone: nn.Module | None = None,
    ) -> None:
        """Builds everything at step 0.

        Args:
            config: The resolved recipe.
            images: The training images; the probe is taken from them.
            device: Where to train.
            networks: Student and EMA to start from; drawn from the recipe's seed if None.
            gram_backbone: The Gram teacher, where it has weights of its own.
        """
        self.config = config
        self.device = device
        self.rows = rows_of_rank(config.optim.batch_size)
        self.parts = micro_batches(self.rows, config.run.micro_batches)
        self.pipeline: Pipeline = build_pipeline(config)
        fields = config.model.model_dump()
        student, ema = networks or build_pair(fields, config.heads, config.seed)
        for network, trains in ((student, True), (ema, False)):
            place(network, network.parts(), config.compute, device, trains=trains)
        learner = Learner(
            name="",
            student=student,
            ema=ema,
            parts=student.parts(),
            optimizer=build_optimizer(student.parts(), config.optim),
            schedules=build_schedules(config),
            clip=config.optim.clip,
        )
        self.learners: Sequence[Learner] = [learner]
        self.learner = learner
        if gram_backbone is not None:
            part = {"gram_teacher": gram_backbone}
            place(gram_backbone, part, config.compute, device, trains=False)
        gram = None if config.gram is None else GramTeacher(config.gram, gram_backbone)
        self.method = SelfDistillation(
            learner, Objective(**config.losses.model_dump()), seed=config.seed, gram=gram
        )
        crops = config.crops
        self._last_step = 0
        self._probe = load_probe(
            images,
            config.health.num_images,
            crops.resolutions[0].global_size,
            (crops.mean, crops.std),
        ).to(device)

    def step(self, batch: Batch) -> dict[str, Outcome]:
        """One update."""
        self._last_step = batch.step
        return {"": self.method.step(batch.step, self.shares(batch))}

    def shares(self, batch: Batch) -> list[Share]:
        """The crops of a batch as the networks see them, one share per micro-batch."""
        config = self.config
        pipeline = self.pipeline.of_step(config.seed, batch.step)
        patch = config.model.patch_size
        masks = masks_of_step(
            config.masks,
            batch.global_crops.shape[-1] // patch,
            batch_size=config.optim.batch_size,
            rows=self.rows,
            seed=config.seed,
            step=batch.step,
        ).unflatten(0, (2, -1))
        return [self._share(pipeline, batch, masks, part) for part in self.parts]

    def _share(self, pipeline: Augmentation, whole: Batch, masks: Tensor, part: range) -> Share:
        batch = whole.rows(part.start, part.stop)
        global_crops, local_crops = pipeline.apply(batch, self.device)
        gram = [pipeline.apply_view(batch, view, self.device) for view in pipeline.views]
        return Share(
            global_crops,
            local_crops,
            masks[:, part.start : part.stop].flatten(0, 1).to(self.device),
            gram[0] if gram else None,
            position=self.rows.start + part.start,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        gram = {} if self.method.gram is None else self.method.gram.tensors()
        return {**self.learner.tensors(), **gram}

    def snapshot(self) -> dict[str, Tensor]:
        """The EMA's backbone."""
        return self.method.teacher.backbone.state_dict()  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        """What is not a tensor."""
        gram = self.method.gram
        return {
            "learners": {"": self.learner.facts()},
            "gram_updates": 0 if gram is None else gram.num_updates,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Takes back `facts`."""
        self.learner.restore(facts["learners"][""])
        if self.method.gram is not None:
            self.method.gram.num_updates = facts["gram_updates"]

    def measure(self, learner: Learner) -> dict[str, float]:
        """Signs of collapse, and how far the patches are from the Gram teacher's."""
        teacher = self.method.teacher
        found = measure(teacher.backbone, teacher.dino_head, self._probe)
        gram = self.method.gram
        if gram is not None and gram.backbone is not None and gram.is_ready(self._last_step):
            found["gram_distance"] = gram_distance(teacher.backbone, self._anchor, self._probe)
        return found

    def _anchor(self, pictures: Tensor) -> Tensor:
        """What the Gram teacher makes of pictures, seen as large as its crops are."""
        gram, size = self.method.gram, self.config.crops.resolutions[0]
        assert gram is not None
        side = pictures.shape[-1] // self.config.model.patch_size
        large = F.interpolate(
            pictures, (size.gram_size or size.global_size,) * 2, mode="bicubic", antialias=True
        )
        return gram.patches(large, self.method.teacher.backbone, (side, side))

    def judge(self, learner: Learner, step: int) -> str | None:
        """The first threshold of the recipe that is broken."""
        limits = self.config.health
        if step < limits.after_step:
            return None
        return collapse_reason(learner.health, limits.model_dump())

    def pictures(self, learner: Learner, batch: Batch) -> dict[str, Tensor]:
        """Patch features in colours, and the crops of this step."""
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        crops = pipeline.apply_kind(batch, "global", self.device)
        return {
            "patches/pca": patch_colours(self.method.teacher.backbone, self._probe[:_NUM_SHOWN]),
            "crops/global": gallery(crops, self.config.crops.mean, self.config.crops.std),
        }

    def rehearse(self) -> None:
        """Forward and backward on empty crops of the largest resolution."""
        shares = [self._empty_share(len(part)) for part in self.parts]
        now = self.learner.at(0)
        self.method.rehearse(shares, now["teacher_temperature"] or 1.0)
        self.learner.optimizer.zero_grad(set_to_none=True)

    def _empty_share(self, num_images: int) -> Share:
        config = self.config
        size = max(config.crops.resolutions, key=lambda one: one.global_size)
        masks = masks_of_step(
            config.masks,
            size.global_size // config.model.patch_size,
            batch_size=num_images,
            rows=range(num_images),
            seed=config.seed,
            step=0,
        )

        def empty(count: int, side: int) -> Tensor:
            return torch.zeros(count, 3, side, side, device=self.device)

        has_gram = bool(gram_views(config, size))
        return Share(
            empty(2 * num_images, size.global_size),
            empty(config.crops.num_local * num_images, size.local_size),
            masks.to(self.device),
            empty(2 * num_images, size.gram_size or 0) if has_gram else None,
        )
