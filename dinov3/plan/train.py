"""The plan of a phase of self-distillation: pre-training, Gram anchoring, high resolution."""

# B images per step, W ranks, b images of one rank in one part of its share

from dinov3.config import Resolution, TrainConfig
from dinov3.plan.figures import GroupPlan
from dinov3.plan.networks import (
    Network,
    build_network,
    image_bytes,
    masked_patches,
    recomputed,
    student_pass,
    teacher_pass,
)
from dinov3.plan.sharding import Sharded, shard_of
from dinov3.plan.work import FORWARDS_OF_BACKWARD, backbone_pass


def plan_training(config: TrainConfig, world_size: int) -> tuple[GroupPlan, ...]:
    """One group: all ranks train the same student."""
    network = build_network(config.model, config.heads)
    dtype, micro = config.compute.dtype, config.run.micro_batches
    student = shard_of(network.parts().values(), world_size=world_size, dtype=dtype)
    gram = _gram_teacher(config, network, world_size)
    rows = config.optim.batch_size / world_size / micro
    sizes = config.crops.resolutions
    memory = {
        "weights": float(student.shard_bytes()),
        "gradients": float(student.shard_bytes()),
        "moments": float(student.moment_bytes()),
        "EMA": float(student.shard_bytes()),
        "Gram teacher": float(gram.shard_bytes()) if gram else 0.0,
        "gathered parameters": float(student.gathered_bytes(backward=True)),
        "activations": rows * max(_image_bytes(config, network, size) for size in sizes),
    }
    flops = sum(size.probability * _image_flops(config, network, size) for size in sizes)
    return (
        GroupPlan(
            "",
            world_size,
            network.sizes(),
            memory,
            _traffic(student, gram, micro),
            flops * rows * micro,
        ),
    )


def _gram_teacher(config: TrainConfig, network: Network, world_size: int) -> Sharded | None:
    """A backbone of its own, unless the living EMA takes its place."""
    if config.gram is None or config.gram.teacher == "ema":
        return None
    return shard_of([network.backbone], world_size=world_size, dtype=config.compute.dtype)


def _image_flops(config: TrainConfig, network: Network, size: Resolution) -> float:
    """Operations of one image in one step."""
    masked = masked_patches(config, size.global_size, config.model.stride)
    mode, num_local = config.compute.checkpointing, config.crops.num_local
    student = student_pass(network, size, num_local, masked, mode).flops
    total = student * (1 + FORWARDS_OF_BACKWARD) + recomputed(network, size, num_local, mode)
    total += teacher_pass(network, size.global_size, masked).flops
    if config.gram is not None and config.gram.teacher != "ema":
        total += 2 * backbone_pass(network.backbone, size.gram_size or size.global_size).flops
    return total


def _image_bytes(config: TrainConfig, network: Network, size: Resolution) -> float:
    masked = masked_patches(config, size.global_size, config.model.stride)
    return image_bytes(network, size, config.crops.num_local, masked, config.compute)


def _traffic(student: Sharded, gram: Sharded | None, micro_batches: int) -> dict[str, float]:
    """Bytes that a rank receives in one step."""
    ema = student.gather_traffic(backward=False)
    return {
        "student gathered": micro_batches * student.gather_traffic(backward=True),
        "EMA gathered": micro_batches * ema,
        "Gram teacher gathered": micro_batches * gram.gather_traffic(backward=False)
        if gram
        else 0.0,
        "gradients reduced": micro_batches * student.reduce_traffic(),
    }
