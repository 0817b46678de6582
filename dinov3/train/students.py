"""Which ranks train which student, and which of them show which image to the teacher.

Every student's group of ranks goes through the whole batch, so each image is at hand once per
group. The teacher sees it once: the images are dealt to the groups in turn, in proportion to their
ranks, and inside a group to the rank that holds the image. No image travels; what travels is the
teacher's bottleneck features. (The reference sends images and features to all ranks.)
"""

# W ranks, B images, S students

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3.config import DistillConfig
from dinov3.errors import ConfigError
from dinov3.models.backbone import build_backbone


def group_sizes(config: DistillConfig, world: int) -> list[int]:
    """Ranks of each student's group, in the recipe's order; one group of all where all share.

    All ranks train every student where there is one student only, or fewer ranks than students.

    Args:
        config: The resolved recipe.
        world: All ranks.

    Raises:
        ConfigError: The ranks cannot be split as the recipe asks.
    """
    students = list(config.students.values())
    if not 1 < len(students) <= world:
        return [world]
    costs = [
        student_cost(
            one.model.model_dump(),
            one.crops.global_size,
            one.crops.local_size,
            config.crops.num_local,
        )
        for one in students
    ]
    return share_ranks(costs, [one.ranks for one in students], world, config.batch_size)


def student_cost(
    model: Mapping[str, Any], global_size: int, local_size: int, num_local: int
) -> float:
    """Floating-point operations of a student's forward pass per image, counted on the meta device.

    Args:
        model: The network's fields.
        global_size: Side of its two global crops.
        local_size: Side of its local crops.
        num_local: How many local crops.
    """
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(model, device="meta")
        backbone.eval()
        with FlopCounterMode(display=False) as counter:
            backbone.forward_features(torch.empty(2, 3, global_size, global_size))
            backbone.forward_features(torch.empty(num_local, 3, local_size, local_size))
    return float(counter.get_total_flops())


def share_ranks(
    costs: Sequence[float], wanted: Sequence[int | None], world: int, batch_size: int
) -> list[int]:
    """Ranks per student: as the recipe says, the rest so that the slowest group is fastest.

    Args:
        costs: Of each student.
        wanted: Ranks that the recipe gives each; None where it leaves that open.
        world: All ranks.
        batch_size: Every group must divide it.

    Raises:
        ConfigError: No such split exists.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by ranks used: slowest group, split
    for cost, fixed in zip(costs, wanted, strict=True):
        allowed = [fixed] if fixed else range(1, world + 1)
        sizes = [size for size in allowed if batch_size % size == 0]
        longer: dict[int, tuple[float, list[int]]] = {}
        for used, (slowest, split) in best.items():
            for size in sizes:
                candidate = (max(slowest, cost / size), [*split, size])
                total = used + size
                if total <= world and (total not in longer or candidate < longer[total]):
                    longer[total] = candidate
        best = longer
    if world not in best:
        msg = (
            f"students: {world} ranks cannot be split among {len(costs)} students whose groups "
            f"divide the batch of {batch_size}, got ranks={list(wanted)}. Change one of them."
        )
        raise ConfigError(msg)
    return best[world][1]


def teacher_rows(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """The images that each rank shows to the teacher: every image once, evenly but for one image.

    Args:
        sizes: Ranks of each group, which stand one after the other in the world; all divide B.
        batch_size: B.
    """
    turns = _turns(sizes)
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    holders = [
        [first + image * size // batch_size for first, size in zip(firsts, sizes, strict=True)]
        for image in range(batch_size)
    ]
    rows: list[list[int]] = [[] for _ in turns]
    for image, ranks in enumerate(holders):
        rows[ranks[turns[image % len(turns)]]].append(image)
    while any(_pass_on(rows, holders, first) for first in range(len(rows))):
        pass
    return [sorted(images) for images in rows]


def _turns(sizes: Sequence[int]) -> list[int]:
    """Groups in turn, each as often as it has ranks, spread evenly."""
    taken = [0] * len(sizes)
    turns = []
    for _ in range(sum(sizes)):
        group = min(range(len(sizes)), key=lambda one: ((taken[one] + 1) / sizes[one], one))
        taken[group] += 1
        turns.append(group)
    return turns


def _pass_on(rows: list[list[int]], holders: Sequence[Sequence[int]], first: int) -> bool:
    """Takes an image from rank `first`, through others, to one with at least two less.

    Some rank begins such a chain until all are even: were every image dealt to all its holders, to
    each group in proportion to its ranks, every rank would have exactly B / W.

    Returns:
        Whether there was such a chain.
    """
    came: dict[int, tuple[int, int]] = {first: (first, -1)}  # by rank: from which, by which image
    queue = [first]
    for giver in queue:
        if len(rows[giver]) < len(rows[first]) - 1:
            while giver != first:
                before, image = came[giver]
                rows[before].remove(image)
                rows[giver].append(image)
                giver = before
            return True
        for image in rows[giver]:
            for taker in holders[image]:
                if taker not in came:
                    came[taker] = (giver, image)
                    queue.append(taker)
    return False
