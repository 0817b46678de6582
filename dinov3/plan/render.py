"""A plan as text."""

from collections.abc import Mapping

from dinov3.plan.figures import GroupPlan, Plan


def render(plan: Plan) -> str:
    """Tables of one line per figure; memory of activations, and times, are estimates."""
    ranks = f"{plan.world_size} rank" + "s" * (plan.world_size > 1)
    parts = f" in {plan.micro_batches} parts" if plan.micro_batches > 1 else ""
    lines = [f"{plan.phase}: {plan.num_steps:,} steps of {plan.batch_size:,} on {ranks}{parts}"]
    if plan.frozen_parameters:
        lines.append(f"frozen network: {_count(plan.frozen_parameters)} parameters")
    for group in plan.groups:
        lines += _group_lines(group)
    return "\n".join([*lines, "", *_time_lines(plan)])


def _group_lines(group: GroupPlan) -> list[str]:
    title = f"{group.name or 'all'} on {group.num_ranks} rank" + "s" * (group.num_ranks > 1)
    parameters = {name: _count(value) for name, value in group.parameters.items()}
    return [
        "",
        title,
        *_table("parameters", {**parameters, "total": _count(sum(group.parameters.values()))}),
        *_table("memory of a rank", _sizes(group.memory, group.total_memory)),
        *_table("received per step", _sizes(group.traffic, group.total_traffic)),
    ]


def _time_lines(plan: Plan) -> list[str]:
    peak, share = plan.peak_flops / 1e12, 100 * plan.utilisation
    figures = {
        "operations per step": f"{plan.step_flops / 1e12:,.1f} TFLOP",
        "step": f"{plan.step_seconds:.3g} s",
        "images per second": f"{plan.images_per_second:,.0f}",
        "all steps": f"{_duration(plan.total_seconds)}",
        "accelerator hours": f"{plan.total_seconds / 3600 * plan.world_size:,.0f}",
    }
    return _table(f"estimate at {share:.0f} % of {peak:,.0f} TFLOP/s", figures)


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"  {title}", *(f"    {name:<28}{value:>14}" for name, value in rows.items())]


def _sizes(figures: Mapping[str, float], total: float) -> dict[str, str]:
    shown = {name: _bytes(value) for name, value in figures.items() if value}
    return {**shown, "total": _bytes(total)}


def _bytes(number: float) -> str:
    """In binary units, as accelerators state their memory."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.1f} d"
