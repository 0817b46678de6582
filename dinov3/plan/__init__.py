"""What a recipe would take: bytes per rank, communication, operations and time, before it is run.

Networks are built on the meta device, so that nothing is allocated. Weights, gradients and moments
are counted as FSDP2 stores them; activations and times are estimates and are called so.
"""

from dinov3.plan.plan import H100_FLOPS, Frozen, GroupPlan, Plan, frozen_of, plan, plan_recipe
from dinov3.plan.render import render

__all__ = [
    "H100_FLOPS",
    "Frozen",
    "GroupPlan",
    "Plan",
    "frozen_of",
    "plan",
    "plan_recipe",
    "render",
]
