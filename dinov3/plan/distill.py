"""The plan of a distillation: one teacher over all ranks, a group of ranks for every student."""

# B images per step, W ranks

from collections.abc import Mapping

from dinov3.config import DistillConfig, Resolution, StudentConfig
from dinov3.errors import ConfigError
from dinov3.plan.figures import GroupPlan
from dinov3.plan.networks import (
    NUM_GLOBAL,
    Network,
    build_follower,
    build_network,
    image_bytes,
    masked_patches,
    pixels,
    recomputed,
    student_pass,
    teacher_pass,
)
from dinov3.plan.sharding import shard_of
from dinov3.plan.work import FORWARDS_OF_BACKWARD


def plan_distillation(
    config: DistillConfig, world_size: int, teacher: Network
) -> tuple[GroupPlan, ...]:
    """One group per student; a single rank trains all of them, one after the other."""
    networks = {name: _student(config, each, teacher) for name, each in config.students.items()}
    costs = {name: _student_flops(config, name, network) for name, network in networks.items()}
    if world_size == 1:
        alone = [_group(config, name, networks[name], 1, world_size, teacher) for name in networks]
        return (_together(alone, config, teacher),)
    ranks = share_ranks(config, costs, world_size)
    return tuple(
        _group(config, name, network, ranks[name], world_size, teacher)
        for name, network in networks.items()
    )


def share_ranks(
    config: DistillConfig, costs: Mapping[str, float], world_size: int
) -> dict[str, int]:
    """Ranks of every student: as the recipe says, the rest one by one to the slowest group.

    Raises:
        ConfigError: The ranks of the recipe are not those there are.
    """
    fixed = {name: each.ranks for name, each in config.students.items()}
    ranks = {name: count or 1 for name, count in fixed.items()}
    free = [name for name, count in fixed.items() if count is None]
    left = world_size - sum(ranks.values())
    if left < 0 or (left > 0 and not free):
        needed = f"{sum(ranks.values())}" + (" or more" if free else "")
        msg = (
            f"world_size: the students need {needed} ranks, got {world_size}. Set students.*.ranks."
        )
        raise ConfigError(msg)
    for _ in range(left):
        slowest = max(free, key=lambda name: costs[name] / ranks[name])
        ranks[slowest] += 1
    return ranks


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
    exchanged = 0.0 if world_size == 1 else images * _exchanged_bytes(config, name, teacher)
    traffic = {
        "teacher gathered": micro * frozen.gather_traffic(backward=False),
        "student gathered": micro * student.gather_traffic(backward=True),
        "gradients reduced": micro * student.reduce_traffic(),
        "images and features": exchanged,
    }
    flops = images * _student_flops(config, name, network)
    flops += config.batch_size / world_size * _teacher_flops(config, teacher)
    return GroupPlan(name, num_ranks, network.sizes(), memory, traffic, flops)


def _together(groups: list[GroupPlan], config: DistillConfig, teacher: Network) -> GroupPlan:
    """All students on one rank: their states add up, activations and gathered copies do not."""
    again = config.batch_size * _teacher_flops(config, teacher)
    shared = {"teacher", "gathered parameters", "activations"}
    memory = {
        key: max(g.memory[key] for g in groups)
        if key in shared
        else sum(g.memory[key] for g in groups)
        for key in groups[0].memory
    }
    sizes = {f"{g.name}.{part}": n for g in groups for part, n in g.parameters.items()}
    flops = sum(group.rank_flops for group in groups) - (len(groups) - 1) * again
    return GroupPlan("", 1, sizes, memory, groups[0].traffic, flops)


def _teacher_flops(config: DistillConfig, teacher: Network) -> float:
    size = config.crops.global_size
    return teacher_pass(teacher, size, masked_patches(config, size, teacher.backbone.stride)).flops


def _image_bytes(config: DistillConfig, name: str, network: Network) -> float:
    size = _crops(config, name)
    masked = masked_patches(config, size.global_size, config.students[name].model.stride)
    return image_bytes(network, size, config.crops.num_local, masked, config.compute)


def _exchanged_bytes(config: DistillConfig, name: str, teacher: Network) -> float:
    """Crops of one image, and the features the teacher's heads are fed with."""
    size = config.crops.global_size
    rows = NUM_GLOBAL + masked_patches(config, size, teacher.backbone.stride)
    each = 2 if config.compute.dtype == "bf16" else 4
    crops = pixels(_crops(config, name), config.crops.num_local)
    return each * (crops + rows * teacher.backbone.embed_dim)
