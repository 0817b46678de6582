"""From a recipe to its plan: `python -m dinov3 plan RECIPE world_size=256`."""

from collections.abc import Callable, Iterable
from typing import Any

from dinov3.config import DinotxtConfig, DistillConfig, Section, TrainConfig
from dinov3.errors import ConfigError
from dinov3.plan.align import plan_alignment
from dinov3.plan.distill import plan_distillation
from dinov3.plan.figures import H100_FLOPS, GroupPlan, Plan
from dinov3.plan.networks import Frozen, Network, frozen_of
from dinov3.plan.train import plan_training
from dinov3.recipe import load_recipe

__all__ = ["H100_FLOPS", "Frozen", "GroupPlan", "Plan", "frozen_of", "plan", "plan_recipe"]

_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {  # as typed: argument of plan, its type
    "world_size": ("world_size", int),
    "utilisation": ("utilisation", float),
    "peak_flops": ("peak_flops", float),
    "teacher": ("frozen", frozen_of),
}


def plan_recipe(recipe: str, arguments: Iterable[str] = ()) -> Plan:
    """The plan of a recipe by name.

    Args:
        recipe: A family, a family and phase, or the path of a YAML file.
        arguments: `key=value` each: world_size (1 if absent), utilisation, peak_flops, teacher
            (RECIPE, or RECIPE:STUDENT), and whatever is to be laid over the recipe.

    Raises:
        ConfigError: As for `plan` and `load_recipe`, or an option is not a number.
    """
    options: dict[str, Any] = {"world_size": 1}
    overrides: list[str] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in _OPTIONS:
            overrides.append(argument)
            continue
        name, read = _OPTIONS[key]
        try:
            options[name] = read(text)
        except ValueError as error:
            msg = f"{key}: not a number, got {text!r}. Write e.g. world_size=256."
            raise ConfigError(msg) from error
    return plan(load_recipe(recipe, overrides), **options)


def plan(
    config: Section,
    *,
    world_size: int,
    utilisation: float = 0.4,
    peak_flops: float = H100_FLOPS,
    frozen: Frozen | None = None,
) -> Plan:
    """What a recipe would take on so many ranks.

    Args:
        config: A recipe of a phase that trains.
        world_size: Ranks, one accelerator each.
        utilisation: Share of the peak that is assumed to be reached.
        peak_flops: Operations per second of one accelerator.
        frozen: The teacher of a distillation, or the backbone of dino.txt.

    Raises:
        ConfigError: The phase does not train, a figure is impossible, the batch cannot be shared
            out, or the frozen network is missing.
    """
    _check(world_size, utilisation, peak_flops)
    if isinstance(config, TrainConfig):
        batch_size = config.optim.batch_size
        _check_batch(batch_size, world_size, config.run.micro_batches)
        groups, network = plan_training(config, world_size), None
    elif isinstance(config, DistillConfig):
        batch_size, network = config.batch_size, _built(frozen)
        groups = plan_distillation(config, world_size, network)
    elif isinstance(config, DinotxtConfig):
        batch_size, network = config.optim.batch_size, _built(frozen)
        _check_batch(batch_size, world_size, config.run.micro_batches)
        groups = plan_alignment(config, world_size, network)
        network = Network(network.backbone, {})
    else:
        phase = getattr(config, "phase", "?")
        msg = f"recipe: only phases that train can be planned, got {phase}. Choose another."
        raise ConfigError(msg)
    return Plan(
        phase=config.phase,
        num_steps=config.schedules.num_steps,
        batch_size=batch_size,
        micro_batches=config.run.micro_batches,
        world_size=world_size,
        frozen_parameters=sum(network.sizes().values()) if network else 0,
        groups=groups,
        utilisation=utilisation,
        peak_flops=peak_flops,
    )


def _built(frozen: Frozen | None) -> Network:
    if frozen is None:
        msg = "teacher: this phase needs a frozen network, got none. Name its recipe."
        raise ConfigError(msg)
    return frozen.build()


def _check(world_size: int, utilisation: float, peak_flops: float) -> None:
    if world_size < 1:
        msg = f"world_size: must be at least 1, got {world_size}. Raise it."
        raise ConfigError(msg)
    if not 0 < utilisation <= 1:
        msg = f"utilisation: must lie in (0, 1], got {utilisation}. Correct it."
        raise ConfigError(msg)
    if peak_flops <= 0:
        msg = f"peak_flops: must be positive, got {peak_flops}. Correct it."
        raise ConfigError(msg)


def _check_batch(batch_size: int, world_size: int, micro_batches: int) -> None:
    if batch_size % (world_size * micro_batches):
        msg = (
            f"optim.batch_size: {world_size} ranks of {micro_batches} micro-batches do not divide "
            f"it, got {batch_size}. Use a multiple."
        )
        raise ConfigError(msg)
