"""dino.txt for the trainer: pairs of crops and captions, one update of both towers per step.

Of the model only what is trained is kept in states: the backbone is frozen and an artifact of its
own. Blocks and heads are sharded; the one value of `logit_scale` is on every rank, in fp32.
"""

# P patches

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from dinov3.config import DinotxtConfig
from dinov3.config.text import AlignmentCrops
from dinov3.data.augment import Augmentation, Batch, CropRecipe
from dinov3.data.loader import Pipeline
from dinov3.data.samplers import philox_words
from dinov3.data.tokenizer import tokenize
from dinov3.distributed import mean_over_ranks, rows_of_rank, world_size
from dinov3.models.backbone import Backbone
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.train.align import Pairs, alignment_losses, backward_in_parts
from dinov3.train.build import micro_batches, place, schedule
from dinov3.train.learner import Learner, Outcome
from dinov3.train.optim import build_adamw, parameter_groups
from dinov3.train.probe import gallery
from dinov3.train.schedules import Schedule
from dinov3.train.text_probe import Captioned, TextProbe

_DROPPED = int.from_bytes(b"residual")  # keep these draws apart from others of the same seed
_COMPARED = int.from_bytes(b"textgram")


class AlignmentPhase:
    """Text tower, vision head and temperature over a frozen backbone, as a recipe asks."""

    def __init__(
        self, config: DinotxtConfig, pairs: Captioned, backbone: Backbone, device: torch.device
    ) -> None:
        """Builds everything at step 0.

        Args:
            config: The resolved recipe.
            pairs: To train on; the probe is taken from them.
            backbone: Is frozen and placed here.
            device: Where to train.
        """
        self.config, self.pairs, self.device = config, pairs, device
        self.rows = rows_of_rank(config.optim.batch_size)
        self.parts = micro_batches(self.rows, config.run.micro_batches)
        self.pipeline: Pipeline = single_crop(config.crops)
        self.model = build_model(config, backbone)
        trainable = self.model.trainable()
        place(self.model, trainable, config.compute, device, trains=True)
        place(backbone, {"backbone": backbone}, config.compute, device, trains=False)
        self.model.train()
        self.learner = Learner(
            name="",
            student=Trained(self.model),
            ema=None,
            parts={**trainable, "logit_scale": nn.ParameterList([self.model.logit_scale])},
            optimizer=build_optimizer(self.model, config.optim.betas),
            schedules=build_schedules(config),
            clip=config.optim.clip,
        )
        self.learners: Sequence[Learner] = [self.learner]
        self.num_patches = (config.crops.size // (backbone.patch_size or backbone.stride)) ** 2
        self.probe = TextProbe(pairs, config, device)

    def step(self, batch: Batch) -> dict[str, Outcome]:
        """One update."""
        terms = self.backward(batch.step, [self._pairs(batch, part) for part in self.parts])
        terms["logit_scale"] = self.model.logit_scale.detach().squeeze()
        outcome = self.learner.update(batch.step, mean_over_ranks(terms))
        if outcome.is_finite:
            self.model.clamp_logit_scale()
        return {"": outcome}

    def backward(self, step: int, parts: Sequence[Pairs]) -> dict[str, Tensor]:
        """Gradients of the whole batch's loss; returns this rank's terms and their sum `loss`.

        Args:
            step: Counted from 0; skipped residuals and compared patches are drawn from it.
            parts: This rank's pairs, in micro-batches.
        """
        losses = self.config.losses
        indices = compared_patches(self.config.seed, step, self.num_patches, losses.text_gram_rate)
        options: dict[str, Any] = {
            "gram_weight": losses.text_gram,
            "gram_indices": None if indices is None else indices.to(self.device),
            "gram_normalize": losses.text_gram_normalize,
        }
        seed_part = partial(self.seed_part, step)
        if len(parts) > 1:
            terms = backward_in_parts(self.model, parts, seed_part=seed_part, **options)
        else:
            seed_part(0)
            terms = alignment_losses(self.model, *parts[0], **options)
            terms["loss"].backward()
        average_gradient(self.model.logit_scale)
        return {name: value.detach() for name, value in terms.items()}

    def _pairs(self, batch: Batch, part: range) -> Pairs:
        rows = batch.rows(part.start, part.stop)
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        crops, _ = pipeline.apply(rows, self.device)
        return crops, self._tokens([self.pairs.captions[index] for index in rows.indices])

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return tokenize(captions, self.config.model.text.context_length).to(self.device)

    def seed_part(self, step: int, number: int) -> None:
        """Stochastic depth draws from seed, step and the part's place in the global batch."""
        position = self.rows.start + self.parts[number].start
        (word,) = philox_words(self.config.seed, _DROPPED, (position, step, 0), 1)
        self.model.set_generator(torch.Generator().manual_seed(int(word >> np.uint64(1))))

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        return self.learner.tensors()

    def snapshot(self) -> dict[str, Tensor]:
        """No snapshots are kept."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {"learners": {"": self.learner.facts()}}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Takes back `facts`."""
        self.learner.restore(facts["learners"][""])

    def measure(self, learner: Learner) -> dict[str, float]:
        """Retrieval inside the probe, and the logarithm of the inverse temperature."""
        return self.probe.measure(self.model)

    def judge(self, learner: Learner, step: int) -> str | None:
        """Retrieval may be poor, but features must be finite."""
        share = learner.health["finite_similarities"]
        if share == 1:
            return None
        return f"finite_similarities is {share:.4g}, below 1"

    def pictures(self, learner: Learner, batch: Batch) -> dict[str, Tensor]:
        """The crops of this step."""
        pipeline = self.pipeline.of_step(self.config.seed, batch.step)
        crops, _ = pipeline.apply(batch, self.device)
        return {"crops": gallery(crops, self.config.crops.mean, self.config.crops.std)}

    def rehearse(self) -> None:
        """Forward and backward on empty crops and captions."""
        side = self.config.crops.size
        self.backward(
            0,
            [
                (
                    torch.zeros(len(part), 3, side, side, device=self.device),
                    self._tokens([""] * len(part)),
                )
                for part in self.parts
            ],
        )
        self.learner.optimizer.zero_grad(set_to_none=True)


class Trained(nn.Module):
    """What is trained of a `DinoTxt`, under its names there."""

    def __init__(self, model: DinoTxt) -> None:
        super().__init__()
        self.logit_scale = model.logit_scale
        self.visual_model = nn.ModuleDict({"head": model.visual_model.head})
        self.text_model = model.text_model


def build_model(config: DinotxtConfig, backbone: Backbone) -> DinoTxt:
    """Both towers on the CPU; what is trained is drawn from the seed alone."""
    fields = DinoTxtConfig.from_fields(config.model.model_dump())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DinoTxt(fields, backbone)


def build_optimizer(model: DinoTxt, betas: tuple[float, float]) -> optim.Optimizer:
    """AdamW; vectors and the logit scale are not decayed."""
    groups = [
        group
        for name, part in model.trainable().items()
        for group in parameter_groups(part, name=name)
    ]
    scale = {
        "params": [model.logit_scale],
        "names": ["logit_scale"],
        "lr_mult": 1.0,
        "wd_mult": 0.0,
        "is_last_layer": False,
    }
    return build_adamw([*groups, scale], betas=betas)


def build_schedules(config: DinotxtConfig) -> dict[str, Schedule]:
    """The learning rate of the recipe, and a weight decay that stays."""
    total, decay = config.schedules.num_steps, config.optim.weight_decay
    return {
        "lr": schedule(config.schedules.lr, total),
        "weight_decay": Schedule(decay, decay, decay, 0, total),
    }


def single_crop(crops: AlignmentCrops) -> Augmentation:
    """One crop of each picture, perhaps mirrored, its colours as they are."""
    return Augmentation(
        global_crops=(CropRecipe(crops.size, crops.scale),),
        local_crops=None,
        horizontal_flip=crops.horizontal_flip,
        jitter=0.0,
        grayscale=0.0,
        mean=crops.mean,
        std=crops.std,
        backgrounds=crops.backgrounds,
        cache_size=crops.cache_size,
    )


def compared_patches(seed: int, step: int, num_patches: int, rate: float) -> Tensor | None:
    """The patches that the text-Gram term compares at a step, in order; None stands for all.

    Args:
        seed: Of the run.
        step: Of the run.
        num_patches: P.
        rate: Share of them; at least one is drawn.
    """
    if rate == 1:
        return None
    words = philox_words(seed, _COMPARED, (0, step, 0), num_patches)
    chosen = np.argsort(words, kind="stable")[: max(1, int(num_patches * rate))]
    return torch.from_numpy(np.sort(chosen))


def average_gradient(parameter: nn.Parameter) -> None:
    """Mean of a parameter's gradient over the ranks, for one that is not sharded."""
    if world_size() > 1:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()
