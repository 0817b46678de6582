"""The plan of dino.txt: a text tower and a few vision blocks over a frozen backbone."""

# B pairs per step, W ranks, N tokens

from dinov3.config import DinotxtConfig
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.plan.figures import GroupPlan
from dinov3.plan.networks import CHANNELS, Network
from dinov3.plan.sharding import shard_of
from dinov3.plan.work import FORWARDS_OF_BACKWARD, Pass, backbone_pass, blocks_pass


def plan_alignment(
    config: DinotxtConfig, world_size: int, frozen: Network
) -> tuple[GroupPlan, ...]:
    """One group: all ranks train the same towers."""
    fields = DinoTxtConfig.from_fields(config.model.model_dump())
    model = DinoTxt(fields, frozen.backbone, device="meta")
    dtype, micro = config.compute.dtype, config.run.micro_batches
    parts = model.trainable()
    trained = shard_of(parts.values(), world_size=world_size, dtype=dtype)
    backbone = shard_of([frozen.backbone], world_size=world_size, dtype=dtype)
    rows = config.optim.batch_size / world_size
    forward = _trained_pass(config, model)
    again = blocks_flops(config, model) if config.compute.checkpointing == "full" else 0.0
    flops = backbone_pass(frozen.backbone, config.crops.size).flops
    flops += (1 + FORWARDS_OF_BACKWARD) * forward.flops + again
    similarity = 2.0 * config.optim.batch_size * config.model.embed_dim
    flops += (1 + FORWARDS_OF_BACKWARD) * similarity
    each = 2 if dtype == "bf16" else 4
    numbers = forward.kept + CHANNELS * config.crops.size**2
    gathered = max(trained.gathered_bytes(backward=True), backbone.gathered_bytes(backward=False))
    memory = {
        "weights": float(trained.shard_bytes()),
        "gradients": float(trained.shard_bytes()),
        "moments": float(trained.moment_bytes()),
        "frozen backbone": float(backbone.shard_bytes()),
        "gathered parameters": float(gathered),
        "activations": rows / micro * each * numbers,
    }
    traffic = {
        "backbone gathered": micro * backbone.gather_traffic(backward=False),
        "towers gathered": micro * trained.gather_traffic(backward=True),
        "gradients reduced": micro * trained.reduce_traffic(),
        "features": 4.0 * (world_size - 1) * rows * 2 * config.model.embed_dim,
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return (GroupPlan("", world_size, sizes, memory, traffic, flops * rows),)


def _trained_pass(config: DinotxtConfig, model: DinoTxt) -> Pass:
    """One pair through what is trained."""
    mode = config.compute.checkpointing
    vision = blocks_pass(list(model.visual_model.head.blocks), _num_tokens(config, model), mode)
    text = blocks_pass(
        list(model.text_model.backbone.blocks), config.model.text.context_length, mode
    )
    return vision + text


def blocks_flops(config: DinotxtConfig, model: DinoTxt) -> float:
    """Operations of one pair that full checkpointing does a second time."""
    return _trained_pass(config, model).flops


def _num_tokens(config: DinotxtConfig, model: DinoTxt) -> int:
    backbone = model.visual_model.backbone
    return 1 + backbone.num_registers + (config.crops.size // backbone.stride) ** 2
