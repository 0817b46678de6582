"""What a plan consists of: figures per group of ranks, and what follows from them for the run."""

from collections.abc import Mapping
from dataclasses import dataclass

H100_FLOPS = 989e12  # bf16, dense, as its maker states it


@dataclass(frozen=True)
class GroupPlan:
    """Ranks that do the same: all of them, or those of one student.

    Attributes:
        name: Of the student; empty where there is one group.
        num_ranks: In the group.
        parameters: Numbers in each part of the network that is trained.
        memory: Bytes on the fullest rank, by what they hold.
        traffic: Bytes each rank receives in one step, by purpose.
        rank_flops: Operations of one rank in one step, its share of a common teacher included.
    """

    name: str
    num_ranks: int
    parameters: Mapping[str, int]
    memory: Mapping[str, float]
    traffic: Mapping[str, float]
    rank_flops: float

    @property
    def total_memory(self) -> float:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())

    @property
    def total_traffic(self) -> float:
        """Bytes each rank receives in one step."""
        return sum(self.traffic.values())


@dataclass(frozen=True)
class Plan:
    """A run on a number of ranks.

    Attributes:
        phase: Of the recipe.
        num_steps: Of the run.
        batch_size: Images, or pairs, per step on all ranks together.
        micro_batches: Parts in which a rank takes its share.
        world_size: Ranks.
        frozen_parameters: Numbers in the frozen teacher or backbone; 0 without one.
        groups: The only one, or one per student.
        utilisation: Share of the peak that is assumed to be reached.
        peak_flops: Operations per second of one accelerator.
    """

    phase: str
    num_steps: int
    batch_size: int
    micro_batches: int
    world_size: int
    frozen_parameters: int
    groups: tuple[GroupPlan, ...]
    utilisation: float
    peak_flops: float

    @property
    def step_flops(self) -> float:
        """Operations of all ranks in one step."""
        return sum(group.num_ranks * group.rank_flops for group in self.groups)

    @property
    def step_seconds(self) -> float:
        """Of the slowest group, at the assumed utilisation."""
        slowest = max(group.rank_flops for group in self.groups)
        return slowest / (self.peak_flops * self.utilisation)

    @property
    def images_per_second(self) -> float:
        """On all ranks together."""
        return self.batch_size / self.step_seconds

    @property
    def total_seconds(self) -> float:
        """Wall time of all steps; loading, checkpoints and waiting are not in it."""
        return self.num_steps * self.step_seconds
