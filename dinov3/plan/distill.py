"""The plan of a distillation: one teacher over all ranks, a group of ranks for every student."""

# B images per step, W ranks

from collections.abc import Mapping

from dinov3.config import DistillConfig, Resolution, StudentConfig
from dinov3.heads.projection import ProjectionHead
from dinov3.plan.figures import GroupPlan
from dinov3.plan.networks import (
    Network,
    build_follower,
    build_network,
    image_bytes,
    masked_patches,
    recomputed,
    student_pass,
    teacher_pass,
)
from dinov3.plan.sharding import shard_of
from dinov3.plan.work import FORWARDS_OF_BACKWARD
from dinov3.train.objective import NUM_GLOBAL
from dinov3.train.students import group_sizes


def plan_distillation(
    config: DistillConfig, world_size: int, teacher: Network
) -> tuple[GroupPlan, ...]:
    """One group per student, as the trainer splits the ranks, or all students on every rank.

    Raises:
        ConfigError: The ranks cannot be split as the recipe asks.
    """
    networks = {name: _student(config, each, teacher) for name, each in config.students.items()}
    sizes = group_sizes(config, world_size)
    if len(sizes) == 1:
        alone = [
            _group(config, name, network, world_size, world_size, teacher)
            for name, network in networks.items()
        ]
        return (_together(alone, config, teacher, world_size),)
    return tuple(
        _group(config, name, network, size, world_size, teacher)
        for (name, network), size in zip(networks.items(), sizes, strict=True)
    )


def _student(config: DistillConfig, student: StudentConfig, teacher: Network) -> Network:
    if config.objective == "features":
        return build_follower(student.model, teacher.backbone.embed_dim)
    return build_network(student.model, student.heads)


def _crops(config: DistillConfig, name: str) -> Resolution:
    crops = config.students[name].crops
    return Resolution(crops.global_size, crops.local_size, None, 1.0)


def _student_flops(config: DistillConfig, name: str, network: Network) -> float:
    """Operations that one image costs one student."""
    size, mode = _crops(config, name), config.compute.checkpointing
    masked = masked_patches(config, size.global_size, config.students[name].model.stride)
    num_local = config.crops.num_local
    forward = student_pass(network, size, num_local, masked, mode).flops
    return forward * (1 + FORWARDS_OF_BACKWARD) + recomputed(network, size, num_local, mode)


def _group(
    config: DistillConfig,
    name: str,
    network: Network,
    num_ranks: int,
    world_size: int,
    teacher: Network,
) -> GroupPlan:
    dtype, micro = config.compute.dtype, config.run.micro_batches
    student = shard_of(network.parts().values(), world_size=num_ranks, dtype=dtype)
    frozen = shard_of(teacher.parts().values(), world_size=world_size, dtype=dtype)
    images = config.batch_size / num_ranks
    gathered = max(student.gathered_bytes(backward=True), frozen.gathered_bytes(backward=False))
    memory = {
        "weights": float(student.shard_bytes()),
        "gradients": float(student.shard_bytes()),
        "moments": float(student.moment_bytes()),
        "EMA": float(student.shard_bytes()),
        "teacher": float(frozen.shard_bytes()),
        "gathered parameters": float(gathered),
        "activations": images / micro * _image_bytes(config, name, network),
    }
    exchanged = 0.0
    if num_ranks < world_size:  # every rank gets the features of the whole batch
        exchanged = config.batch_size * _feature_bytes(config, teacher) * (1 - 1 / world_size)
    traffic = {
        "teacher gathered": frozen.gather_traffic(backward=False),  # one pass for all parts
        "student gathered": micro * student.gather_traffic(backward=True),
        "gradients reduced": micro * student.reduce_traffic(),
        "teacher features": exchanged,
    }
    flops = images * _student_flops(config, name, network)
    flops += config.batch_size / world_size * _teacher_flops(config, teacher)
    return GroupPlan(name, num_ranks, network.sizes(), memory, traffic, flops)


def _together(
    groups: list[GroupPlan], config: DistillConfig, teacher: Network, world_size: int
) -> GroupPlan:
    """All students on every rank: states add up, activations and gathered copies do not."""
    again = config.batch_size / world_size * _teacher_flops(config, teacher)
    shared = {"teacher", "teacher gathered", "gathered parameters", "activations"}

    def joined(figures: list[Mapping[str, float]]) -> dict[str, float]:
        return {
            key: (max if key in shared else sum)(one[key] for one in figures) for key in figures[0]
        }

    sizes = {f"{g.name}.{part}": n for g in groups for part, n in g.parameters.items()}
    flops = sum(group.rank_flops for group in groups) - (len(groups) - 1) * again
    memory, traffic = joined([g.memory for g in groups]), joined([g.traffic for g in groups])
    return GroupPlan("", world_size, sizes, memory, traffic, flops)


def _teacher_flops(config: DistillConfig, teacher: Network) -> float:
    size = config.crops.global_size
    return teacher_pass(teacher, size, masked_patches(config, size, teacher.backbone.stride)).flops


def _image_bytes(config: DistillConfig, name: str, network: Network) -> float:
    size = _crops(config, name)
    masked = masked_patches(config, size.global_size, config.students[name].model.stride)
    return image_bytes(network, size, config.crops.num_local, masked, config.compute)


def _feature_bytes(config: DistillConfig, teacher: Network) -> float:
    """What the students get of the teacher for one image: CLS and masked patches as features."""
    masked = masked_patches(config, config.crops.global_size, teacher.backbone.stride)
    rows = {"dino_head": float(NUM_GLOBAL), "ibot_head": masked}
    numbers = 0.0
    for name, count in rows.items():
        head = teacher.heads.get(name)
        width = teacher.backbone.embed_dim
        if config.objective == "heads" and isinstance(head, ProjectionHead):
            width = head.last_layer.in_features
        numbers += count * width
    return (2 if config.compute.dtype == "bf16" else 4) * numbers
