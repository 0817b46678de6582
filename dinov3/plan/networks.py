"""Networks on the meta device, and one step's passes through them."""

# B images, G global crops (2), L local crops, M masked patches per image, D width

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dinov3.config import (
    AnyModel,
    ComputeConfig,
    DistillConfig,
    HeadsConfig,
    Resolution,
    TrainConfig,
)
from dinov3.errors import ConfigError
from dinov3.heads.projection import ProjectionHead
from dinov3.models.backbone import Backbone, build_backbone
from dinov3.plan.sharding import SHARD_BYTES
from dinov3.plan.work import Checkpointing, Pass, backbone_pass, head_pass, largest_block
from dinov3.recipe import load_recipe
from dinov3.train.build import head_shape
from dinov3.train.network import build_head
from dinov3.train.objective import NUM_GLOBAL

CHANNELS = 3


@dataclass(frozen=True)
class Network:
    """A backbone and its heads; a teacher may come without heads."""

    backbone: Backbone
    heads: Mapping[str, nn.Module]

    def parts(self) -> dict[str, nn.Module]:
        """All sub-modules by name."""
        return {"backbone": self.backbone, **self.heads}

    def sizes(self) -> dict[str, int]:
        """Numbers in the parameters of each part."""
        return {
            name: sum(p.numel() for p in part.parameters()) for name, part in self.parts().items()
        }

    def heads_pass(self, cls_rows: float, patch_rows: float) -> Pass:
        """CLS and patch rows of one image through the heads."""
        rows = {"dino_head": cls_rows, "ibot_head": patch_rows}
        total = Pass(0.0, 0.0)
        for name, head in self.heads.items():
            if isinstance(head, ProjectionHead):
                total += head_pass(head) * rows[name]
            else:  # a linear map onto a teacher's features
                numbers = sum(p.numel() for p in head.parameters())
                total += Pass(2.0 * numbers, 0.0) * rows[name]
        return total


@dataclass(frozen=True)
class Frozen:
    """A network that stands before a run begins: a teacher, or the backbone of dino.txt."""

    model: AnyModel
    heads: HeadsConfig | None

    def build(self) -> Network:
        """The network on the meta device."""
        return build_network(self.model, self.heads)


def frozen_of(name: str) -> Frozen:
    """What a recipe trains, as a frozen network of another run.

    Args:
        name: A recipe of self-distillation, or `RECIPE:STUDENT` of a distillation.

    Raises:
        ConfigError: There is no such recipe or student.
    """
    recipe, colon, student = name.partition(":")
    config = load_recipe(recipe)
    if isinstance(config, TrainConfig) and not colon:
        return Frozen(config.model, config.heads)
    if isinstance(config, DistillConfig) and student in config.students:
        found = config.students[student]
        return Frozen(found.model, found.heads)
    known = ", ".join(config.students) if isinstance(config, DistillConfig) else "none"
    msg = f"teacher: no such network, got {name!r}. Write RECIPE or RECIPE:STUDENT ({known})."
    raise ConfigError(msg)


def build_network(model: AnyModel, heads: HeadsConfig | None, *, device: str = "meta") -> Network:
    """A backbone with its DINO and iBOT heads."""
    backbone = build_backbone(model.model_dump(), device=device)
    made = {} if heads is None else {"dino_head": heads.dino, "ibot_head": heads.ibot}
    return Network(
        backbone,
        {
            name: build_head(backbone.embed_dim, head_shape(head), device)
            for name, head in made.items()
        },
    )


def build_follower(model: AnyModel, teacher_width: int) -> Network:
    """A student with linear maps onto the features of a teacher without heads."""
    backbone = build_backbone(model.model_dump(), device="meta")
    names = ("dino_head", "ibot_head")
    maps = {name: nn.Linear(backbone.embed_dim, teacher_width, device="meta") for name in names}
    return Network(backbone, maps)


def masked_patches(config: TrainConfig | DistillConfig, size: int, stride: int) -> float:
    """Masked patches M per image, over both global crops, on average."""
    share = config.masks.probability * sum(config.masks.ratio) / 2
    return NUM_GLOBAL * (size // stride) ** 2 * share


def student_pass(
    network: Network, size: Resolution, num_local: int, masked: float, checkpointing: Checkpointing
) -> Pass:
    """One image: global and local crops through backbone and heads."""
    model = network.backbone
    seen = backbone_pass(model, size.global_size, checkpointing=checkpointing, train=True)
    local = backbone_pass(model, size.local_size, checkpointing=checkpointing, train=True)
    return (
        seen * NUM_GLOBAL + local * num_local + network.heads_pass(NUM_GLOBAL + num_local, masked)
    )


def recomputed(
    network: Network, size: Resolution, num_local: int, checkpointing: Checkpointing
) -> float:
    """Operations of one image that full checkpointing does a second time."""
    if checkpointing != "full":
        return 0.0
    model = network.backbone
    seen = backbone_pass(model, size.global_size, train=True).flops * NUM_GLOBAL
    return seen + backbone_pass(model, size.local_size, train=True).flops * num_local


def teacher_pass(network: Network, size: int, masked: float) -> Pass:
    """One image: both global crops, whole, and the rows that become targets."""
    seen = backbone_pass(network.backbone, size) * NUM_GLOBAL
    return seen + network.heads_pass(NUM_GLOBAL, masked)


def image_bytes(
    network: Network,
    size: Resolution,
    num_local: int,
    masked: float,
    compute: ComputeConfig,
) -> float:
    """What one image occupies while a student learns from it: crops, activations and targets."""
    mode, model = compute.checkpointing, network.backbone
    kept = student_pass(network, size, num_local, masked, mode).kept
    if mode == "full":  # one block at a time is there as if nothing were checkpointed
        kept += NUM_GLOBAL * largest_block(model, size.global_size)
        kept += num_local * largest_block(model, size.local_size)
    each = 2 if compute.dtype == "bf16" else 4
    targets = 2 * SHARD_BYTES * _target_numbers(network, masked)  # logits, and their exponentials
    return each * (kept + _pixels(size, num_local)) + targets


def _pixels(size: Resolution, num_local: int) -> int:
    """Numbers in the crops of one image."""
    crops = NUM_GLOBAL * (size.global_size**2 + (size.gram_size or 0) ** 2)
    return CHANNELS * (crops + num_local * size.local_size**2)


def _target_numbers(network: Network, masked: float) -> float:
    """Numbers in the targets of one image."""
    widths = {
        name: head.last_layer.out_features
        for name, head in network.heads.items()
        if isinstance(head, ProjectionHead)
    }
    return NUM_GLOBAL * widths.get("dino_head", 0) + masked * widths.get("ibot_head", 0)
